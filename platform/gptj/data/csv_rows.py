"""A CSV file's bytes in, records out: all cells are text, to be interpreted later."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import IO

from gptj.data.records import (
    BadFileError,
    BadRecordError,
    Columns,
    OnBadRecord,
    Record,
    check_header,
    decoded,
    is_utf8,
    refuse,
)
from gptj.data.rows import shown

DELIMITERS = (",", ";", "\t", "|")  # tried in this order
POSITION = re.compile(r"_c(0|[1-9][0-9]*)")  # a column of a file without a header, as in Spark
MAX_CELL = 2**28  # characters; an unclosed quote would make the rest of the file one cell


def read_csv(
    file: IO[bytes],
    wanted: Columns,
    delimiter: str | None,
    on_bad: OnBadRecord = refuse,
) -> Iterator[Record]:
    """The wanted columns of each record, numbered without the header.

    If all wanted columns are positions (_c0, _c1, …) and the first line does not have these names,
    the file has no header, and its first line is a record.

    Args:
        delimiter: None: the first of DELIMITERS that gives a header with all needed columns.
        on_bad: receives the error of a record, which is then skipped. Quoting errors are raised,
            since the next record's start is then unknown.
    """
    csv.field_size_limit(MAX_CELL)  # process-wide; csv has no per-reader limit
    with decoded(file, newline="") as text:
        yield from _records(text, wanted, delimiter, on_bad)


def _records(
    text: io.TextIOWrapper, wanted: Columns, delimiter: str | None, on_bad: OnBadRecord
) -> Iterator[Record]:
    head: list[str] = []  # lines already read to find the header
    if delimiter is None:
        delimiter = _delimiter(head, text, wanted)
    first = _first(head, text, delimiter)
    names = _names(first, wanted)
    hint = (
        f" (the first line, split at {delimiter!r}; data.delimiter= sets another; without a header "
        f"the columns are _c0, _c1, …)"
    )
    there = check_header(names, wanted, hint)
    places = [(name, names.index(name)) for name in there]
    reader = csv.reader(chain(head, text), delimiter=delimiter, strict=True)
    number = -1 if names is first else 0  # the header's
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise BadRecordError(
                number + 1, f'{error}; remedy: quote it as CSV does: "a ""b"" c"'
            ) from error
        if cells is None:
            return
        if not cells:  # an empty line
            continue
        number += 1
        if number == 0:  # the header
            continue
        try:
            values = _values(cells, number, names, places, delimiter)
        except BadRecordError as error:
            on_bad(error)
            continue
        yield number, values


def _values(
    cells: Sequence[str],
    number: int,
    names: Sequence[str],
    places: Sequence[tuple[str, int]],
    delimiter: str,
) -> dict[str, str]:
    """A record's wanted cells; BadRecordError if there are not as many as in the first line."""
    if len(cells) != len(names):
        raise BadRecordError(
            number,
            f"has {len(cells)} cells but the first line {len(names)}, split at {delimiter!r}; "
            f"remedy: quote cells that contain it",
        )
    values = {name: cells[place] for name, place in places}
    for name, cell in values.items():
        if not is_utf8(cell):
            raise BadRecordError(
                number, f"is not UTF-8: {shown(cell)}; remedy: save the file as UTF-8", name
            )
    return values


def _delimiter(head: list[str], text: io.TextIOWrapper, wanted: Columns) -> str:
    """The first delimiter that gives all needed columns, else the one that gives the most."""
    found: dict[str, int] = {}
    for delimiter in DELIMITERS:
        names = _names(_first(head, text, delimiter), wanted)
        if all(name in names for name in wanted.needed):
            return delimiter
        found[delimiter] = len(names)
    return max(found, key=lambda delimiter: found[delimiter])


def _names(first: list[str], wanted: Columns) -> list[str]:
    """The columns' names: the first line's cells, or their positions if there is no header."""
    positions = wanted.all and all(POSITION.fullmatch(name) for name in wanted.all)
    if not positions or all(name in first for name in wanted.needed):
        return first
    return [f"_c{position}" for position in range(len(first))]


def _first(head: list[str], text: io.TextIOWrapper, delimiter: str) -> list[str]:
    """The first record's cells; the lines read for it are appended to `head`."""

    def lines() -> Iterator[str]:
        yield from head
        while line := text.readline():
            head.append(line)
            yield line

    try:
        names = next((cells for cells in csv.reader(lines(), delimiter=delimiter) if cells), [])
    except csv.Error as error:
        raise BadFileError(f"has a header that cannot be read: {error}") from error
    if not names:
        raise BadFileError("is empty: it has no header")
    for name in names:
        if not is_utf8(name):
            raise BadFileError(f"is not UTF-8: {shown(name)}; remedy: save it as UTF-8")
    return names

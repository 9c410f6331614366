"""Records and errors of the readers of single files (Parquet, JSON, CSV, text).

The readers know neither addresses nor settings; gptj.data.sources adds both to the messages.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

Record = tuple[int, dict[str, Any]]  # its number, from 1, and the wanted columns' values


@dataclass(frozen=True)
class Columns:
    """The columns to read; records without an optional one lack its value."""

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return self.needed + self.optional

    def of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a record's values, as far as it has them."""
        return {name: values[name] for name in self.all if name in values}


class BadRecordError(Exception):
    """A record that cannot be read.

    Attributes:
        values: of those wanted columns that the record has, usable or not, if it is an object.
    """

    def __init__(self, number: int, why: str, column: str | None = None) -> None:
        super().__init__(why)
        self.number = number
        self.column = column
        self.values: Mapping[str, Any] = {}


class MissingColumnsError(Exception):
    """A record, or a whole file (None), lacks some of the needed columns.

    Attributes:
        values: of the other wanted columns.
    """

    def __init__(self, number: int | None, there: Sequence[str], hint: str = "") -> None:
        super().__init__(f"there are {', '.join(there)}{hint}")
        self.number = number
        self.there = there
        self.hint = hint  # what else may be the reason
        self.values: Mapping[str, Any] = {}


OnBadRecord = Callable[[BadRecordError | MissingColumnsError], None]


def refuse(error: BadRecordError | MissingColumnsError) -> None:
    """Raise a bad record's error: the default handler."""
    raise error


class BadFileError(Exception):
    """A file that cannot be read at all."""


class DamagedFileError(Exception):
    """A file that cannot be read beyond some point."""


def check_header(names: Sequence[str], wanted: Columns, hint: str = "") -> tuple[str, ...]:
    """The wanted columns of a file, which must have all needed ones, and no named one twice."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise BadFileError(f"has the column {twice[0]!r} twice; remedy: rename or drop one")
    if any(name not in names for name in wanted.needed):
        raise MissingColumnsError(None, names, hint)
    return tuple(name for name in wanted.all if name in names)


def is_utf8(text: str) -> bool:
    """Whether text from `decoded` was valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def decoded(file: IO[bytes], newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """A file's bytes as text within the block; the file itself stays open.

    Invalid UTF-8 becomes lone surrogates, so that errors can name the record.
    """
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=newline)
    try:
        yield text
    finally:
        if not text.closed:  # an abandoned reader may have closed it with the file
            text.detach()

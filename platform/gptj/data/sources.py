"""Data sets as rows: an address in, one Row for each record out.

Parquet (.parquet), JSON lines (.jsonl, .json), CSV (.csv) and plain text (.txt: a whole file is
one document, in the column `text`); a file, a folder or a glob, local or `s3://`; and `sample://…`,
which needs no download (gptj.data.samples).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import IO, Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from gptj import storage
from gptj.addresses import SAMPLE, normalized
from gptj.data import samples


class DataError(ValueError):
    """Data that cannot be used; the message names file, row (from 1 on), column and why."""


@dataclass(frozen=True)
class Row:
    values: dict[str, Any]
    source: str  # the file's address
    number: int  # from 1 on; of JSON lines the line's, of CSV without the header
    # Our names of columns that have another one in the file.
    columns: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.source}, row {self.number}"

    def value(self, column: str) -> Any:
        """A column's value; DataError if the file has no such column."""
        if column not in self.values:
            raise self.error(
                column,
                f"is missing; there are {', '.join(map(repr, self.values))}; "
                f"remedy: columns.{column}=NAME",
            )
        return self.values[column]

    def text(self, column: str) -> str:
        """A column's value, which must be text."""
        value = self.value(column)
        if not isinstance(value, str):
            raise self.error(column, f"must be text, got {value!r:.80}")
        return value

    def error(self, column: str, why: str) -> DataError:
        return DataError(f"{self}, column {self.columns.get(column, column)!r}: {why}")


def read_rows(address: str, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """The rows of all files at an address, in the order of the files' names.

    Args:
        address: a file, a folder (files of other kinds in it are left out), a pattern in which `*`
            stands for any part of a name, or `sample://…`.
        columns: our name of a column to its name in the files, where it has another one.

    Raises:
        DataError: at once, if the address has no files that can be read, or files of several
            kinds; while reading, naming the row, if a file is damaged or lacks a column; at the
            end, if there was no row.
        AddressError: if the address can be none.
        StorageError: if there is nothing at the address, or it cannot be reached.
    """
    columns = dict(columns or {})
    address = normalized(address, samples=True)
    if address.startswith(SAMPLE):
        try:
            rows = samples.read(address)
        except ValueError as error:
            raise DataError(str(error)) from error
        return _named(((address, numbered) for numbered in enumerate(rows, 1)), columns, address)
    files = _files(address)
    return _named(
        ((f, numbered) for f in files for numbered in _read(f, columns)), columns, address
    )


_Record = tuple[int, dict[str, Any]]  # the row's number, and its values by the file's names


def _named(
    records: Iterable[tuple[str, _Record]], columns: Mapping[str, str], address: str
) -> Iterator[Row]:
    """Rows with our names for their columns."""
    source = None
    for source, (number, values) in records:
        for ours, theirs in columns.items():
            if theirs not in values:
                raise DataError(
                    f"{source}, row {number}: no column {theirs!r} (for {ours}); "
                    f"there are {', '.join(map(repr, values))}"
                )
        renamed = {k: v for k, v in values.items() if k not in columns.values()}
        renamed |= {ours: values[theirs] for ours, theirs in columns.items()}
        yield Row(renamed, source, number, columns)
    if source is None:
        raise DataError(f"{address} has no rows")


def _files(address: str) -> list[str]:
    """The addresses of the data files, by name."""
    if "*" in address:
        files = _matching(address)
    elif storage.exists(address):
        if _ending(address) not in _READERS:
            raise DataError(f"{address} is none of {', '.join(_READERS)}: rename or convert it")
        return [address]
    else:
        files = [file.address for file in storage.list_files(address)]
    if not files:
        raise storage.NotFoundError(f"no file, folder or match at {address}")
    readable = [file for file in files if _ending(file) in _READERS and not _is_hidden(file)]
    endings = {_ending(file) for file in readable}
    if not endings:
        raise DataError(f"{address} has {len(files)} files, none of {', '.join(_READERS)}")
    if len({_READERS[ending] for ending in endings}) > 1:
        raise DataError(
            f"{address} has files of several kinds ({', '.join(sorted(endings))}); "
            f"remedy: a pattern such as {storage.join(address, '*' + min(endings))}"
        )
    return readable


def _matching(pattern: str) -> list[str]:
    """The files that fit a pattern; `*` does not reach over a `/`."""
    before = pattern.partition("*")[0]
    folder, _, _ = before.rpartition("/")
    wanted = pattern[len(folder) + 1 if "/" in before else 0 :].split("/")
    root = folder or ("/" if before.startswith("/") else ".")
    return [
        file.address
        for file in storage.list_files(root)
        if len(parts := file.name.split("/")) == len(wanted) and all(map(_fits, parts, wanted))
    ]


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern.replace("[", "[[]").replace("?", "[?]"))


def _is_hidden(address: str) -> bool:
    """What other programs leave beside data: _SUCCESS, .part.crc."""
    return address.rpartition("/")[2].startswith((".", "_"))


def _ending(address: str) -> str:
    return os.path.splitext(address)[1].lower()


def _read(address: str, columns: Mapping[str, str]) -> Iterator[_Record]:
    """The records of one file, with every error as a DataError that names it."""
    number = 0
    try:
        with storage.open_read(address) as file:
            for number, values in _READERS[_ending(address)](file, columns):
                yield number, values
    except (pyarrow.ArrowException, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{address}, after row {number}: cannot be read: {error}") from error
    except _NotAnObject as error:
        raise DataError(f"{address}, row {error.number}: {error}") from error


class _NotAnObject(Exception):
    def __init__(self, number: int, found: str) -> None:
        super().__init__(f"must be a JSON object in one line, got {found:.80}")
        self.number = number


def _read_parquet(file: IO[bytes], _: Mapping[str, str]) -> Iterator[_Record]:
    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
        for values in batch.to_pylist():
            number += 1
            yield number, values


def _read_json_lines(file: IO[bytes], _: Mapping[str, str]) -> Iterator[_Record]:
    for number, line in enumerate(file, 1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        if not text:
            continue
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise _NotAnObject(number, f"{text[:60]!r} ({error.msg})") from error
        if not isinstance(values, dict):
            raise _NotAnObject(number, repr(text[:60]))
        yield number, values


def _read_csv(file: IO[bytes], columns: Mapping[str, str]) -> Iterator[_Record]:
    # Arrow looks at a file's beginning for the types; these are always text.
    names = [columns.get(name, name) for name in ("text", "question", "context", "answers")]
    always_text = {name: pyarrow.string() for name in names}
    reader = pyarrow.csv.open_csv(
        file,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=always_text),
    )
    number = 0
    for batch in reader:
        for values in batch.to_pylist():
            number += 1
            yield number, values


def _read_text(file: IO[bytes], _: Mapping[str, str]) -> Iterator[_Record]:
    yield 1, {"text": file.read().decode("utf-8-sig")}


_READERS: dict[str, Callable[[IO[bytes], Mapping[str, str]], Iterator[_Record]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".csv": _read_csv,
    ".txt": _read_text,
}

"""Data sets as rows: an address in, one Row per record out.

Formats: Parquet (.parquet), JSON (.jsonl, .json: lines, an array of objects, or SQuAD's nested
file), CSV (.csv, .tsv) and plain text (.txt: one document in the column `text`, or several if
large); all but Parquet also as .gz or .zst. An address is a file, a folder or a glob, local,
`s3://` or on the Hugging Face hub (gptj.data.hub), or a built-in `sample://…` (gptj.data.samples).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from gptj import storage
from gptj.data import hub, samples
from gptj.data.formats import READABLE, Format, format_of, is_typed, read_records
from gptj.data.records import (
    BadFileError,
    BadRecordError,
    Columns,
    DamagedFileError,
    MissingColumnsError,
    Record,
)
from gptj.data.rows import DataError, MissingColumnError, NoRowsError, Row, refuse_row
from gptj.storage.addresses import HUB_DATA, SAMPLE, name_within, normalized, split_hub_data

PART_BYTES = 64 * 2**20  # of a group of small files

__all__ = [
    "DataError",
    "MissingColumnError",
    "Row",
    "check_apart",
    "data_files",
    "find_columns",
    "in_parts",
    "read_rows",
]


def read_rows(
    address: str,
    needed: Sequence[str],
    columns: Mapping[str, str] | None = None,
    *,
    optional: Sequence[str] = (),
    delimiter: str | None = None,
    on_bad: Callable[[DataError], None] = refuse_row,
) -> Iterator[Row]:
    """The rows of all files at an address, in the order of the files' names.

    Args:
        address: a file, a folder (unsupported files in it are ignored), a pattern in which `*`
            stands for any part of a name, or `sample://…`.
        needed: required columns, by our names; others are dropped (in Parquet, not even read).
        columns: our name of a column -> its name in the files, if different.
        optional: further columns, of those rows that have them.
        delimiter: of CSV files; None: detected from each file's header.
        on_bad: receives the error of a single row, which is then skipped; errors that make the rest
            of a file unreadable are raised.

    Raises:
        DataError: immediately, if the address has no readable files, or files of several kinds;
            while reading, naming the row, if a file is damaged or lacks a column; at the end, if
            there were no rows.
        AddressError: if the address is invalid.
        StorageError: if there is nothing at the address, or it cannot be reached.
    """
    names = {ours: (columns or {}).get(ours, ours) for ours in (*needed, *optional)}
    required = {ours: names[ours] for ours in needed}
    address = normalized(address, samples=True)
    if address.startswith(SAMPLE):
        try:
            records = enumerate(samples.read(address), 1)
        except ValueError as error:
            raise DataError(str(error)) from error
        return _rows(((address, True, record) for record in records), names, required, address)
    files = _files(address)
    if delimiter is not None and any(format.kind != "csv" for _, format in files):
        raise DataError(f"data.delimiter={delimiter!r} is for CSV, but {address} has other files")
    return _rows(
        (
            (file.address, is_typed(file.address), record)
            for file, format in files
            for record in _read(file.address, format, names, required, delimiter, on_bad)
        ),
        names,
        required,
        address,
    )


def find_columns(
    address: str,
    kinds: Sequence[tuple[str, ...]],
    columns: Mapping[str, str] | None = None,
    *,
    delimiter: str | None = None,
    skip_bad: bool = False,
) -> tuple[str, ...]:
    """The columns of the rows at an address: those of the kind of rows that the first row matches.

    A kind that includes all columns of another takes precedence.

    Args:
        kinds: the columns of each kind of rows, by our names.
        columns, delimiter: as in read_rows; a kind must have all renamed columns.
        skip_bad: use the first readable row.

    Raises:
        DataError: if the first row matches no kind, or several; or as in read_rows.
    """
    kinds = [kind for kind in kinds if set(columns or ()) <= set(kind)]
    if not kinds:
        raise DataError(f"no rows have all of the columns {', '.join(columns or ())}")
    if len(kinds) == 1:
        return kinds[0]
    fitting, missing = [], []
    on_bad = _refuse_missing if skip_bad else refuse_row
    for kind in kinds:
        try:
            next(read_rows(address, kind, columns, delimiter=delimiter, on_bad=on_bad))
            fitting.append(kind)
        except MissingColumnError as error:
            missing.append(error)
    if not fitting:
        others = " or ".join(" and ".join(kind) for kind in kinds[1:])
        message = f"{missing[0]}; rows may also have {others}"
        raise MissingColumnError(
            message, there=missing[0].there, hint=missing[0].hint
        ) from missing[0]
    fitting = [kind for kind in fitting if not any(set(kind) < set(other) for other in fitting)]
    if len(fitting) > 1:
        choices = " or ".join(f"data.columns.{kind[0]}={kind[0]}" for kind in fitting)
        raise DataError(
            f"{address} has the columns of several kinds of rows "
            f"({'; '.join(', '.join(kind) for kind in fitting)}); remedy: {choices}"
        )
    return fitting[0]


def data_files(address: str) -> list[storage.FileInfo]:
    """The files that read_rows reads, in order; a sample counts as one file."""
    address = normalized(address, samples=True)
    if address.startswith(SAMPLE):
        return [storage.FileInfo(address, address, 0)]
    return [file for file, _ in _files(address)]


def check_apart(address: str, folder: str, names: Iterable[str]) -> None:
    """DataError if files that a job writes would be among the data, once it reads them again.

    Args:
        address: of the data.
        folder: the job's new one, local or `s3://`.
        names: of what it writes there, such as `index.json`.
    """
    address = normalized(address, samples=True)
    if address.startswith((SAMPLE, HUB_DATA)):
        return
    root, wanted = _split_pattern(address) if "*" in address else (address, None)
    inner = name_within(folder, root)
    if inner is None:
        return
    for name in names:
        whole = f"{inner}/{name}".lstrip("/")
        parts = whole.split("/")
        if format_of(name) is None or _is_hidden(whole):
            continue
        if wanted is None or (len(parts) == len(wanted) and all(map(_fits, parts, wanted))):
            raise DataError(
                f"{folder} is within {address}: its files, such as {name}, would be read as data "
                f"when the job is repeated or resumed; remedy: a folder elsewhere, or one whose "
                f"name begins with _, which is not read"
            )


def in_parts(files: Iterable[storage.FileInfo]) -> tuple[tuple[str, ...], ...]:
    """Group addresses, in order: small files together, large ones alone."""
    parts: list[list[str]] = []
    room = -1  # of the last part
    for file in files:
        if file.size > room:
            parts.append([])
            room = PART_BYTES
        parts[-1].append(file.address)
        room -= file.size
    return tuple(map(tuple, parts))


def _rows(
    records: Iterable[tuple[str, bool, Record]],
    names: Mapping[str, str],
    required: Mapping[str, str],
    address: str,
) -> Iterator[Row]:
    """Records as rows, with columns renamed to ours."""
    source = None
    for source, typed, (number, values) in records:
        if any(theirs not in values for theirs in required.values()):
            raise _missing(source, required, MissingColumnsError(number, list(values)))
        renamed = _renamed(values, names)
        yield Row(renamed, source, number, names, typed)
    if source is None:
        raise NoRowsError(f"{address} has no rows")


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: values[theirs] for ours, theirs in names.items() if theirs in values}


def _refuse_missing(error: DataError) -> None:
    """Raise only for rows that lack a column."""
    if isinstance(error, MissingColumnError):
        raise error


def _missing(
    address: str, names: Mapping[str, str], error: MissingColumnsError
) -> MissingColumnError:
    place = address if error.number is None else f"{address}, row {error.number}"
    missing = {ours: theirs for ours, theirs in names.items() if theirs not in error.there}
    lacking = [
        f"{theirs!r}" if ours == theirs else f"{theirs!r} (for {ours})"
        for ours, theirs in missing.items()
    ]
    return MissingColumnError(
        f"{place}: no column {' and no column '.join(lacking)}; there are {listed(error)}; "
        f"remedy: {' '.join(f'data.columns.{ours}=NAME' for ours in missing)}",
        error.number,
        error.there,
        error.hint,
    )


def listed(error: MissingColumnsError | MissingColumnError) -> str:
    """The existing columns, and another possible reason."""
    return f"{', '.join(map(repr, error.there)) or 'none':.400}{error.hint}"


def _files(address: str) -> list[tuple[storage.FileInfo, Format]]:
    """The data files, sorted by name, and their formats."""
    if address.startswith(HUB_DATA):
        if hub.is_pinned_file(address) and (format := format_of(address)) is not None:
            return [(storage.FileInfo(address, address.rpartition("/")[2], 0), format)]
        files = _on_hub(address)
    elif "*" in address:
        files = _matching(address)
    elif storage.exists(address):
        if (format := format_of(address)) is None:
            raise DataError(f"{address} is none of {READABLE}: rename or convert it")
        return [(storage.stat(address), format)]
    else:
        files = storage.list_files(address, lambda name: not _is_hidden(name))
    if not files:
        if "*" not in address and storage.list_files(address):
            raise DataError(
                f"{address} has only files whose names, or folders', begin with . or _, which are "
                f"not read; remedy: rename them, or name one file"
            )
        raise storage.NotFoundError(f"no file, folder or match at {address}")
    readable = [
        (file, format)
        for file in files
        if (format := format_of(file.name)) is not None and not _is_hidden(file.name)
    ]
    if not readable:
        raise DataError(f"{address} has {len(files)} files, none of {READABLE}")
    if len({format.kind for _, format in readable}) > 1:
        endings = sorted({format.ending for _, format in readable})
        raise DataError(
            f"{address} has files of several kinds ({', '.join(endings)}); "
            f"remedy: a pattern such as {storage.join(address, '*' + endings[0])}"
        )
    return readable


def _on_hub(address: str) -> list[storage.FileInfo]:
    """The files of a data set on the hub, or of a folder or pattern in it."""
    path = split_hub_data(address)[2]
    files = hub.list_files(address)
    if "*" in path or format_of(path) is not None:
        return _fitting(files, path)
    hub.check_one_split(address, [file.name for file in files if format_of(file.name)])
    return files


def _matching(pattern: str) -> list[storage.FileInfo]:
    """The files that match a pattern; `*` does not match `/`. Reads no other folders."""
    root, wanted = _split_pattern(pattern)

    def may_match(name: str) -> bool:
        parts = name.removesuffix("/").split("/")
        deep_enough = len(parts) < len(wanted) if name.endswith("/") else len(parts) == len(wanted)
        return deep_enough and not _is_hidden(name) and all(map(_fits, parts, wanted))

    return storage.list_files(root, may_match)


def _split_pattern(pattern: str) -> tuple[str, list[str]]:
    """The folder before the first `*`, and the parts of the names wanted below it."""
    before = pattern.partition("*")[0]
    folder, _, _ = before.rpartition("/")
    root = folder or ("/" if before.startswith("/") else ".")
    return root, pattern[len(folder) + 1 if "/" in before else 0 :].split("/")


def _fitting(files: list[storage.FileInfo], pattern: str) -> list[storage.FileInfo]:
    wanted = pattern.split("/")
    return [
        file
        for file in files
        if len(parts := file.name.split("/")) == len(wanted) and all(map(_fits, parts, wanted))
    ]


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern.replace("[", "[[]").replace("?", "[?]"))


def _is_hidden(name: str) -> bool:
    """Whether it is, or is in, another program's metadata, such as _SUCCESS or .cache."""
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _read(
    address: str,
    format: Format,
    names: Mapping[str, str],
    required: Mapping[str, str],
    delimiter: str | None,
    on_bad: Callable[[DataError], None],
) -> Iterator[Record]:
    """The records of one file; every error becomes a DataError that names it."""
    number = 0
    needed = tuple(dict.fromkeys(required.values()))
    others = dict.fromkeys(theirs for theirs in names.values() if theirs not in needed)
    wanted = Columns(needed, tuple(others))

    def named(error: BadRecordError | MissingColumnsError) -> DataError:
        found: DataError
        if isinstance(error, MissingColumnsError):
            found = _missing(address, required, error)
        else:
            column = f", column {error.column!r}" if error.column is not None else ""
            place = f"{address}, row {error.number}{column}"
            found = DataError(f"{place}: {error}", error.number)
        found.values = _renamed(error.values, names)
        return found

    def bad(error: BadRecordError | MissingColumnsError) -> None:
        if on_bad is refuse_row:
            raise error
        on_bad(named(error))

    path = hub.download(address) if address.startswith(HUB_DATA) else address
    with storage.open_read(path) as file:
        try:
            for number, values in read_records(file, format, wanted, delimiter, bad):
                yield number, values
        except BadFileError as error:
            raise DataError(f"{address} {error}") from error
        except (BadRecordError, MissingColumnsError) as error:
            raise named(error) from error
        except storage.StorageError:
            raise
        except (DamagedFileError, UnicodeDecodeError, OSError) as error:
            raise DataError(f"{address}, after row {number}: cannot be read: {error}") from error

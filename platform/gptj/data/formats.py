"""Supported file formats, and reading a file's bytes as records."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Literal, cast

from gptj.data.csv_rows import read_csv
from gptj.data.json_rows import read_json
from gptj.data.parquet_rows import read_parquet
from gptj.data.records import (
    BadRecordError,
    Columns,
    MissingColumnsError,
    OnBadRecord,
    Record,
    decoded,
    is_utf8,
    refuse,
)
from gptj.environment.extras import Extra

if TYPE_CHECKING:
    import pyarrow
else:
    pyarrow = Extra("pyarrow", "reading packed files")

Kind = Literal["parquet", "json", "csv", "text"]

KINDS: dict[str, Kind] = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
}
CODECS = {".gz": "gzip", ".zst": "zstd"}  # for any but Parquet, as in .jsonl.gz
READABLE = f"{', '.join(KINDS)}, or one of them with {' or '.join(CODECS)}"

UNPACKED_BYTES = 2**20  # buffer size
TEXT_CHARACTERS = 2**24  # per document; a longer text is cut at the end of a line


@dataclass(frozen=True)
class Format:
    kind: Kind
    codec: str | None
    ending: str  # of the file's name, such as .csv.gz


def format_of(name: str) -> Format | None:
    """The format, by the file name's extension; None if unsupported."""
    rest, ending = os.path.splitext(name.lower())
    if ending in CODECS:
        inner = os.path.splitext(rest)[1]
        kind = KINDS.get(inner)
        if kind is None or kind == "parquet":
            return None
        return Format(kind, CODECS[ending], inner + ending)
    return Format(KINDS[ending], None, ending) if ending in KINDS else None


def is_typed(name: str) -> bool:
    """Whether a file's values have types; in CSV all are text."""
    format = format_of(name)
    return format is None or format.kind != "csv"


def read_records(
    file: IO[bytes],
    format: Format,
    wanted: Columns,
    delimiter: str | None,
    on_bad: OnBadRecord = refuse,
) -> Iterator[Record]:
    """A file's records, reduced to the wanted columns.

    Args:
        on_bad: receives the error of a record that can be skipped.

    Raises:
        BadFileError, BadRecordError, MissingColumnsError: for invalid data.
        DamagedFileError, OSError, UnicodeDecodeError: for damaged files.
    """
    if format.codec is not None:
        unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), format.codec)
        file = io.BufferedReader(cast(io.RawIOBase, unpacked), UNPACKED_BYTES)
    match format.kind:
        case "parquet":
            return read_parquet(file, wanted)
        case "json":
            return read_json(file, wanted, on_bad)
        case "csv":
            return read_csv(file, wanted, delimiter, on_bad)
        case "text":
            return _read_text(file, wanted, on_bad)


def _read_text(file: IO[bytes], wanted: Columns, on_bad: OnBadRecord = refuse) -> Iterator[Record]:
    """A file as one document, or several if it is large; newlines are normalized to \\n."""
    if wanted.needed != ("text",):
        raise MissingColumnsError(None, ["text"])
    with decoded(file) as reader:
        number, text = 1, reader.read(TEXT_CHARACTERS)
        while text or number == 1:
            if len(text) == TEXT_CHARACTERS:
                text += reader.readline(TEXT_CHARACTERS)
            if is_utf8(text):
                yield number, {"text": text}
            else:
                why = "is not UTF-8; remedy: save the file as UTF-8"
                on_bad(BadRecordError(number, why, "text"))
            number, text = number + 1, reader.read(TEXT_CHARACTERS)

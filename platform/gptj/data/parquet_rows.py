"""A Parquet file's bytes in, records out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, cast

from gptj.data.records import BadRecordError, Columns, DamagedFileError, Record, check_header
from gptj.environment.extras import Extra

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet
else:
    pyarrow = Extra("pyarrow", "reading Parquet files")

ROWS = 1024  # at a time


def read_parquet(file: IO[bytes], wanted: Columns) -> Iterator[Record]:
    """The wanted columns of each record; no others are read. DamagedFileError if truncated."""
    try:
        yield from _records(file, wanted)
    except pyarrow.ArrowException as error:
        raise DamagedFileError(str(error)) from error


def _records(file: IO[bytes], wanted: Columns) -> Iterator[Record]:
    parquet = pyarrow.parquet.ParquetFile(file)
    names = check_header(parquet.schema_arrow.names, wanted)
    number = 0
    for batch in parquet.iter_batches(batch_size=ROWS, columns=list(names)):
        columns = [_values(batch.column(name), name, number) for name in names]
        for values in zip(*columns, strict=True):
            number += 1
            yield number, dict(zip(names, values, strict=True))


def _values(column: Any, name: str, before: int) -> list[Any]:
    """A column's values as in JSON: dates and times as text, decimals as numbers."""
    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_temporal(column.type):  # Python's dates end with the year 9999
        column = pyarrow.compute.cast(column, pyarrow.string())
    elif types.is_decimal(column.type):
        whole = column.type.scale <= 0
        column = pyarrow.compute.cast(column, pyarrow.int64() if whole else pyarrow.float64())
    elif types.is_float16(column.type):
        column = pyarrow.compute.cast(column, pyarrow.float32())
    try:
        return cast(list[Any], column.to_pylist())
    except (ValueError, OverflowError):  # find the row
        for number, scalar in enumerate(column, before + 1):
            try:
                scalar.as_py()
            except (ValueError, OverflowError) as error:
                raise BadRecordError(number, f"cannot be read: {error}", name) from error
        raise

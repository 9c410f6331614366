"""A row of a data set, and the errors of bad ones."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class DataError(ValueError):
    """Invalid data; the message names file, row (from 1), column and reason.

    Args:
        number: of the row, if the error concerns a single row.

    Attributes:
        values: of a bad row's columns, by our names, as far as it has them.
    """

    def __init__(self, message: str = "", number: int | None = None) -> None:
        super().__init__(message)
        self.number = number
        self.values: Mapping[str, Any] = {}


class NoRowsError(DataError):
    """An address without usable rows."""


class MissingColumnError(DataError):
    """Rows without a required column.

    Args:
        there: the columns that they have.
        hint: another possible reason.
    """

    def __init__(
        self,
        message: str = "",
        number: int | None = None,
        there: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        super().__init__(message, number)
        self.there = tuple(there)
        self.hint = hint


def refuse_row(error: DataError) -> None:
    """Raise a bad row's error: the default handler."""
    raise error


@dataclass(frozen=True)
class Row:
    values: dict[str, Any]
    source: str  # the file's address
    number: int  # from 1; in JSON lines the line's; in CSV without header and empty lines
    # Our name of a column -> the file's, if they differ.
    columns: Mapping[str, str] = field(default_factory=dict)
    typed: bool = True  # False: every value is text, as in CSV

    def __str__(self) -> str:
        return f"{self.source}, row {self.number}"

    def value(self, column: str) -> Any:
        """A column's value; DataError if the row has no such column."""
        if column not in self.values:
            raise self.error(
                column,
                f"is missing; there are {', '.join(map(repr, self.values))}; "
                f"remedy: data.columns.{column}=NAME",
            )
        return self.values[column]

    def text(self, column: str) -> str:
        """A column's value, which must be text."""
        value = self.value(column)
        if not isinstance(value, str):
            raise self.error(column, f"must be text, got {shown(value)}")
        return value

    def error(self, column: str, why: str) -> DataError:
        name = self.columns.get(column, column)
        return DataError(f"{self}, column {name!r}: {why}", self.number)


def shown(value: Any) -> str:
    """A value abbreviated for a message."""
    return _SHORT.repr(value)[:80]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 76
_SHORT.maxlong = 40

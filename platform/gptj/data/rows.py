"""A record of a data set, and the error that names what is wrong with one."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class DataError(ValueError):
    """Data that cannot be used; the message names file, row (from 1 on), column and why.

    Args:
        number: of the row, if the error is a single row's.
    """

    def __init__(self, message: str = "", number: int | None = None) -> None:
        super().__init__(message)
        self.number = number


class NoRowsError(DataError):
    """An address without a row that can be used."""


class MissingColumnError(DataError):
    """Rows without a column that was asked for.

    Args:
        there: the columns that they have.
        hint: what else may be the reason.
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
    """What is done about a bad row, unless it is to be skipped."""
    raise error


@dataclass(frozen=True)
class Row:
    values: dict[str, Any]
    source: str  # the file's address
    number: int  # from 1 on; of JSON lines the line's, of CSV without the header or empty lines
    # Our names of columns that have another one in the file.
    columns: Mapping[str, str] = field(default_factory=dict)
    typed: bool = True  # False: every value is text, whatever it means, as CSV has it

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
    """A value for a message: short, however long or deeply nested it is."""
    return _SHORT.repr(value)[:80]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 76
_SHORT.maxlong = 40

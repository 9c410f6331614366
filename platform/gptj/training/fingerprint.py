"""What a run learns from, in a few bytes: how many rows, and a digest of what is in them.

A run that goes on compares it with what it began with, and the ranks with one another: a run on
other data would repeat rows, skip them, or wait for ever for a rank that has fewer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gptj.data.sources import Row


@dataclass(frozen=True)
class Fingerprint:
    """Of one data set; equal for equal values in the same order, whatever the files are called."""

    rows: int
    sha256: str  # hexadecimal

    def __str__(self) -> str:
        return f"{self.rows} rows (sha256 {self.sha256[:16]}…)"


class CountedRows:
    """Rows on their way to a data set, which is to read them all: then `fingerprint` is theirs.

    Args:
        template: a digest of what renders chats; it counts if the rows are chats.
    """

    def __init__(self, rows: Iterable[Row], template: str = "") -> None:
        self._rows = rows
        self._template = template
        self._digest = hashlib.sha256()
        self._count = 0

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            if not self._count and "messages" in row.values:
                self._digest.update(self._template.encode())
            values = list(row.values.values())  # of the columns that were asked for, in that order
            # Values that are not JSON's, such as dates, by their text.
            self._digest.update(json.dumps(values, sort_keys=True, default=str).encode())
            self._count += 1
            yield row

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self._count, self._digest.hexdigest())

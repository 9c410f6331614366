"""A fingerprint of a run's data: its number of rows and a digest of their values.

A resumed run compares it with the original's, and ranks with each other's: with different data
they would repeat or skip rows, or wait forever for a rank that has fewer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fingerprint:
    """One data set's; equal for equal values in the same order, whatever the files are called.

    Covers only the values trained on: other columns and file formats make no difference.
    """

    rows: int
    sha256: str  # hexadecimal

    def __str__(self) -> str:
        return f"{self.rows} rows (sha256 {self.sha256[:16]}…)"

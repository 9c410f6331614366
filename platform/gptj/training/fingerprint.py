"""What a run learns from, in a few bytes: how many rows, and a digest of what is in them.

A run that goes on compares it with what it began with, and the ranks with one another: a run on
other data would repeat rows, skip them, or wait for ever for a rank that has fewer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fingerprint:
    """Of one data set; equal for equal values in the same order, whatever the files are called.

    For values as they are learned from: other columns, or other ways to write them, do not count.
    """

    rows: int
    sha256: str  # hexadecimal

    def __str__(self) -> str:
        return f"{self.rows} rows (sha256 {self.sha256[:16]}…)"

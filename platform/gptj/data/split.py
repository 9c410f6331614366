"""Holding out a part of a data set: rows in, the rows to train on or those to measure with out.

Both parts come from the same rows, seed and share, have no text in common, and make up the whole.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from gptj.data.rows import DataError, Row

LONG_TEXT = 20_000  # characters


@dataclass(frozen=True)
class Split:
    """One of the two parts."""

    share: float  # of the rows that are held out, in (0, 0.5]
    seed: int
    held_out: bool  # the part to measure with; False: all the rest
    # A column whose long texts are cut instead of being in one part as a whole: their ends are
    # held out. A book is one row.
    cut: str | None = None

    def leaves_nothing(self, address: str) -> DataError:
        return DataError(
            f"data.evaluation_split={self.share:g} of {address} leaves no row to "
            f"{'measure with' if self.held_out else 'train on'}; remedy: more rows, another share, "
            f"or data.evaluation with a file of its own"
        )


def split_rows(rows: Iterable[Row], split: Split, stream: int = 0) -> Iterator[Row]:
    """One of the two parts, in the order of the rows.

    One row of each stretch of 1 / share is held out, at a place that the seed decides: so the share
    is kept, whatever order the rows have.

    Args:
        stream: which of several parts of the data the rows are, each of which is split by itself.
    """
    cut = split.cut
    chosen = _chosen(split.share, f"{split.seed}-{stream}" if stream else split.seed)
    held = next(chosen)
    number = 0
    for row in rows:
        text = row.values.get(cut) if cut is not None else None
        if cut is not None and isinstance(text, str) and len(text) > LONG_TEXT:
            place = _place(text, len(text) - round(len(text) * split.share))
            part = text[place:] if split.held_out else text[:place]
            yield replace(row, values={**row.values, cut: part})
            continue
        while held < number:
            held = next(chosen)
        if (number == held) == split.held_out:
            yield row
        number += 1


def _chosen(share: float, seed: int | str) -> Iterator[int]:
    """Numbers of rows, one at a random place of each stretch."""
    generator = random.Random(seed)
    stretch = 0
    while True:
        yield int((stretch + generator.random()) / share)
        stretch += 1


def _place(text: str, near: int) -> int:
    """Where to cut: after the line or word around a place, if it ends soon."""
    for end in ("\n", " "):
        found = text.find(end, near, near + 1000)
        if found >= 0:
            return found + 1
    return near

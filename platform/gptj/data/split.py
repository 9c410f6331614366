"""Train/evaluation split: rows in, the training or the held-out rows out.

Both parts derive from the same rows, seed and share; they are disjoint and cover the whole.
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

    share: float  # held-out share of the rows, in (0, 0.5]
    seed: int
    held_out: bool  # True: the evaluation part; False: the rest
    # A column whose long texts, such as books, are split themselves: their ends are held out.
    cut: str | None = None

    def leaves_nothing(self, address: str) -> DataError:
        return DataError(
            f"data.evaluation_split={self.share:g} of {address} leaves no row for "
            f"{'evaluation' if self.held_out else 'training'}; remedy: more rows, another share, "
            f"or a separate file in data.evaluation"
        )


def split_rows(rows: Iterable[Row], split: Split, stream: int = 0) -> Iterator[Row]:
    """One of the two parts, in row order.

    Of every 1 / share consecutive rows, one chosen by the seed is held out (stratified sampling).

    Args:
        stream: index of the part of the data; parts are split independently.
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
    """Row numbers, one at random from each stretch of 1 / share."""
    generator = random.Random(seed)
    stretch = 0
    while True:
        yield int((stretch + generator.random()) / share)
        stretch += 1


def _place(text: str, near: int) -> int:
    """Where to cut: after the line or word at `near`, if it ends soon."""
    for end in ("\n", " "):
        found = text.find(end, near, near + 1000)
        if found >= 0:
            return found + 1
    return near

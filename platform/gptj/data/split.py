"""Holding out a part of a data set: rows in, the rows to train on or those to measure with out.

Both parts come from the same rows, seed and share, have no text in common, and make up the whole.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

from gptj.data.rows import DataError, Row

LONG_TEXT = 20_000  # characters


def split_rows(
    rows: Iterable[Row], share: float, seed: int, *, held_out: bool, cut: str | None = None
) -> Iterator[Row]:
    """One of the two parts, in the order of the rows.

    One row of each stretch of 1 / share is held out, at a place that the seed decides: so the share
    is kept, whatever order the rows have.

    Args:
        share: of the rows, in (0, 0.5].
        held_out: the part to measure with; False: all the rest.
        cut: a column whose long texts are cut instead of being in one part as a whole: their ends
            are held out. A book is one row.

    Raises:
        DataError: at the end, if there was no row for the part.
    """
    chosen = _chosen(share, seed)
    held = next(chosen)
    number = given = 0
    for row in rows:
        text = row.values.get(cut) if cut is not None else None
        if cut is not None and isinstance(text, str) and len(text) > LONG_TEXT:
            place = _place(text, len(text) - round(len(text) * share))
            given += 1
            part = text[place:] if held_out else text[:place]
            yield replace(row, values={**row.values, cut: part})
            continue
        while held < number:
            held = next(chosen)
        if (number == held) == held_out:
            given += 1
            yield row
        number += 1
    if not given:
        raise DataError(
            f"data.evaluation_split={share:g} of {number} rows leaves none to "
            f"{'measure with' if held_out else 'train on'}; remedy: more rows, another share, or "
            f"data.evaluation with a file of its own"
        )


def _chosen(share: float, seed: int) -> Iterator[int]:
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

"""Sequences and the rows of those that decode, as arrays that live from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gptj.engine.events import TokenEvent
from gptj.engine.request import Request


@dataclass(eq=False)
class Sequence:
    """Tokens with pages. While a prompt is computed, all its outputs ride along on one."""

    samples: list[Request]  # one, once it decodes; all have the same tokens
    pages: list[int]
    computed: int  # positions whose pages are filled; once it decodes, its row says more
    registered: int  # full pages that the pool has been told of
    spare: list[int] = field(default_factory=list)  # pages kept for the beams that will follow
    scores: dict[Request, list[TokenEvent]] = field(default_factory=dict)  # of the prompt so far
    row: int = -1  # -1 while its prompt is computed

    @property
    def tokens(self) -> list[int]:
        return self.samples[0].tokens

    @property
    def number(self) -> int:
        """Its place in the order of arrival."""
        return self.samples[0].number


class DecodeBatch:
    """What each decoding sequence feeds to the next step: rows 0 to len - 1, in no set order.

    Args:
        max_pages: of a sequence.
    """

    def __init__(self, max_rows: int, max_pages: int, page_size: int) -> None:
        self.ids = np.zeros(max_rows, dtype=np.int32)
        self.positions = np.zeros(max_rows, dtype=np.int32)
        self.page_table = np.zeros((max_rows, max_pages), dtype=np.int32)
        self.sequences: list[Sequence] = []
        self.requests: list[Request] = []  # each row's only sample
        self.keys: list[int] = []  # and its number
        self._page_size = page_size

    def __len__(self) -> int:
        return len(self.sequences)

    def append(self, sequence: Sequence) -> None:
        """A row for a sequence that is computed: its next token is still to be chosen."""
        row = sequence.row = len(self.sequences)
        (request,) = sequence.samples
        self.positions[row] = sequence.computed - 1
        self.page_table[row, : len(sequence.pages)] = sequence.pages
        self.sequences.append(sequence)
        self.requests.append(request)
        self.keys.append(request.number)

    def remove(self, sequence: Sequence) -> None:
        """The last row takes its place."""
        row, last = sequence.row, len(self.sequences) - 1
        sequence.computed = int(self.positions[row])
        sequence.row = -1
        if row < last:
            self.sequences[row] = self.sequences[last]
            self.requests[row] = self.requests[last]
            self.keys[row] = self.keys[last]
            self.sequences[row].row = row
            for array in (self.ids, self.positions, self.page_table):
                array[row] = array[last]
        self.sequences.pop()
        self.requests.pop()
        self.keys.pop()

    def advance(self, tokens: list[int]) -> None:
        """The token chosen for each row is what it feeds next."""
        count = len(self.sequences)
        self.ids[:count] = tokens
        self.positions[:count] += 1

    def at_border(self) -> list[Sequence]:
        """Those whose next position is the first of a page."""
        rows = np.flatnonzero(self.positions[: len(self.sequences)] % self._page_size == 0)
        return [self.sequences[row] for row in rows]

    def set_last_page(self, sequence: Sequence) -> None:
        place = len(sequence.pages) - 1
        self.page_table[sequence.row, place] = sequence.pages[place]

    def clear(self) -> None:
        for sequence in self.sequences:
            sequence.row = -1
        self.sequences.clear()
        self.requests.clear()
        self.keys.clear()

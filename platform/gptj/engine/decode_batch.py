"""Sequences, and the decode batch as arrays that persist between steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gptj.engine.events import TokenEvent
from gptj.engine.request import Request
from gptj.engine.runners.base import Ints
from gptj.engine.runners.lora import NONE


@dataclass(eq=False)
class Sequence:
    """Tokens and their pages. All samples of a prompt share one sequence while it is prefilled."""

    samples: list[Request]  # with the same tokens; a single one once decoding
    pages: list[int]
    computed: int  # cached positions; while decoding, see its row's position
    registered: int  # full pages that are in the prefix cache
    spare: list[int] = field(default_factory=list)  # pages reserved for its beams
    scores: dict[Request, list[TokenEvent]] = field(default_factory=dict)  # prompt logprobs so far
    row: int = -1  # of the decode batch; -1 during prefill

    @property
    def tokens(self) -> list[int]:
        return self.samples[0].tokens

    @property
    def number(self) -> int:
        """Its index in order of arrival."""
        return self.samples[0].number


class DecodeBatch:
    """The next step's input of each decoding sequence: rows 0 to len - 1, in arbitrary order.

    If a step is launched before the last one's tokens are known, this is still the last one's
    input until they are.

    Args:
        max_pages: most pages of a sequence.
    """

    def __init__(self, max_rows: int, max_pages: int, page_size: int) -> None:
        self.ids = np.zeros(max_rows, dtype=np.int32)
        self.positions = np.zeros(max_rows, dtype=np.int32)
        self.page_table = np.zeros((max_rows, max_pages), dtype=np.int32)
        self.adapters = np.full(max_rows, NONE, dtype=np.int32)  # slots
        # Of each row, its row of the launched step's logits.
        self.launched_rows = np.zeros(max_rows, dtype=np.int32)
        self.sequences: list[Sequence] = []
        self.requests: list[Request] = []  # of each row
        self.keys: list[int] = []  # request numbers, per row
        self._page_size = page_size

    def __len__(self) -> int:
        return len(self.sequences)

    def append(self, sequence: Sequence) -> None:
        """Add a prefilled sequence whose next token has not been sampled yet."""
        row = sequence.row = len(self.sequences)
        (request,) = sequence.samples
        self.positions[row] = sequence.computed - 1
        self.adapters[row] = request.slot
        self.page_table[row, : len(sequence.pages)] = sequence.pages
        self.sequences.append(sequence)
        self.requests.append(request)
        self.keys.append(request.number)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence; the last row takes its place."""
        row, last = sequence.row, len(self.sequences) - 1
        sequence.computed = int(self.positions[row])
        sequence.row = -1
        if row < last:
            self.sequences[row] = self.sequences[last]
            self.requests[row] = self.requests[last]
            self.keys[row] = self.keys[last]
            self.sequences[row].row = row
            for array in (
                self.ids,
                self.positions,
                self.page_table,
                self.adapters,
                self.launched_rows,
            ):
                array[row] = array[last]
        self.sequences.pop()
        self.requests.pop()
        self.keys.pop()

    def advance(self, tokens: list[int], counts: list[int]) -> None:
        """Feed each row's last sampled token next; `counts` tokens were sampled per row."""
        count = len(self.sequences)
        self.ids[:count] = tokens
        self.positions[:count] += np.array(counts, dtype=np.int32)

    def at_border(self) -> list[Sequence]:
        """Sequences whose next position starts a page."""
        rows = np.flatnonzero(self.positions[: len(self.sequences)] % self._page_size == 0)
        return [self.sequences[row] for row in rows]

    def continuing(self) -> Ints:
        """Rows whose requests do not reach their greatest length with their next token."""
        return np.array(
            [
                row
                for row, request in enumerate(self.requests)
                if len(request.tokens) + 1 < request.max_length
            ],
            dtype=np.int32,
        )

    def note_launched(self, rows: Ints) -> None:
        """A step was launched with these rows, in this order."""
        self.launched_rows[rows] = np.arange(len(rows), dtype=np.int32)

    def set_last_page(self, sequence: Sequence) -> None:
        place = len(sequence.pages) - 1
        self.page_table[sequence.row, place] = sequence.pages[place]

    def clear(self) -> None:
        for sequence in self.sequences:
            sequence.row = -1
        self.sequences.clear()
        self.requests.clear()
        self.keys.clear()

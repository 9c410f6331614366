"""Pack documents into rows of tokens, window by window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from gptj.data.arrays import Array
from gptj.data.documents import Documents, Mask
from gptj.data.examples import Ids

Packing = Literal["best_fit", "concatenate", "none"]
WINDOW = 2**22  # tokens that are packed together


class Packed(NamedTuple):
    """Rows: row i is ids[row_ends[i]:row_ends[i + 1]]; likewise for documents."""

    ids: Ids
    row_ends: Array
    document_ends: Array
    learned: Mask | None  # None: all tokens
    cut: int = 0  # documents that lost tokens

    @classmethod
    def joined(cls, parts: Sequence[Packed]) -> Packed:
        return cls(
            np.concatenate([np.empty(0, np.int32), *(part.ids for part in parts)]),
            _joined_ends([part.row_ends for part in parts]),
            _joined_ends([part.document_ends for part in parts]),
            _joined_masks(parts),
            sum(part.cut for part in parts),
        )


def pack(windows: Iterable[Documents], capacity: int, packing: Packing) -> Iterator[Packed]:
    """Pack documents into rows of at most `capacity` tokens, holding one window in memory.

    Documents of a window may share rows. A text longer than a row is split into separate documents.
    A longer document with a prompt (tokens that are not learned) loses the beginning of the prompt,
    of which half a row is kept, then its own end. Documents with nothing to learn beyond their
    first token are dropped.

    With concatenate, the stream is cut wherever a row is full. Rows with nothing to learn beyond
    their first token, such as the middle of a long prompt or a last row of one token, are dropped.
    """
    if packing == "concatenate":
        yield from _concatenated(windows, capacity)
        return
    for window in windows:
        yield _packed(window, capacity, packing)


def _concatenated(windows: Iterable[Documents], capacity: int) -> Iterator[Packed]:
    ids: Ids = np.empty(0, np.int32)
    learned: Mask | None = None
    for window in windows:
        if learned is not None or window.learned is not None:
            learned = np.concatenate([_mask(ids, learned), _mask(window.ids, window.learned)])
        ids = np.concatenate([ids, window.ids])
        full = len(ids) - len(ids) % capacity
        yield _cut(ids[:full], None if learned is None else learned[:full], capacity)
        ids, learned = ids[full:], None if learned is None else learned[full:]
    if len(ids) > 1:
        yield _cut(ids, learned, capacity)


def _cut(ids: Ids, learned: Mask | None, capacity: int) -> Packed:
    """Rows of one document each; the last may be shorter."""
    ends = np.array([*range(0, len(ids), capacity), len(ids)], dtype=np.int64)
    if learned is None:
        return Packed(ids, ends, ends, None)
    rows = [(a, b) for a, b in pairwise(ends.tolist()) if learned[a + 1 : b].any()]
    ends = np.cumsum([0, *(b - a for a, b in rows)])
    ids = np.concatenate([np.empty(0, np.int32), *(ids[a:b] for a, b in rows)])
    learned = np.concatenate([np.empty(0, bool), *(learned[a:b] for a, b in rows)])
    return Packed(ids, ends, ends, learned)


def _mask(ids: Ids, learned: Mask | None) -> Mask:
    return np.ones(len(ids), bool) if learned is None else learned


def _packed(documents: Documents, capacity: int, packing: Packing) -> Packed:
    starts, ends, cut = _pieces(documents, capacity)
    lengths = ends - starts
    if packing == "best_fit":
        rows = best_fit(lengths, capacity)
    else:
        rows = [[number] for number in range(len(lengths))]
    order = np.array([number for row in rows for number in row], dtype=np.int64)
    pieces = list(zip(starts[order].tolist(), ends[order].tolist(), strict=True))
    document_ends = np.cumsum([0, *lengths[order]])
    last = np.cumsum([0, *map(len, rows)])  # of each row, in the order of documents
    learned = documents.learned
    return Packed(
        np.concatenate([np.empty(0, np.int32), *(documents.ids[a:b] for a, b in pieces)]),
        document_ends[last],
        document_ends,
        None
        if learned is None
        else np.concatenate([np.empty(0, bool), *(learned[a:b] for a, b in pieces)]),
        cut,
    )


def _pieces(documents: Documents, capacity: int) -> tuple[Array, Array, int]:
    """Starts and ends of the learnable parts that fit a row, and the number of cut documents."""
    starts: list[int] = []
    ends: list[int] = []
    cut = 0
    bounds = documents.ends.tolist()
    for start, end in pairwise(bounds):
        if documents.learned is None:
            for first in range(start, end, capacity):
                last = min(first + capacity, end)
                if last - first > 1:
                    starts.append(first)
                    ends.append(last)
            continue
        learned = documents.learned[start:end]
        if end - start > capacity:
            cut += 1
            prompt = int(learned.argmax())
            kept = min(prompt, max(capacity - (end - start - prompt), capacity // 2))
            start += prompt - kept
            end = min(end, start + capacity)
        if documents.learned[start + 1 : end].any():
            starts.append(start)
            ends.append(end)
    return np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64), cut


def _joined_ends(parts: Sequence[Array]) -> Array:
    lengths = [np.diff(part) for part in parts]
    return np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))


def _joined_masks(parts: Sequence[Packed]) -> Mask | None:
    if all(part.learned is None for part in parts):
        return None
    return np.concatenate([np.empty(0, bool), *(_mask(p.ids, p.learned) for p in parts)])


def best_fit(lengths: Sequence[int] | Array, capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens, by best fit decreasing.

    Places each document, longest first, into the fullest row with room for it, as in Ding et al.,
    "Fewer Truncations Improve Language Modeling", 2024, https://arxiv.org/abs/2404.10830. Rows and
    their documents are sorted longest first; ties keep their order.

    Raises:
        ValueError: if a length is not in [1, capacity].
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and not 1 <= sizes.min() <= sizes.max() <= capacity:
        raise ValueError(f"lengths must be in [1, {capacity}], got {sizes.min()} to {sizes.max()}")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by remaining room
    rooms = 0  # bit r is set if with_room[r] is not empty; the best fit is the lowest large enough
    for number in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[number])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(number)
        with_room[room - size].append(row)
        rooms |= 1 << (room - size)
    return rows

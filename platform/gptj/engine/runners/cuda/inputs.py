"""Copies a StepBatch to the device as Inputs, in one transfer. Shapes as in operations.py."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptj.engine.runners.base import Ints, StepBatch
from gptj.engine.runners.cuda.operations import MAX_GROUP, Chunk, Inputs
from gptj.engine.runners.lora import NONE

Vector = TypeVar("Vector", Tensor, Ints)

DRAFTED = 16  # most tokens of a sequence that are computed as decode rows
ALONE = (0, 0)  # Inputs.groups_R2 of a sequence without a group
MIN_SHARED_PAGES = 4  # pages that are worth a group: each of its tokens has one more split
ALIGNED = 4  # int32s: Triton specializes kernels for 16-byte alignment


class Layout:
    """The layout of a step's arrays within one vector."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        self._parts: list[tuple[slice, tuple[int, ...]]] = []
        self.size = 0
        for shape in shapes:
            length = math.prod(shape)
            self._parts.append((slice(self.size, self.size + length), shape))
            self.size += -(-length // ALIGNED) * ALIGNED

    def views(self, vector: Vector) -> list[Vector]:
        return [vector[part].reshape(shape) for part, shape in self._parts]


class InputsMaker:
    """Makes Inputs; padding points to the scratch page, which is never read.

    Args:
        max_pages: most pages of a sequence: the width of page tables.
        scratch: the page that padding writes to.
        max_decodes: the largest decode batch with static inputs, for CUDA graphs.
        tile: see Operations.
    """

    def __init__(
        self,
        device: torch.device,
        max_pages: int,
        page_size: int,
        scratch: int,
        max_decodes: int,
        tile: int,
    ) -> None:
        self._device = device
        self._tile = tile
        self._max_pages = max_pages
        self._page_size = page_size
        self._scratch = scratch
        # Graphs always read their inputs here.
        size = self._decode_layout(max_decodes).size
        self._static = torch.zeros(size, dtype=torch.int32, device=device)

    def static(self, size: int) -> Inputs:
        """A decode step's inputs for that size, always at the same address."""
        views = self._decode_layout(size).views(self._static)
        ids_T, positions_T, slots_T, adapters_T, groups_R2, page_table_RP = views
        return Inputs(
            ids_T, positions_T, slots_T, page_table_RP, groups_R2, size, adapters_T=adapters_T
        )

    def fill(self, batch: StepBatch, size: int) -> None:
        """Copy a decode batch into `static(size)`, padded with the scratch page."""
        count = len(batch.ids_T)
        layout = self._decode_layout(size)
        vector = self._vector(layout.size)
        ids, positions, slots, adapters, groups, tables = layout.views(vector.numpy())
        ids[count:], positions[count:] = 0, 0
        slots[count:] = self._scratch * self._page_size
        adapters[count:] = NONE
        groups[count:] = ALONE
        tables[count:] = self._scratch
        ids[:count] = batch.ids_T
        positions[:count] = batch.positions_T
        adapters[:count] = NONE if batch.adapters_R is None else batch.adapters_R
        slots[:count] = self._slots(batch, np.arange(count))
        groups[:count] = groups_of(batch.page_table_RP, batch.positions_T // self._page_size)
        self._fill_tables(tables[:count], batch)
        self._static[: layout.size].copy_(vector, non_blocking=True)
        if batch.device_ids is not None:
            self._static[: len(batch.device_ids)].copy_(batch.device_ids)

    def of(self, batch: StepBatch) -> Inputs:
        """The inputs of any batch."""
        lengths = np.diff(batch.query_start_loc)
        rows, tokens = len(lengths), len(batch.ids_T)
        num_decodes = rows if (lengths == 1).all() else int((lengths > 1).argmax())
        chunks = tuple(
            Chunk(row, start, end - start, int(batch.positions_T[start]), batch.slot(row))
            for row, (start, end) in enumerate(pairwise(batch.query_start_loc.tolist()))
            if row >= num_decodes
        )
        tiles = [tile for chunk in chunks for tile in self._tiles(chunk)]
        layout = Layout(
            (tokens,),
            (tokens,),
            (tokens,),
            (tokens,),
            (rows, self._max_pages),
            (rows, 2),
            (len(tiles), 4),
            batch.logits_indices.shape,
        )
        vector = self._vector(layout.size)
        parts = layout.views(vector.numpy())
        parts[0][:] = batch.ids_T
        parts[1][:] = batch.positions_T
        parts[2][:] = self._slots(batch, np.repeat(np.arange(rows), lengths))
        parts[3][:] = batch.slots_T
        self._fill_tables(parts[4], batch)
        parts[5][:num_decodes] = groups_of(
            batch.page_table_RP[:num_decodes], batch.positions_T[:num_decodes] // self._page_size
        )
        parts[5][num_decodes:] = ALONE
        if tiles:
            parts[6][:] = tiles
        parts[7][:] = batch.logits_indices
        arrived = layout.views(vector.to(self._device, non_blocking=True))
        ids_T, positions_T, slots_T, adapters_T, page_table_RP, groups_R2, *others = arrived
        tiles_N4, logits_indices_W = others
        if batch.device_ids is not None:
            ids_T[: len(batch.device_ids)].copy_(batch.device_ids)
        return Inputs(
            ids_T,
            positions_T,
            slots_T,
            page_table_RP,
            groups_R2,
            num_decodes,
            chunks,
            tiles_N4 if tiles else None,
            adapters_T,
            logits_indices_W,
        )

    def _decode_layout(self, size: int) -> Layout:
        return Layout((size,), (size,), (size,), (size,), (size, 2), (size, self._max_pages))

    def _vector(self, size: int) -> Tensor:
        # PyTorch does not reuse pinned memory before the copy from it has completed.
        return torch.empty(size, dtype=torch.int32, pin_memory=self._device.type == "cuda")

    def _slots(self, batch: StepBatch, rows_T: npt.NDArray[np.integer]) -> Ints:
        pages = batch.page_table_RP[rows_T, batch.positions_T // self._page_size]
        slots: Ints = pages * self._page_size + batch.positions_T % self._page_size
        return slots

    def _fill_tables(self, page_table_RP: Ints, batch: StepBatch) -> None:
        used = min(batch.page_table_RP.shape[1], self._max_pages)
        page_table_RP[:, :used] = batch.page_table_RP[:, :used]
        page_table_RP[:, used:] = self._scratch

    def _tiles(self, chunk: Chunk) -> list[tuple[int, int, int, int]]:
        return [
            (
                chunk.row,
                chunk.start + first,
                min(self._tile, chunk.tokens - first),
                chunk.position + first,
            )
            for first in range(0, chunk.tokens, self._tile)
        ]


def groups_of(page_table_RP: Ints, full_R: Ints) -> Ints:
    """Inputs.groups_R2 (R, 2) of single tokens: beams, samples of a prompt, and common prefixes.

    Args:
        full_R: pages of each sequence that its token sees wholly.
    """
    rows = len(page_table_RP)
    groups = np.empty((rows, 2), np.int32)
    groups[:] = ALONE
    equal = page_table_RP[1:] == page_table_RP[:-1]
    if not equal[:, :MIN_SHARED_PAGES].all(axis=1).any():
        return groups
    # Pages that a sequence shares with the one before it.
    common = np.where(equal.all(axis=1), equal.shape[1], equal.argmin(axis=1))
    common = np.minimum(common, np.minimum(full_R[1:], full_R[:-1])).tolist()
    first = 0
    while first < rows:
        count, shared = 1, common[first] if first < rows - 1 else 0
        while first + count < rows and count < MAX_GROUP:
            fewer = min(shared, common[first + count - 1])
            # A sequence with much less in common would leave the others less to share.
            if fewer < max(MIN_SHARED_PAGES, shared // 2):
                break
            count, shared = count + 1, fewer
        if count > 1:
            groups[first : first + count] = (-1, shared)
            groups[first, 0] = count - 1
        first += count
    return groups


def with_drafts_as_rows(batch: StepBatch) -> StepBatch:
    """Make each token of a draft a decode row with its sequence's pages.

    Such a step replays a graph, and computes its tokens as if decoded one by one. They still attend
    to each other, since a layer caches all keys and values before its attention.
    """
    lengths = np.diff(batch.query_start_loc)
    count = len(batch.logits_indices)
    (gaps,) = np.nonzero(batch.logits_indices != np.arange(count))
    with_logits = int(gaps[0]) if len(gaps) else count  # tokens at the start that all have logits
    short = (lengths <= DRAFTED) & (batch.query_start_loc[1:] <= with_logits)
    rows = len(short) if short.all() else int(short.argmin())
    if (lengths[:rows] == 1).all():
        return batch
    tokens = int(batch.query_start_loc[rows])
    starts = np.arange(tokens, dtype=np.int32)
    tables = np.repeat(batch.page_table_RP[:rows], lengths[:rows], axis=0)
    return replace(
        batch,
        query_start_loc=np.concatenate((starts, batch.query_start_loc[rows:])),
        page_table_RP=np.concatenate((tables, batch.page_table_RP[rows:])),
        adapters_R=_repeated(batch.adapters_R, lengths[:rows]),
    )


def _repeated(adapters_R: Ints | None, lengths: Ints) -> Ints | None:
    """Repeat the first sequences' slots for each of their tokens."""
    if adapters_R is None:
        return None
    rows = len(lengths)
    return np.concatenate((np.repeat(adapters_R[:rows], lengths), adapters_R[rows:]))

"""A run's batches, collated by a thread one step ahead of the computation.

A step's batches depend only on its number (gptj.data.batches), so a resumed run sees the same
ones. Collating copies from memory-mapped ids.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from gptj.data.batches import BatchOrder, share
from gptj.data.examples import count_pairs
from gptj.training.tasks import Data


class StepBatches(NamedTuple):
    """One rank's share of an optimizer step."""

    batches: Sequence[dict[str, Tensor]]  # micro-batches
    counted: int  # leading batches that count; any others only keep in step with other ranks
    items: int  # the loss averages over these
    tokens: int  # without padding
    pairs: int  # of tokens of a document: the sum of the documents' squared lengths
    room: int  # tokens including padding


def to_device(batch: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """A batch on a device, without waiting for it.

    The attention mask stays here: the model asks it whether there is padding, and would wait for
    the device's answer.
    """
    return {
        name: tensor if name == "attention_mask" else tensor.to(device, non_blocking=True)
        for name, tensor in batch.items()
    }


class Loader:
    """This rank's batches, step by step; a context manager.

    Args:
        pinned: whether they are copied to a GPU, from pinned memory, without waiting.
        first: the first step, counted from 0.
        last: the step to stop before.
    """

    def __init__(
        self,
        data: Data,
        order: BatchOrder,
        *,
        rank: int,
        world_size: int,
        micro_batch: int,
        first: int,
        last: int,
        pinned: bool = False,
    ) -> None:
        self._data = data
        self._order = order
        self._rank = rank
        self._world_size = world_size
        self._micro_batch = micro_batch
        self._step = first
        self._last = last
        self._pinned = pinned
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._next: Future[StepBatches] | None = None

    def __enter__(self) -> Loader:
        self._make_ahead()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def next(self) -> tuple[StepBatches, float]:
        """The next step's batches, and the seconds spent waiting for them.

        Raises whatever collating raised.
        """
        started = time.monotonic()
        assert self._next is not None, "there are no more steps"
        found = self._next.result()
        waited = time.monotonic() - started
        self._step += 1
        self._make_ahead()
        return found, waited

    def _make_ahead(self) -> None:
        self._next = None
        if self._step < self._last:
            self._next = self._thread.submit(self._make, self._step)

    def _make(self, step: int) -> StepBatches:
        data, indices = self._data, self._order.indices(step)
        parts = share(indices, self._rank, self._world_size, self._micro_batch)
        batches = [data.collate([data[index] for index in part or indices[:1]]) for part in parts]
        if self._pinned:
            batches = [{name: each.pin_memory() for name, each in one.items()} for one in batches]
        counted = [batch for part, batch in zip(parts, batches, strict=True) if part]
        return StepBatches(
            batches,
            len(counted),
            sum(data.count_items(batch) for batch in counted),
            sum(data.count_tokens(batch) for batch in counted),
            sum(count_pairs(batch) for batch in counted),
            sum(batch["input_ids"].numel() for batch in batches),
        )

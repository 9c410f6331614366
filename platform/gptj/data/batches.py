"""Which examples make up which batch: an optimizer step in, indices out; no state but the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np


@dataclass(frozen=True)
class BatchOrder:
    """A shuffled order without end: every epoch has each example once, in an order of its own.

    It depends on nothing but these numbers, so that a run that resumes at a step, or with another
    number of workers, goes on with the examples that it would have had.
    """

    examples: int  # in the data set
    batch: int  # examples of an optimizer step, over all ranks and micro-batches
    seed: int

    def __post_init__(self) -> None:
        for name in ("examples", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")

    def indices(self, step: int) -> list[int]:
        """The examples of a step (from 0 on); a batch may begin in one epoch and end in another."""
        if step < 0:
            raise ValueError(f"step must be 0 or more, got {step}")
        chosen: list[int] = []
        position = step * self.batch
        while len(chosen) < self.batch:
            epoch, start = divmod(position + len(chosen), self.examples)
            order = _permutation(self.examples, self.seed, epoch)
            chosen += order[start : start + self.batch - len(chosen)].tolist()
        return chosen


def share(indices: Sequence[int], rank: int, world_size: int, micro_batch: int) -> list[list[int]]:
    """This rank's part of a global batch, in micro-batches; every rank gets equally many.

    Raises ValueError if the batch does not divide into `world_size` times `micro_batch` examples.
    """
    if world_size < 1 or not 0 <= rank < world_size or micro_batch < 1:
        raise ValueError(
            f"rank must be in [0, world_size) and micro_batch 1 or more, got rank={rank}, "
            f"world_size={world_size}, micro_batch={micro_batch}"
        )
    if not indices or len(indices) % (world_size * micro_batch):
        raise ValueError(
            f"a batch of {len(indices)} examples does not divide into micro-batches of "
            f"{micro_batch} on {world_size} ranks; remedy: a multiple of {world_size * micro_batch}"
        )
    size = len(indices) // world_size
    mine = list(indices[rank * size : (rank + 1) * size])
    return [mine[start : start + micro_batch] for start in range(0, size, micro_batch)]


@lru_cache(maxsize=2)  # a batch spans two epochs at most, unless the data set is tiny
def _permutation(examples: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    # PCG64 and permutation() are the same on every machine and in every numpy since 1.17.
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(examples)

"""The examples of each batch: an optimizer step in, indices out; stateless."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np


@dataclass(frozen=True)
class BatchOrder:
    """An endless shuffled order: every epoch has each example once, reshuffled.

    It depends only on these fields, so a run that resumes at a step, even with another number of
    workers, continues with the same examples.
    """

    examples: int  # in the data set
    batch: int  # examples per optimizer step, over all ranks and micro-batches
    seed: int

    def __post_init__(self) -> None:
        for name in ("examples", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")

    def indices(self, step: int) -> list[int]:
        """The examples of a step, counted from 0; a batch may span epochs."""
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
    """This rank's part of a global batch, in micro-batches of at most `micro_batch` examples.

    Every rank gets equally many micro-batches. If the batch does not divide evenly, the first ranks
    and micro-batches have one example more, and a rank's last micro-batch may be empty.

    Raises ValueError if there are fewer examples than ranks.
    """
    if world_size < 1 or not 0 <= rank < world_size or micro_batch < 1:
        raise ValueError(
            f"rank must be in [0, world_size) and micro_batch 1 or more, got rank={rank}, "
            f"world_size={world_size}, micro_batch={micro_batch}"
        )
    if len(indices) < world_size:
        raise ValueError(f"a batch of {len(indices)} examples is too small for {world_size} ranks")
    mine = _parts(indices, world_size)[rank]
    return _parts(mine, micro_batches(len(indices), world_size, micro_batch))


def micro_batches(batch: int, world_size: int, micro_batch: int) -> int:
    """Number of micro-batches of at most `micro_batch` examples per rank."""
    return -(-batch // (world_size * micro_batch))


def _parts(indices: Sequence[int], count: int) -> list[list[int]]:
    """Split into `count` consecutive parts whose sizes differ by at most one."""
    size, longer = divmod(len(indices), count)
    starts = [number * size + min(number, longer) for number in range(count + 1)]
    return [list(indices[start:end]) for start, end in itertools.pairwise(starts)]


@lru_cache(maxsize=2)  # a batch spans at most two epochs, unless the data set is tiny
def _permutation(examples: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    # PCG64 and permutation() give the same results on every machine since numpy 1.17.
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(examples)

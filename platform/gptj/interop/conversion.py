"""Stored tensors in, their values in a dtype out, one at a time, with the progress in the log."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gptj.interop.tensors import StoredTensor
from gptj.weights import TensorSpec

PROGRESS_SECONDS = 5

logger = logging.getLogger(__name__)


def specs_of(tensors: Iterable[StoredTensor], dtype: torch.dtype | None) -> list[TensorSpec]:
    """What is to be written: in one dtype, or each in its own (None)."""
    return [TensorSpec(t.name, t.shape, dtype or t.dtype) for t in tensors]


def common_dtype(specs: Iterable[TensorSpec]) -> torch.dtype:
    """The dtype that most numbers have, which a configuration names."""
    numbers: Counter[torch.dtype] = Counter()
    for spec in specs:
        numbers[spec.dtype] += spec.size // spec.dtype.itemsize
    return numbers.most_common(1)[0][0]


def read_all(tensors: Sequence[StoredTensor], specs: Sequence[TensorSpec]) -> Iterator[Tensor]:
    """The values of each tensor, contiguous, in the dtype of its spec.

    A tensor is read when it is asked for, and not kept.
    """
    progress = _Progress(specs)
    for tensor, spec in zip(tensors, specs, strict=True):
        values = _read(tensor, spec)
        progress.count(spec)
        yield values
        del values  # before the next one is read


def _read(tensor: StoredTensor, spec: TensorSpec) -> Tensor:
    values = tensor.load(spec.dtype)
    assert tuple(values.shape) == spec.shape, f"{spec.name}: {tuple(values.shape)}"
    return values.contiguous()


class _Progress:
    """Logs tensors and bytes that are done, and the time that is left at the present rate."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._tensors, self._bytes = len(specs), sum(spec.size for spec in specs)
        self._done = self._done_bytes = 0
        self._started = self._last = time.monotonic()

    def count(self, spec: TensorSpec) -> None:
        self._done += 1
        self._done_bytes += spec.size
        now = time.monotonic()
        if now - self._last < PROGRESS_SECONDS and self._done < self._tensors:
            return
        self._last = now
        passed = now - self._started
        left = passed * (self._bytes - self._done_bytes) / max(1, self._done_bytes)
        logger.info(
            "tensor %d of %d, %.2f of %.2f GB, %.0f s, %.0f s left",
            self._done,
            self._tensors,
            self._done_bytes / 1e9,
            self._bytes / 1e9,
            passed,
            left,
        )

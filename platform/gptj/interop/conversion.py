"""Stored tensors in, their values in a dtype out, one at a time, with the progress in the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gptj.interop.progress import Progress
from gptj.interop.tensors import StoredTensor
from gptj.weights import TensorSpec


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
    progress, done = Progress(sum(spec.size for spec in specs)), 0
    for number, (tensor, spec) in enumerate(zip(tensors, specs, strict=True), 1):
        values = _read(tensor, spec)
        done += spec.size
        progress.reach(done, f"tensor {number} of {len(specs)}")
        yield values
        del values  # before the next one is read


def _read(tensor: StoredTensor, spec: TensorSpec) -> Tensor:
    values = tensor.load(spec.dtype)
    assert tuple(values.shape) == spec.shape, f"{spec.name}: {tuple(values.shape)}"
    return values.contiguous()

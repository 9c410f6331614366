"""Convert stored tensors to a dtype, one at a time, logging the progress."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gptj.checkpoints.weights import TensorSpec, one_dtype
from gptj.config import GPTJConfig
from gptj.interop.progress import Progress
from gptj.interop.tensors import StoredTensor

logger = logging.getLogger(__name__)


def specs_of(
    tensors: Sequence[StoredTensor], dtype: torch.dtype | None, config: GPTJConfig
) -> list[TensorSpec]:
    """Specs of the tensors to write, all in one dtype; also sets the configuration's dtype.

    Args:
        dtype: None: as stored; if mixed, see gptj.checkpoints.weights.one_dtype.
    """
    numbers: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        numbers[tensor.dtype] += math.prod(tensor.shape)
    config.dtype = dtype or one_dtype(numbers, config.dtype)
    if dtype is None and len(numbers) > 1:
        logger.warning(
            "weights are stored as %s: converting all to %s",
            ", ".join(sorted(map(str, numbers))),
            config.dtype,
        )
    return [TensorSpec(tensor.name, tensor.shape, config.dtype) for tensor in tensors]


def read_all(tensors: Sequence[StoredTensor], specs: Sequence[TensorSpec]) -> Iterator[Tensor]:
    """The values of each tensor, contiguous, in the dtype of its spec.

    Each tensor is read lazily and not kept.
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

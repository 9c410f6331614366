"""Copies between the host and the device."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(numbers: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy numbers to the device, without synchronizing a GPU.

    PyTorch does not reuse pinned memory before the copy from it has completed.
    """
    tensor = torch.from_numpy(numbers)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor


class HostCopy:
    """Tensors of one device on their way to the host."""

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            # Later work on the stream does not delay them.
            self._tensors = [_pinned(tensor) for tensor in tensors]
            self._event = torch.cuda.current_stream(tensors[0].device).record_event()
        else:
            self._tensors = list(tensors)

    def numbers(self) -> list[npt.NDArray[Any]]:
        """Wait until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._tensors]


def _pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, complete once the stream gets there."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)

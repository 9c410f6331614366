"""Copies from the host to the device."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def sent(numbers: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy numbers to the device, without synchronizing a GPU.

    PyTorch does not reuse pinned memory before the copy from it has completed.
    """
    tensor = torch.from_numpy(numbers)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor

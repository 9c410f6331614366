"""Numbers of the host on their way to the device."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def sent(numbers: npt.NDArray[Any], device: torch.device) -> Tensor:
    """On the device; on a GPU without waiting for what is still computed there.

    PyTorch keeps pinned memory from its next user until the copy from it has ended.
    """
    tensor = torch.from_numpy(numbers)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor

"""Triton's interpreter with PyTorch's conversions to e4m3.

Its own give half of a number that is rounded up to the next power of two, and truncate numbers
below the smallest normal one (Triton 3.7).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

_original = interpreter._convert_float


def repair() -> None:
    """Without effect where kernels are compiled."""
    if knobs.runtime.interpret:
        interpreter._convert_float = _convert_float


def _convert_float(numbers: Any, given: Any, wanted: Any, rounding: Any) -> Any:
    if given == tl.float32 and wanted == tl.float8e4nv:
        converted = torch.from_numpy(np.array(numbers)).to(torch.float8_e4m3fn)
        return converted.view(torch.uint8).numpy()
    return _original(numbers, given, wanted, rounding)

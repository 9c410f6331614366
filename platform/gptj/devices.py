"""Whether this build of PyTorch can compute on a GPU, said before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([a-z]?)")


class UnsupportedDeviceError(RuntimeError):
    """PyTorch has no code for this GPU; the message says what would help."""


def check_device(device: torch.device | str) -> None:
    """Refuse a GPU that PyTorch would warn of, and fail on with the first kernel.

    Raises:
        UnsupportedDeviceError: for a V100, say, with PyTorch for CUDA 13.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return
    properties = torch.cuda.get_device_properties(device)
    architectures = torch.cuda.get_arch_list()
    if not runs_on((properties.major, properties.minor), architectures):
        raise UnsupportedDeviceError(
            f"{properties.name} has compute capability {properties.major}.{properties.minor}, and "
            f"PyTorch {torch.__version__} has code for {', '.join(architectures)} only: take a "
            f"newer GPU, or a build of PyTorch for an older CUDA (12.6 has sm_70, a V100's)"
        )


def runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether code for these architectures runs on a GPU of this compute capability.

    Machine code (sm_86) runs from its own version on within the major one, PTX (compute_86) on any
    later GPU, and code with a letter on its own version alone.
    https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#application-compatibility
    """
    for name in architectures:
        found = ARCHITECTURE.fullmatch(name)
        if found is None:
            continue
        kind, letter = found[1], found[4]
        version = int(found[2]), int(found[3])
        if letter:
            fits = capability == version
        elif kind == "sm":
            fits = capability[0] == version[0] and capability[1] >= version[1]
        else:
            fits = capability >= version
        if fits:
            return True
    return False

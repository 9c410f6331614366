"""Check, before loading anything, that this build of PyTorch supports the GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([a-z]?)")


class UnsupportedDeviceError(RuntimeError):
    """This build of PyTorch has no kernels for the GPU; the message has the remedy."""


def check_device(device: torch.device | str) -> None:
    """Refuse a GPU that PyTorch only warns about, then fails on at the first kernel.

    Raises:
        UnsupportedDeviceError: for example, on a V100 with PyTorch for CUDA 13.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return
    properties = torch.cuda.get_device_properties(device)
    architectures = torch.cuda.get_arch_list()
    if not runs_on((properties.major, properties.minor), architectures):
        raise UnsupportedDeviceError(
            f"{properties.name} has compute capability {properties.major}.{properties.minor}, but "
            f"PyTorch {torch.__version__} only supports {', '.join(architectures)}; remedy: a "
            f"newer GPU, or a PyTorch build for an older CUDA (12.6 has sm_70, a V100's)"
        )


def cpu_computes_bf16() -> bool:
    """Whether this CPU has instructions for bf16; without them it is slower than fp32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether code for these architectures runs on a GPU of this compute capability.

    Machine code (sm_86) runs on GPUs of the same major version and an equal or later minor one, PTX
    (compute_86) on any later GPU, and code with a letter suffix only on its own version.
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

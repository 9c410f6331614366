"""The machine of a measurement: processor, memory, versions, and how fast a GPU reads."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

BYTES = 2**30  # read at a time: far larger than any cache
TIMES = 5


def description() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "triton", "ray")},
    }


def installed(package: str) -> str | None:
    """A package's version; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gpu_read_bandwidth() -> float:
    """Best bytes/s at which the GPU reads its memory, measured with a sum."""
    memory = torch.zeros(BYTES, dtype=torch.float32, device="cuda")
    best = 0.0
    for _ in range(TIMES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        memory.sum()
        end.record()
        end.synchronize()
        best = max(best, memory.nbytes / start.elapsed_time(end) * 1e3)
    return best


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    for line in names.read_text().splitlines() if names.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()

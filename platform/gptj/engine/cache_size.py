"""How large a cache of keys and values may be: a share of the device's memory, in tokens."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from gptj.config import GPTJConfig
from gptj.engine.choice import page_bytes
from gptj.engine.runner import PAGE_SIZE

CGROUP = Path("/sys/fs/cgroup")


def cache_tokens(
    config: GPTJConfig,
    *,
    share: float,
    device: torch.device,
    element_size: int,
    most: int,
) -> int:
    """Positions that fit in a share of the device's free memory, whole pages and at most `most`.

    Args:
        share: of the memory that is free now, with the weights loaded; in (0, 1).
        element_size: bytes of a number in the cache.
        most: positions that can be of any use: those of all requests that run together.

    Raises:
        ValueError: if not even one request of the model's whole context would fit.
    """
    free = free_bytes(device)
    page = page_bytes(config, element_size)
    tokens = min(int(free * share / page) * PAGE_SIZE, most)
    if tokens < min(config.n_positions, most):
        needed = -(-min(config.n_positions, most) // PAGE_SIZE) * page
        raise ValueError(
            f"cache_share={share} of {free / 1e9:.1f} GB free memory holds {tokens} tokens, fewer "
            f"than the model's context of {config.n_positions} ({needed / 1e9:.1f} GB): raise it, "
            f"state cache_tokens, or take a device with more memory"
        )
    return tokens


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses; on a CPU within this process's own limits."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # counts what the system would give up, such as cached files
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    limit = _limit_left(CGROUP)
    return available if limit is None else min(available, limit)


def _limit_left(folder: Path) -> int | None:
    """What is left of a container's memory limit; None without one."""
    limit, usage = folder / "memory.max", folder / "memory.current"
    if not limit.exists() or not usage.exists():
        return None
    text = limit.read_text().strip()
    return None if text == "max" else max(0, int(text) - int(usage.read_text()))

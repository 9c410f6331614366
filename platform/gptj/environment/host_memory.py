"""This machine's memory, or its container's (cgroup v2): the total, and what is free."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")  # in memory.stat


def total_bytes() -> int:
    """Bytes of physical memory, or of the container's limit if that is lower."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _limit()
    return physical if limit is None else min(physical, limit)


def available_bytes() -> int:
    """Bytes that programs can still take, including what the page cache would give back.

    A container's page cache counts as its usage: after a download of weights it would look full.
    """
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, usage = _limit(), CGROUP / "memory.current"
    if limit is None or not usage.exists():
        return available
    used = int(usage.read_text()) - _reclaimable()
    return min(available, max(0, limit - used))


def _limit() -> int | None:
    """The container's; None without one."""
    path = CGROUP / "memory.max"
    text = path.read_text().strip() if path.exists() else "max"
    return None if text == "max" else int(text)


def _reclaimable() -> int:
    stat = CGROUP / "memory.stat"
    if not stat.exists():
        return 0
    fields = dict(line.split() for line in stat.read_text().splitlines())
    return sum(int(fields.get(name, 0)) for name in RECLAIMABLE)

"""Finds all processes that a program has started, wherever they are, by a variable they inherit."""

from __future__ import annotations

import os
from pathlib import Path

MARK = "GPTJ_TEST_MARK"


def marked(mark: str) -> set[int]:
    """Processes whose environment has the mark."""
    wanted = f"{MARK}={mark}".encode()
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                found.add(int(process.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def network_namespaces(processes: set[int]) -> set[str]:
    return {os.readlink(f"/proc/{process}/ns/net") for process in processes}

"""Measurements at a known pace of the machine, free of other programs.

A virtual machine's host moves its cores: two virtual cores may share a physical one, or a link to
memory, and a minute later have one each. On one EPYC two threads read 33, 36 or 64 GB/s by turns,
and a step that reads every weight varied as much. So each measurement stands between two probes of
the machine's pace, and is repeated where the pace changed or other programs took the cores.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptj.engine.runners.cpu import library

READ_BYTES = 2**28  # larger than caches
MATRIX = 768  # rows and columns of a product that stays in caches
TRIES = 3  # of a probe, which takes 30 ms
TOLERANCE = 0.15  # of the pace before and after
MAX_OTHERS = 0.05  # of all cores' time
ATTEMPTS = 10
WAITS, WAIT_SECONDS = 20, 3.0  # in each, for a slow machine to become faster
TICKS = os.sysconf("SC_CLK_TCK")  # a second
BUSY = (0, 1, 2, 5, 6, 7)  # columns of /proc/stat: user, nice, system, irq, softirq, steal

Row = dict[str, Any]


@dataclass(frozen=True)
class Pace:
    read_gb_per_s: float  # 0 without AVX2, where it cannot be measured
    gflops: float  # fp32

    def is_near(self, other: Pace) -> bool:
        pairs = ((self.read_gb_per_s, other.read_gb_per_s), (self.gflops, other.gflops))
        return not any(abs(one - two) > TOLERANCE * max(one, two) for one, two in pairs)


class PaceProbe:
    """Measures how fast this many threads together read memory and multiply."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._memory = torch.empty(READ_BYTES, dtype=torch.uint8)
        self._matrix = torch.ones(MATRIX, MATRIX)
        self._product = torch.empty(MATRIX, MATRIX)
        self._kernels: ctypes.CDLL | None = None
        with suppress(library.UnsupportedError):
            self._kernels = library.load()
            self._kernels.gptj_prefer_large_pages(self._memory.data_ptr(), READ_BYTES)
        self._memory.fill_(1)

    def __call__(self) -> Pace:
        reading = self._least_seconds(self._read) if self._kernels else float("inf")
        multiplying = self._least_seconds(self._multiply)
        return Pace(READ_BYTES / reading / 1e9, 2 * MATRIX**3 / multiplying / 1e9)

    def _read(self) -> None:
        assert self._kernels is not None
        self._kernels.gptj_read(self._memory.data_ptr(), READ_BYTES, self._threads)

    def _multiply(self) -> None:
        torch.mm(self._matrix, self._matrix, out=self._product)

    @staticmethod
    def _least_seconds(work: Callable[[], None]) -> float:
        seconds = []
        for _ in range(TRIES):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return min(seconds)


def undisturbed(
    measure: Callable[[], Row],
    probe: Callable[[], Pace],
    own_processes: Iterable[int],
    least_gb_per_s: float = 0.0,
    wait: Callable[[float], None] = time.sleep,
) -> Row:
    """A row measured while the pace was steady and other programs took less than `MAX_OTHERS`.

    Args:
        own_processes: ids of those that do the work, all of whose threads belong to it.
        least_gb_per_s: measure only while memory gives at least this.

    Returns:
        The row with the pace (the lower of before and after), the share that other programs and the
        host took of the cores' time, and, after `ATTEMPTS`, what disturbed it nonetheless.
    """
    processes = tuple(own_processes)
    best: Row = {}
    for _ in range(ATTEMPTS):
        before = probe()
        for _ in range(WAITS):
            if before.read_gb_per_s >= least_gb_per_s:
                break
            wait(WAIT_SECONDS)
            before = probe()
        start, others = time.perf_counter(), _cpu_seconds_of_others(processes)
        row = measure()
        seconds = time.perf_counter() - start
        share = (_cpu_seconds_of_others(processes) - others) / seconds / (os.cpu_count() or 1)
        after = probe()
        row |= {
            "read_gb_per_s": round(min(before.read_gb_per_s, after.read_gb_per_s), 1),
            "gflops": round(min(before.gflops, after.gflops), 1),
            "others_share": round(max(0.0, share), 3),
        }
        disturbances = []
        if share > MAX_OTHERS:
            disturbances.append("other programs")
        if not before.is_near(after):
            disturbances.append("the pace changed")
        if row["read_gb_per_s"] < least_gb_per_s:
            disturbances.append("slow memory")
        if not disturbances:
            return row
        row["disturbed"] = ", ".join(disturbances)
        if not best or len(row["disturbed"]) < len(best["disturbed"]):
            best = row
    return best


def _cpu_seconds_of_others(processes: tuple[int, ...]) -> float:
    """CPU time of everything but these processes since the start, with what the host took."""
    times = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    ticks = sum(int(times[column]) for column in BUSY)
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks -= int(fields[11]) + int(fields[12])  # utime, stime
    return ticks / TICKS

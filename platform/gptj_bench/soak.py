"""A service under load for a long time: does anything grow?

    python -m gptj_bench.soak [--minutes 30] [--clients 8]

Starts gptj_bench.local_service with one replica. Clients send requests continuously, half of them
streaming, and others disconnect in the middle of a stream. Every few seconds the memory and open
files of the replica and the proxy are read; with RAY_SERVE_ENABLE_HA_PROXY=1 also those of HAProxy
and of the actor that runs it. At the end, once idle, no page of the cache may be in use, no request
lost, no more files open than after the first fifth of the time, and no process more than a tenth
(or 48 MB) larger than it was then. Otherwise exits with 1.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from gptj_bench.faults import ANSWERED, Load, Result
from gptj_bench.local_service import PROMPTS, LocalService, local_service
from gptj_local.processes import HOST

ACTORS = ("ServeReplica", "ProxyActor", "HAProxyManager")  # the last one only with HAProxy
SAMPLE_SECONDS = 2.0
WARM_SHARE = 0.2  # of the time: caches fill, threads and pools start
GROWTH, GROWTH_BYTES = 1.1, 48 * 2**20
MORE_FILES = 16  # connections come and go
PAGES_USED = re.compile(r"^ray_gptj_engine_pages_used\{.*\} (\S+)$", re.MULTILINE)
QUIET_SECONDS = 30.0  # for metrics to arrive
LEAVERS = 2  # clients that disconnect


@dataclass
class Process:
    """A process's memory and open files at each sample."""

    number: int
    memory: list[int] = field(default_factory=list)  # bytes
    files: list[int] = field(default_factory=list)

    def sample(self) -> None:
        process = psutil.Process(self.number)
        self.memory.append(process.memory_info().rss)
        self.files.append(process.num_fds())

    def ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(memory, files) after warming up, and in the last tenth: medians."""
        warm = int(len(self.memory) * WARM_SHARE)
        width = max(1, len(self.memory) // 10)
        first, last = slice(warm, warm + width), slice(-width, None)
        return (
            (statistics.median(self.memory[first]), statistics.median(self.files[first])),
            (statistics.median(self.memory[last]), statistics.median(self.files[last])),
        )


@dataclass
class Soak:
    """A run's results."""

    result: Result
    left: int  # streams abandoned by clients
    processes: dict[str, Process]
    pages_used: int | None  # at the end

    def faults(self) -> list[str]:
        """Descriptions of what grew or was lost."""
        found = []
        if self.result.lost:
            found.append(f"{self.result.lost} requests were lost: {dict(self.result.outcomes)}")
        if self.pages_used != 0:
            found.append(f"{self.pages_used} pages of the cache are in use without requests")
        for name, process in self.processes.items():
            (memory, files), (memory_now, files_now) = process.ends()
            if memory_now > max(GROWTH * memory, memory + GROWTH_BYTES):
                found.append(f"{name}: {_mb(memory)} became {_mb(memory_now)}")
            if files_now > files + MORE_FILES:
                found.append(f"{name}: {files:.0f} open files became {files_now:.0f}")
        return found


def watched(service: LocalService) -> dict[str, Process]:
    """The replica, and what stands between it and the clients."""
    numbers = {actor: list(service.processes(actor).values()) for actor in ACTORS}
    numbers["haproxy"] = [each.pid for each in service.haproxies()]
    return {name: Process(found[0]) for name, found in numbers.items() if found}


async def leaver(service: LocalService, ended: asyncio.Event) -> int:
    """Start streams and abandon each after some chunks; returns their number."""
    count = 0
    body = {"prompt": PROMPTS[0], "max_tokens": 200, "ignore_eos": True, "stream": True}
    headers = {"Authorization": f"Bearer {service.key}"}
    while not ended.is_set():
        async with httpx.AsyncClient(timeout=60, headers=headers) as client:
            url = f"{service.url}/v1/completions"
            async with client.stream("POST", url, json=body) as reply:
                lines = reply.aiter_lines()
                for _ in range(count % 20):
                    await anext(lines)
        count += 1
        await asyncio.sleep(0.1)
    return count


async def soak(service: LocalService, seconds: float, clients: int) -> Soak:
    """Load the service for `seconds`."""
    processes = watched(service)
    load = Load(f"{service.url}/v1/completions", clients, service.key)
    since = time.monotonic()
    await load.begin()
    ended = asyncio.Event()
    leavers = [asyncio.create_task(leaver(service, ended)) for _ in range(LEAVERS)]
    while time.monotonic() < since + seconds:
        await asyncio.sleep(SAMPLE_SECONDS)
        for process in processes.values():
            process.sample()
    ended.set()
    left = sum(await asyncio.gather(*leavers))
    await load.end()
    return Soak(load.result("none", since), left, processes, await quiet_pages(service))


async def quiet_pages(service: LocalService) -> int | None:
    """The cache's pages in use, once the metrics show no running request."""
    deadline = time.monotonic() + QUIET_SECONDS
    async with httpx.AsyncClient(timeout=30) as client:
        while True:
            reply = await client.get(f"http://{HOST}:{service.node.metrics_port}/metrics")
            values = PAGES_USED.findall(reply.text)
            used = sum(int(float(value)) for value in values) if values else None
            if used == 0 or time.monotonic() > deadline:
                return used
            await asyncio.sleep(1)


def report(found: Soak) -> str:
    lines = [
        f"{found.result.requests} requests, {found.result.outcomes[ANSWERED]} answered; "
        f"{found.left} streams left by their clients; {found.pages_used} pages in use in the end"
    ]
    for name, process in found.processes.items():
        (memory, files), (memory_now, files_now) = process.ends()
        lines.append(
            f"{name}: {_mb(memory)}, then {_mb(memory_now)}; {files:.0f} open files, then "
            f"{files_now:.0f}"
        )
    return "\n".join([*lines, *(f"FAILED: {fault}" for fault in found.faults())])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="gptj-soak-") as folder,
        local_service(Path(folder), replicas=1) as service,
    ):
        found = asyncio.run(soak(service, 60 * arguments.minutes, arguments.clients))
        print(report(found), flush=True)
    sys.exit(bool(found.faults()))


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    main()

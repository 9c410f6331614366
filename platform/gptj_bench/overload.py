"""Overload: what clients get if a service has more than it can take, and whether it stays healthy.

    python -m gptj_bench.overload [--clients 400,1200] [--seconds 30] [--patient]
    python -m gptj_bench.overload --rates 400,800 [--seconds 30] [--max-queue-seconds 0.2]

Starts gptj_bench.local_service with one replica. Each client sends one request after another on
its own connection, and retries at once after a refusal; with --patient it waits as long as
`Retry-After` says. With --rates so many requests a second arrive instead, however long earlier
ones take. --max-queue-seconds is the application's setting. Another client polls /health. Prints a
line for each number, with the CPU seconds of the proxy, the replica and this process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from gptj_bench.local_service import PROMPTS, LocalService, local_service

MAX_TOKENS = 32
HEALTH_SECONDS = 0.5  # between its requests


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Outcome:
    """The outcome for one number of clients."""

    seconds: float
    statuses: Counter[int | str] = field(default_factory=Counter)
    answered: list[float] = field(default_factory=list)  # seconds each
    refused: list[float] = field(default_factory=list)
    undeclared: int = 0  # refusals without our body, or without Retry-After
    health: Counter[int | str] = field(default_factory=Counter)
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    def note(self, reply: Reply, seconds: float) -> None:
        self.statuses[reply.status] += 1
        if reply.status == 200:
            self.answered.append(seconds)
            return
        self.refused.append(seconds)
        declared = b'"error"' in reply.body and "retry-after" in reply.headers
        self.undeclared += not declared


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> Reply:
    """Send a request on an open connection."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.split(": ", 1) for line in head[1:] if line)
    headers = {name.lower(): value for name, value in pairs}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Reply(int(head[0].split()[1]), headers, body)


def request(method: str, path: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def content(number: int) -> bytes:
    """A request; its prompt depends on its number."""
    body = {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": MAX_TOKENS, "ignore_eos": True}
    return request("POST", "/v1/completions", json.dumps(body).encode())


async def attempt(
    address: tuple[str, int], connection: Connection | None, content: bytes, outcome: Outcome
) -> tuple[Connection | None, Reply | None]:
    """One request, on an open connection if there is one.

    Returns the connection, if it is still open, and the reply, if one came.
    """
    start = time.monotonic()
    try:
        connection = connection or await asyncio.open_connection(*address)
        reply = await ask(*connection, content)
    except (OSError, asyncio.IncompleteReadError) as error:
        outcome.statuses[type(error).__name__] += 1
        return None, None
    outcome.note(reply, time.monotonic() - start)
    if reply.headers.get("connection", "").lower() == "close":
        connection[1].close()
        return None, reply
    return connection, reply


async def client(
    number: int, address: tuple[str, int], end: float, outcome: Outcome, patient: bool
) -> None:
    connection = None
    while time.monotonic() < end:
        connection, reply = await attempt(address, connection, content(number), outcome)
        if patient and reply is not None and reply.status != 200:
            await asyncio.sleep(float(reply.headers.get("retry-after", "1")))
    if connection is not None:
        connection[1].close()


async def arrivals(rate: float, address: tuple[str, int], end: float, outcome: Outcome) -> None:
    """Requests at a rate, each on a connection that is idle, or a new one."""
    idle: list[Connection] = []

    async def one(number: int) -> None:
        own = idle.pop() if idle else None
        connection, _ = await attempt(address, own, content(number), outcome)
        if connection is not None:
            idle.append(connection)

    start, number = time.monotonic(), 0
    async with asyncio.TaskGroup() as tasks:
        while (now := time.monotonic()) < end:
            while number < (now - start) * rate:
                tasks.create_task(one(number))
                number += 1
            await asyncio.sleep(0.001)
    for _, writer in idle:
        writer.close()


async def watch_health(address: tuple[str, int], end: float, outcome: Outcome) -> None:
    while time.monotonic() < end:
        try:
            reader, writer = await asyncio.open_connection(*address)
            reply = await asyncio.wait_for(ask(reader, writer, request("GET", "/health")), 5)
            outcome.health[reply.status] += 1
            writer.close()
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            outcome.health[type(error).__name__] += 1
        await asyncio.sleep(HEALTH_SECONDS)


async def measure(
    service: LocalService, number: int, seconds: float, patient: bool, at_rate: bool
) -> Outcome:
    """With `number` clients; at_rate: with as many arrivals a second."""
    parts = urlsplit(service.url)
    assert parts.hostname
    assert parts.port
    address = parts.hostname, parts.port
    outcome = Outcome(seconds)
    processes = {
        "client": [psutil.Process()],
        "proxy": [*_processes(service, "ProxyActor"), *service.haproxies()],
        "replica": _processes(service, "ServeReplica"),
    }
    before = {each: cpu_seconds(each) for found in processes.values() for each in found}
    end = time.monotonic() + seconds
    if at_rate:
        load = [arrivals(number, address, end, outcome)]
    else:
        load = [client(each, address, end, outcome, patient) for each in range(number)]
    await asyncio.gather(watch_health(address, end, outcome), *load)
    outcome.cpu_seconds = {
        # A HAProxy that a reload replaced may have ended; its successor is not counted.
        name: round(sum(cpu_seconds(each) - before[each] for each in found if each.is_running()), 1)
        for name, found in processes.items()
    }
    return outcome


def _processes(service: LocalService, actor: str) -> list[psutil.Process]:
    return [psutil.Process(each) for each in service.processes(actor).values()]


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def line(number: int, outcome: Outcome, at_rate: bool) -> str:
    rate = outcome.statuses[200] / outcome.seconds
    unit = "requests/s" if at_rate else "clients"
    return (
        f"{number:5} {unit}: {rate:6.1f} answers/s, p50 {_median(outcome.answered):.3f} s, "
        f"p99 {_percentile(outcome.answered, 0.99):.3f} s; "
        f"{len(outcome.refused)} refused, p50 {_median(outcome.refused):.3f} s, "
        f"p99 {_percentile(outcome.refused, 0.99):.3f} s, "
        f"longest {max(outcome.refused, default=0):.3f} s, "
        f"{outcome.undeclared} of them undeclared; statuses {dict(outcome.statuses)}; "
        f"health {dict(outcome.health)}; CPU seconds {outcome.cpu_seconds}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", default="400,1200", help="numbers of clients, in turn")
    parser.add_argument("--rates", help="requests a second, in turn, instead of clients")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--patient", action="store_true", help="wait as Retry-After says")
    parser.add_argument("--max-queue-seconds", type=float, help="the application's setting")
    arguments = parser.parse_args()
    setting = {"max_queue_seconds": arguments.max_queue_seconds}
    with (
        tempfile.TemporaryDirectory(prefix="gptj-overload-") as folder,
        local_service(Path(folder), replicas=1, arguments=setting) as service,
    ):
        at_rate = arguments.rates is not None
        for number in map(int, (arguments.rates or arguments.clients).split(",")):
            load = measure(service, number, arguments.seconds, arguments.patient, at_rate)
            print(line(number, asyncio.run(load), at_rate), flush=True)


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * len(values))] if values else float("nan")


if __name__ == "__main__":
    main()

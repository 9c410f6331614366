"""Overload: what clients get if a service has more than it can take, and whether it stays healthy.

    python -m gptj_bench.overload [--clients 400,1200] [--seconds 30] [--patient] [--stream]
    python -m gptj_bench.overload --rates 400,800 [--seconds 30] [--max-queue-seconds 0.2]

Starts gptj_bench.local_service with one replica. Each client sends one request after another on
its own connection, and retries at once after a refusal; with --patient it waits as long as
`Retry-After` says. With --rates so many requests a second arrive instead, however long earlier
ones take. With --stream answers are streamed, and the time to their first token is reported.
--max-queue-seconds is the application's setting. Another client polls /health. Prints a line for
each number, with the CPU seconds and the memory's growth of the proxy and the replica, and the CPU
seconds that other programs took: runs compare only if these are alike. A few clients, before all
and five seconds after each number, show whether the service recovers.
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
CALM_CLIENTS, CALM_SECONDS = 16, 10.0  # before and after an overload
RECOVERY_SECONDS = 5.0  # to be as fast as before


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    first_token: float | None = None  # time.monotonic


@dataclass
class Outcome:
    """The outcome for one number of clients."""

    seconds: float
    statuses: Counter[int | str] = field(default_factory=Counter)
    answered: list[float] = field(default_factory=list)  # seconds each
    first_tokens: list[float] = field(default_factory=list)  # seconds until each stream's
    refused: list[float] = field(default_factory=list)
    undeclared: int = 0  # refusals without our body, or without Retry-After
    health: Counter[int | str] = field(default_factory=Counter)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    other_cpu_seconds: float = 0.0  # of all other programs, and of a virtual machine's host
    growth_mb: dict[str, float] = field(default_factory=dict)  # at most, of memory in use

    def note(self, reply: Reply, start: float) -> None:
        self.statuses[reply.status] += 1
        seconds = time.monotonic() - start
        if reply.status == 200:
            self.answered.append(seconds)
            if reply.first_token is not None:
                self.first_tokens.append(reply.first_token - start)
            return
        self.refused.append(seconds)
        declared = b'"error"' in reply.body and "retry-after" in reply.headers
        self.undeclared += not declared


@dataclass(frozen=True)
class Load:
    number: int  # of clients; at_rate: of requests that arrive a second
    at_rate: bool = False
    patient: bool = False
    stream: bool = False


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> Reply:
    """Send a request on an open connection."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.split(": ", 1) for line in head[1:] if line)
    headers = {name.lower(): value for name, value in pairs}
    status = int(head[0].split()[1])
    if headers.get("transfer-encoding") != "chunked":
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        return Reply(status, headers, body)
    body, first = b"", None
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        first = first or time.monotonic()
        await reader.readexactly(2)
    await reader.readexactly(2)
    return Reply(status, headers, body, first)


def request(method: str, path: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def content(number: int, stream: bool) -> bytes:
    """A request; its prompt depends on its number."""
    prompt = PROMPTS[number % len(PROMPTS)]
    body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream": stream}
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
    outcome.note(reply, start)
    if reply.headers.get("connection", "").lower() == "close":
        connection[1].close()
        return None, reply
    return connection, reply


async def client(
    number: int, address: tuple[str, int], end: float, outcome: Outcome, load: Load
) -> None:
    connection, body = None, content(number, load.stream)
    while time.monotonic() < end:
        connection, reply = await attempt(address, connection, body, outcome)
        if load.patient and reply is not None and reply.status != 200:
            await asyncio.sleep(float(reply.headers.get("retry-after", "1")))
    if connection is not None:
        connection[1].close()


async def arrivals(address: tuple[str, int], end: float, outcome: Outcome, load: Load) -> None:
    """Requests at a rate, each on a connection that is idle, or a new one."""
    rate = load.number
    idle: list[Connection] = []

    async def one(number: int) -> None:
        own = idle.pop() if idle else None
        connection, _ = await attempt(address, own, content(number, load.stream), outcome)
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


async def watch_memory(
    processes: dict[str, list[psutil.Process]], end: float, outcome: Outcome
) -> None:
    before = {name: memory_mb(found) for name, found in processes.items()}
    while time.monotonic() < end:
        for name, found in processes.items():
            growth = round(memory_mb(found) - before[name], 1)
            outcome.growth_mb[name] = max(outcome.growth_mb.get(name, 0.0), growth)
        await asyncio.sleep(HEALTH_SECONDS)


async def measure(service: LocalService, load: Load, seconds: float) -> Outcome:
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
    busy = busy_seconds()
    end = time.monotonic() + seconds
    if load.at_rate:
        work = [arrivals(address, end, outcome, load)]
    else:
        work = [client(each, address, end, outcome, load) for each in range(load.number)]
    served = {name: found for name, found in processes.items() if name != "client"}
    watchers = (watch_health(address, end, outcome), watch_memory(served, end, outcome))
    await asyncio.gather(*watchers, *work)
    outcome.cpu_seconds = {
        # A HAProxy that a reload replaced may have ended; its successor is not counted.
        name: round(sum(cpu_seconds(each) - before[each] for each in found if each.is_running()), 1)
        for name, found in processes.items()
    }
    outcome.other_cpu_seconds = busy_seconds() - busy - sum(outcome.cpu_seconds.values())
    return outcome


def _processes(service: LocalService, actor: str) -> list[psutil.Process]:
    return [psutil.Process(each) for each in service.processes(actor).values()]


def busy_seconds() -> float:
    """The seconds of all cores that were not idle, or that the host gave to others."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def memory_mb(processes: list[psutil.Process]) -> float:
    """A HAProxy that a reload replaced may have ended."""
    return sum(each.memory_info().rss for each in processes if each.is_running()) / 1e6


def line(load: Load, outcome: Outcome) -> str:
    rate = outcome.statuses[200] / outcome.seconds
    unit = "requests/s" if load.at_rate else "clients"
    first = (
        f"first token p50 {_median(outcome.first_tokens):.3f} s, "
        f"p99 {_percentile(outcome.first_tokens, 0.99):.3f} s; "
    )
    return (
        f"{load.number:5} {unit}: {rate:6.1f} answers/s, p50 {_median(outcome.answered):.3f} s, "
        f"p99 {_percentile(outcome.answered, 0.99):.3f} s; {first if load.stream else ''}"
        f"{len(outcome.refused)} refused, p50 {_median(outcome.refused):.3f} s, "
        f"p99 {_percentile(outcome.refused, 0.99):.3f} s, "
        f"longest {max(outcome.refused, default=0):.3f} s, "
        f"{outcome.undeclared} of them undeclared; statuses {dict(outcome.statuses)}; "
        f"health {dict(outcome.health)}; CPU seconds {outcome.cpu_seconds}, "
        f"of others {outcome.other_cpu_seconds:.1f}; "
        f"memory grew by {outcome.growth_mb} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", default="400,1200", help="numbers of clients, in turn")
    parser.add_argument("--rates", help="requests a second, in turn, instead of clients")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--patient", action="store_true", help="wait as Retry-After says")
    parser.add_argument("--stream", action="store_true", help="stream the answers")
    parser.add_argument("--max-queue-seconds", type=float, help="the application's setting")
    arguments = parser.parse_args()
    setting = {"max_queue_seconds": arguments.max_queue_seconds}
    with (
        tempfile.TemporaryDirectory(prefix="gptj-overload-") as folder,
        local_service(Path(folder), replicas=1, arguments=setting) as service,
    ):
        calm = Load(CALM_CLIENTS, stream=arguments.stream)
        asyncio.run(measure(service, calm, CALM_SECONDS))  # warm
        print("before:", line(calm, asyncio.run(measure(service, calm, CALM_SECONDS))), flush=True)
        at_rate = arguments.rates is not None
        for number in map(int, (arguments.rates or arguments.clients).split(",")):
            load = Load(number, at_rate, arguments.patient, arguments.stream)
            print(line(load, asyncio.run(measure(service, load, arguments.seconds))), flush=True)
            time.sleep(RECOVERY_SECONDS)
            after = asyncio.run(measure(service, calm, CALM_SECONDS))
            print("after:", line(calm, after), flush=True)


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * len(values))] if values else float("nan")


if __name__ == "__main__":
    main()

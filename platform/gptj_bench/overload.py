"""Overload: what clients get if a service has more than it can take, and whether it stays healthy.

    python -m gptj_bench.overload [--clients 400,1200] [--seconds 30] [--patient]

Starts gptj_bench.local_service with one replica. Each client sends one request after another on
its own connection, and retries at once after a refusal; with --patient it waits as long as
`Retry-After` says. Another client polls /health. Prints a line for each number of clients.
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


async def client(
    number: int, address: tuple[str, int], end: float, outcome: Outcome, patient: bool
) -> None:
    body = {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": MAX_TOKENS, "ignore_eos": True}
    content = request("POST", "/v1/completions", json.dumps(body).encode())
    connection = None
    while time.monotonic() < end:
        start = time.monotonic()
        try:
            connection = connection or await asyncio.open_connection(*address)
            reply = await ask(*connection, content)
        except (OSError, asyncio.IncompleteReadError) as error:
            outcome.statuses[type(error).__name__] += 1
            connection = None
            continue
        seconds = time.monotonic() - start
        outcome.statuses[reply.status] += 1
        if reply.status == 200:
            outcome.answered.append(seconds)
            continue
        outcome.refused.append(seconds)
        declared = b'"error"' in reply.body and "retry-after" in reply.headers
        outcome.undeclared += not declared
        if patient:
            await asyncio.sleep(float(reply.headers.get("retry-after", "1")))
    if connection is not None:
        connection[1].close()


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


async def measure(service: LocalService, clients: int, seconds: float, patient: bool) -> Outcome:
    parts = urlsplit(service.url)
    assert parts.hostname
    assert parts.port
    address = parts.hostname, parts.port
    outcome = Outcome(seconds)
    end = time.monotonic() + seconds
    await asyncio.gather(
        watch_health(address, end, outcome),
        *(client(each, address, end, outcome, patient) for each in range(clients)),
    )
    return outcome


def line(clients: int, outcome: Outcome) -> str:
    rate = outcome.statuses[200] / outcome.seconds
    return (
        f"{clients:5} clients: {rate:6.1f} answers/s, p50 {_median(outcome.answered):.3f} s; "
        f"{len(outcome.refused)} refused, p50 {_median(outcome.refused):.3f} s, "
        f"longest {max(outcome.refused, default=0):.3f} s, "
        f"{outcome.undeclared} of them undeclared; statuses {dict(outcome.statuses)}; "
        f"health {dict(outcome.health)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", default="400,1200", help="numbers of clients, in turn")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--patient", action="store_true", help="wait as Retry-After says")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="gptj-overload-") as folder,
        local_service(Path(folder), replicas=1) as service,
    ):
        for clients in map(int, arguments.clients.split(",")):
            outcome = asyncio.run(measure(service, clients, arguments.seconds, arguments.patient))
            print(line(clients, outcome), flush=True)


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


if __name__ == "__main__":
    main()

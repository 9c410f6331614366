"""The effect of clients that send half a request or never read the reply on other clients.

    python -m gptj_bench.slow_clients [--number 2000] [--seconds 20] [--kinds heads,bodies,unread]

Starts gptj_bench.local_service with one replica. A few clients send requests continuously; first
alone, then beside slow ones of each kind: half a head, half a body, or an unread stream. Prints a
line for each: the outcomes of the former's requests, their median time relative to the quiet one,
and the outcomes of the slow connections.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from gptj_bench.faults import Load, Result
from gptj_bench.local_service import PROMPTS, local_service

CLIENTS = 4  # well-behaved clients
CONNECTING = 100  # slow ones at a time
MORE_FILES = 1000  # than there are slow clients


@dataclass
class Outcome:
    """The outcome for one kind of slow clients."""

    kind: str
    others: Result
    slow: Counter[str] = field(default_factory=Counter)


def half(kind: str) -> bytes:
    """The bytes that a slow client sends."""
    body = {"prompt": PROMPTS[0], "max_tokens": 400, "ignore_eos": True, "stream": True}
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    if kind == "heads":
        return head.encode()
    whole = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
    return whole[:-10] if kind == "bodies" else whole


async def slow_client(
    address: tuple[str, int], kind: str, gate: asyncio.Semaphore, until: float, seen: Counter[str]
) -> None:
    """Connect, send, and wait; counts how the service ends it."""
    connection = socket.socket()
    connection.setblocking(False)
    if kind == "unread":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    loop = asyncio.get_running_loop()
    try:
        async with gate:
            await loop.sock_connect(connection, address)
            await loop.sock_sendall(connection, half(kind))
        if kind == "unread":
            await asyncio.sleep(max(0, until - time.monotonic()))
            seen["left"] += 1
            return
        async with asyncio.timeout(max(0, until - time.monotonic())):
            reply = await loop.sock_recv(connection, 4096)
        seen[reply[9:12].decode() or "closed"] += 1
    except TimeoutError:
        seen["still open"] += 1
    except OSError as error:
        seen[type(error).__name__] += 1
    finally:
        connection.close()


async def measure(url: str, kinds: Sequence[str], number: int, seconds: float) -> list[Outcome]:
    """Measure without slow clients first, as a kind of its own."""
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    load = Load(f"{url}/v1/completions", CLIENTS)
    await load.begin()
    outcomes = []
    try:
        for kind in ("quiet", *kinds):
            since = time.monotonic()
            gate, seen = asyncio.Semaphore(CONNECTING), Counter[str]()
            address, count = (parts.hostname, parts.port), 0 if kind == "quiet" else number
            until = since + seconds
            await asyncio.gather(
                asyncio.sleep(seconds),
                *(slow_client(address, kind, gate, until, seen) for _ in range(count)),
            )
            outcomes.append(Outcome(kind, load.result(kind, since), seen))
    finally:
        await load.end()
    return outcomes


def line(outcome: Outcome, quiet: Outcome) -> str:
    others = outcome.others
    ratio = others.median_seconds / quiet.others.median_seconds
    return (
        f"{outcome.kind:7} {others.requests:6} requests of others: {dict(others.outcomes)}, "
        f"p50 {others.median_seconds:.3f} s ({ratio:.2f} of the quiet one); "
        f"slow connections: {dict(outcome.slow)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--number", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=20, help="of each kind")
    parser.add_argument("--kinds", default="heads,bodies,unread")
    arguments = parser.parse_args()
    allow_files(arguments.number + MORE_FILES)
    with (
        tempfile.TemporaryDirectory(prefix="gptj-slow-") as folder,
        local_service(Path(folder), replicas=1) as service,
    ):
        kinds = arguments.kinds.split(",")
        outcomes = asyncio.run(measure(service.url, kinds, arguments.number, arguments.seconds))
        for outcome in outcomes:
            print(line(outcome, outcomes[0]), flush=True)


def allow_files(number: int) -> None:
    """Allow `number` open files in this process and its children. ValueError beyond the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard not in (-1, resource.RLIM_INFINITY) and hard < number:
        raise ValueError(f"this needs {number} open files, but the limit is {hard}: ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number), hard))


if __name__ == "__main__":
    main()

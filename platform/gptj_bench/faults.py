"""Breaks parts of a running service and counts what its clients lose.

    python -m gptj_bench.faults [--rounds 3] [--clients 16] [--faults replica,proxy]
                                [--adapters 0] [--json OUT]

Starts a Ray cluster on loopback with two replicas of a tiny random model, configured by
k8s/base/serve.yaml, and clients that send requests continuously, half of them streaming. Requests
are greedy and their texts known, so wrong answers are detected too. Then, in each round, each fault
happens once. Prints a line per fault: the number of requests, their outcomes, and the durations.
With --adapters the model has that many LoRA adapters, and clients take turns between it and them.

    replica, proxy, controller    SIGKILL
    hang, proxy-hang              SIGSTOP of a replica, or of the proxy
    haproxy, haproxy-hang,        SIGKILL and SIGSTOP of HAProxy, and SIGKILL of the actor that runs
    haproxy-manager               it; only with RAY_SERVE_ENABLE_HA_PROXY=1 in the environment
    worker                        a node with a replica, and everything on it, by SIGKILL at once;
                                  alone, on a cluster with one more node a round
    head                          the only node and everything on it, Ray's state included, by
                                  SIGKILL at once; then a new cluster and `serve run`
    upgrade, bad-upgrade,         `serve deploy` of another checkpoint, of a damaged one, and of the
    rollback                      first again
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, product
from pathlib import Path
from typing import Any

import httpx
import psutil

from gptj_bench.local_service import PROMPTS, LocalService, local_service
from gptj_local.ray import HAPROXY_SWITCH

FAULTS = {  # the actor's class, and the signal to its process
    "replica": ("ServeReplica", signal.SIGKILL),
    "proxy": ("ProxyActor", signal.SIGKILL),
    "controller": ("ServeController", signal.SIGKILL),
    "hang": ("ServeReplica", signal.SIGSTOP),
    "proxy-hang": ("ProxyActor", signal.SIGSTOP),
}
# With RAY_SERVE_ENABLE_HA_PROXY=1: HAProxy itself, and the actor that runs it.
HAPROXY_FAULTS = {
    "haproxy": signal.SIGKILL,
    "haproxy-hang": signal.SIGSTOP,
    "haproxy-manager": signal.SIGKILL,
}
NOT_BEHIND_HAPROXY = ("proxy", "proxy-hang", "worker")  # nodes of one machine would share its port
CHANGES = ("upgrade", "bad-upgrade", "rollback")
REPLACED_SECONDS = 180
QUIET_SECONDS = 4.0  # of load before and after a fault
MAX_TOKENS = 96
ANSWERED = "answered"


@dataclass
class Result:
    """A fault's effect on the clients."""

    fault: str
    requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    refused_seconds: float = 0.0  # from the first refused connection to the last
    median_seconds: float = 0.0  # of the answered requests
    longest_seconds: float = 0.0
    replaced_seconds: float = 0.0  # from the fault until the part was replaced

    @property
    def lost(self) -> int:
        return self.requests - self.outcomes[ANSWERED]


@dataclass
class Load:
    """Clients that send one request after another, and count the outcomes."""

    url: str
    clients: int
    key: str = "none"  # of the service, if it asks for one
    models: Sequence[str | None] = (None,)  # in requests; None: the service's own
    _expected: dict[tuple[str, str | None], str] = field(default_factory=dict)
    _events: list[tuple[str, float, float]] = field(default_factory=list)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def begin(self) -> None:
        """Record the undisturbed texts, then start the clients."""
        async with self._client() as client:
            for asked in product(PROMPTS, self.models):
                reply = await client.post(self.url, json=_body(*asked))
                self._expected[asked] = reply.raise_for_status().json()["choices"][0]["text"]
        self._tasks = [asyncio.create_task(self._run(each)) for each in range(self.clients)]

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(timeout=120, headers={"Authorization": f"Bearer {self.key}"})

    async def end(self) -> None:
        self._ended.set()
        await asyncio.gather(*self._tasks)

    def result(self, fault: str, since: float) -> Result:
        """Of the requests that ended after `since` (time.monotonic)."""
        events = [each for each in self._events if each[2] >= since]
        refused = [end for outcome, _, end in events if outcome == "refused connection"]
        answered = [end - start for outcome, start, end in events if outcome == ANSWERED]
        return Result(
            fault,
            len(events),
            Counter(outcome for outcome, _, _ in events),
            max(refused) - min(refused) if refused else 0.0,
            statistics.median(answered) if answered else 0.0,
            max(answered, default=0.0),
        )

    async def _run(self, number: int) -> None:
        stream = number % 2 == 1
        prompt, turns = PROMPTS[number % len(PROMPTS)], cycle(self.models)
        async with self._client() as client:
            while not self._ended.is_set():
                start = time.monotonic()
                outcome = await self._ask(client, prompt, next(turns), stream)
                self._events.append((outcome, start, time.monotonic()))
                if outcome != ANSWERED:
                    await asyncio.sleep(0.05)

    async def _ask(
        self, client: httpx.AsyncClient, prompt: str, model: str | None, stream: bool
    ) -> str:
        kind = "stream" if stream else "request"
        try:
            if stream:
                text = await self._stream(client, _body(prompt, model, stream=True))
            else:
                reply = await client.post(self.url, json=_body(prompt, model))
                text = _text(reply.status_code, reply.content)
        except httpx.ConnectError:
            return "refused connection"
        except httpx.TimeoutException:
            return f"{kind} without an answer"
        except httpx.TransportError:
            return f"{kind} cut off"
        except Failed as error:
            return f"{kind}: {error}"
        same = text == self._expected[prompt, model]
        return ANSWERED if same else f"{kind} with another text"

    async def _stream(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        text, done = "", False
        async with client.stream("POST", self.url, json=body) as reply:
            if reply.status_code != 200:
                _text(reply.status_code, await reply.aread())
            async for line in reply.aiter_lines():
                done |= line == "data: [DONE]"
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise Failed("error event")
                    text += "".join(choice["text"] for choice in chunk["choices"])
        if not done:
            raise Failed("ended in silence")
        return text


class Failed(Exception):
    """An error answer; the message says which."""


async def break_(service: LocalService, fault: str) -> float:
    """Break or change a part; returns the seconds until it is replaced."""
    start = time.monotonic()
    if fault in FAULTS:
        ended = await kill(service, *FAULTS[fault])
    elif fault in HAPROXY_FAULTS:
        ended = await kill_haproxy(service, fault)
    elif fault == "worker":
        ended = await lose_worker(service)
    elif fault == "head":
        ended = await lose_head(service)
    else:
        ended = await change(service, fault)
    return time.monotonic() - start if ended else float("inf")


async def kill(service: LocalService, actor: str, what: signal.Signals) -> bool:
    """Send an actor's process a signal; returns whether it was replaced in time."""
    before = await asyncio.to_thread(service.processes, actor)
    victim = next(iter(before))
    os.kill(before[victim], what)

    def replaced() -> bool:
        now = service.processes(actor)
        return now.get(victim) != before[victim] and len(now) >= len(before) and service.answers()

    return await until(replaced)


async def kill_haproxy(service: LocalService, fault: str) -> bool:
    """Send HAProxy or its actor a signal; returns whether another answered in time."""
    ((actor, manager),) = (await asyncio.to_thread(service.processes, "HAProxyManager")).items()
    running = await asyncio.to_thread(service.haproxies)
    program = max(running, key=psutil.Process.create_time)  # older ones are ending
    victim = manager if fault == "haproxy-manager" else program.pid
    os.kill(victim, HAPROXY_FAULTS[fault])

    def replaced() -> bool:
        managers = service.processes("HAProxyManager")
        same = managers == {actor: manager} and program in service.haproxies()
        return bool(managers) and not same and service.answers()

    return await until(replaced)


async def lose_worker(service: LocalService) -> bool:
    """Lose a node; returns whether its replica moved to the spare one in time."""
    before = await asyncio.to_thread(service.processes, "ServeReplica")
    await asyncio.to_thread(service.lose_worker)

    def replaced() -> bool:
        now = service.processes("ServeReplica")
        states = service.states()
        return now.keys() != before.keys() and states == ["RUNNING"] * len(before)

    return await until(replaced)


async def lose_head(service: LocalService) -> bool:
    """Lose the cluster and start it again; returns whether all replicas answered in time."""
    replicas = len(await asyncio.to_thread(service.processes, "ServeReplica"))
    await asyncio.to_thread(service.lose_head)
    await asyncio.to_thread(service.restart)

    def restarted() -> bool:
        return service.states() == ["RUNNING"] * replicas and service.answers()

    return await until(restarted)


async def change(service: LocalService, kind: str) -> bool:
    """Deploy another version, or a bad one; returns whether that ended as it should, in time."""
    bad = kind == "bad-upgrade"
    replicas = await asyncio.to_thread(service.processes, "ServeReplica")
    if kind == "rollback":
        checkpoint = service.config["applications"][0]["args"]["checkpoint"]
    else:
        checkpoint = await asyncio.to_thread(service.new_version, damaged=bad)
    await asyncio.to_thread(service.deploy, checkpoint)

    def ended() -> bool:
        now = service.processes("ServeReplica")
        status = service.application()["status"]
        if bad:
            return status == "DEPLOY_FAILED" and now.keys() == replicas.keys()
        settled = service.states() == ["RUNNING"] * len(replicas)
        moved = checkpoint == service.serving or not now.keys() & replicas.keys()
        return status == "RUNNING" and settled and moved and service.deployed() == checkpoint

    if not await until(ended):
        return False
    if not bad:
        service.serving = checkpoint
    return True


async def until(condition: Callable[[], bool]) -> bool:
    """Wait until a condition holds; False if it takes too long."""
    deadline = time.monotonic() + REPLACED_SECONDS
    while time.monotonic() < deadline:
        await asyncio.sleep(0.1)
        # The dashboard or the controller may be down itself, or know no application yet.
        with contextlib.suppress(httpx.HTTPError, KeyError):
            if await asyncio.to_thread(condition):
                return True
    return False


async def measure(
    service: LocalService, faults: Sequence[str], clients: int
) -> AsyncIterator[Result]:
    """Break each part in turn under load."""
    url, models = f"{service.url}/v1/completions", (None, *service.adapters)
    load = Load(url, clients, service.key, models)
    await load.begin()
    try:
        for fault in faults:
            await asyncio.sleep(QUIET_SECONDS)
            since = time.monotonic()
            replaced = await break_(service, fault)
            await asyncio.sleep(QUIET_SECONDS)
            result = load.result(fault, since)
            result.replaced_seconds = replaced
            yield result
    finally:
        await load.end()


def line(result: Result) -> str:
    outcomes = ", ".join(
        f"{count} {outcome}" for outcome, count in result.outcomes.most_common() if count
    )
    return (
        f"{result.fault:10} {result.requests:6} requests: {outcomes}; refused for "
        f"{result.refused_seconds:.1f} s, longest answer {result.longest_seconds:.1f} s, replaced "
        f"after {result.replaced_seconds:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument(
        "--faults", default=",".join((*FAULTS, *CHANGES, "head")), help="in this order"
    )
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT", help="append a line a fault")
    arguments = parser.parse_args()
    faults = arguments.faults.split(",")
    known = (*FAULTS, *HAPROXY_FAULTS, "worker", *CHANGES, "head")
    if unknown := set(faults) - set(known):
        parser.error(f"unknown fault {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if "worker" in faults and set(faults) != {"worker"}:
        parser.error("worker needs its own cluster: leave out the other faults")
    haproxy = os.environ.get(HAPROXY_SWITCH) == "1"
    if absent := set(faults) & set(() if haproxy else HAPROXY_FAULTS):
        parser.error(f"{', '.join(sorted(absent))} needs {HAPROXY_SWITCH}=1 in the environment")
    if absent := set(faults) & set(NOT_BEHIND_HAPROXY if haproxy else ()):
        parser.error(f"{', '.join(sorted(absent))} cannot be had with {HAPROXY_SWITCH}=1")
    workers = 2 + arguments.rounds if "worker" in faults else 0
    with (
        tempfile.TemporaryDirectory(prefix="gptj-faults-") as folder,
        local_service(Path(folder), workers=workers, adapters=arguments.adapters) as service,
    ):
        asyncio.run(report(service, faults * arguments.rounds, arguments.clients, arguments.json))


async def report(
    service: LocalService, faults: Sequence[str], clients: int, out: Path | None
) -> None:
    async for result in measure(service, faults, clients):
        print(line(result), flush=True)
        if out is not None:
            row = {**vars(result), "outcomes": dict(result.outcomes), "lost": result.lost}
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _body(prompt: str, model: str | None = None, *, stream: bool = False) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }


def _text(status: int, content: bytes) -> str:
    try:
        body = json.loads(content)
    except ValueError:
        raise Failed(f"{status} in plain text") from None
    if status != 200:
        raise Failed(f"{status} {body['error']['code'] or body['error']['type']}")
    text: str = body["choices"][0]["text"]
    return text


if __name__ == "__main__":
    main()

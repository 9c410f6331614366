"""Kills parts of a running service and counts what its clients lose.

    python -m gptj_bench.faults [--rounds 3] [--clients 16] [--faults replica,proxy] [--json OUT]

Starts a Ray cluster on loopback with two replicas of a tiny random model, as k8s/base/serve.yaml
has them, and clients that ask all the time, half of them for streams. Each request is greedy and
its whole text is known, so that a wrong answer is seen as well. Then, in each round, each part is
killed (or stopped) once: `replica`, `proxy`, `controller` by SIGKILL, `hang` a replica by SIGSTOP.
A line a fault: how many requests there were, what became of them, and for how long.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj_local.processes import HOST, free_ports, running, tail
from gptj_local.ray import LocalRay

SERVE_CONFIG = Path(__file__).resolve().parents[2] / "k8s" / "base" / "serve.yaml"
FAULTS = {  # the class of the actor, and what is sent to its process
    "replica": ("ServeReplica", signal.SIGKILL),
    "proxy": ("ProxyActor", signal.SIGKILL),
    "controller": ("ServeController", signal.SIGKILL),
    "hang": ("ServeReplica", signal.SIGSTOP),
}
START_SECONDS = 240
REPLACED_SECONDS = 120
QUIET_SECONDS = 4.0  # of load before a fault, and after its end
PROMPTS = ("The tower", "A river", "Anna wrote", "In the year", "Who", "x", "The book", "Paris")
MAX_TOKENS = 96
ANSWERED = "answered"


@dataclass
class Result:
    """What one fault did to the clients."""

    fault: str
    requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    refused_seconds: float = 0.0  # from the first refused connection to the last
    longest_seconds: float = 0.0  # of the requests that were answered
    replaced_seconds: float = 0.0  # from the fault until the part was there again

    @property
    def lost(self) -> int:
        return self.requests - self.outcomes[ANSWERED]


@dataclass
class Load:
    """Clients that ask one request after another, and count what becomes of each."""

    url: str
    clients: int
    key: str = "none"  # of the service, if it asks for one
    _expected: dict[str, str] = field(default_factory=dict)
    _events: list[tuple[str, float, float]] = field(default_factory=list)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def begin(self) -> None:
        """Learn the undisturbed texts, then ask all the time."""
        async with self._client() as client:
            for prompt in PROMPTS:
                reply = await client.post(self.url, json=_body(prompt))
                self._expected[prompt] = reply.raise_for_status().json()["choices"][0]["text"]
        self._tasks = [asyncio.create_task(self._run(each)) for each in range(self.clients)]

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(timeout=120, headers={"Authorization": f"Bearer {self.key}"})

    async def end(self) -> None:
        self._ended.set()
        await asyncio.gather(*self._tasks)

    def result(self, fault: str, since: float) -> Result:
        """Of the requests that ended after `since`, which is of time.monotonic."""
        events = [each for each in self._events if each[2] >= since]
        refused = [end for outcome, _, end in events if outcome == "refused connection"]
        answered = [end - start for outcome, start, end in events if outcome == ANSWERED]
        return Result(
            fault,
            len(events),
            Counter(outcome for outcome, _, _ in events),
            max(refused) - min(refused) if refused else 0.0,
            max(answered, default=0.0),
        )

    async def _run(self, number: int) -> None:
        stream = number % 2 == 1
        prompt = PROMPTS[number % len(PROMPTS)]
        async with self._client() as client:
            while not self._ended.is_set():
                start = time.monotonic()
                outcome = await self._ask(client, prompt, stream)
                self._events.append((outcome, start, time.monotonic()))
                if outcome != ANSWERED:
                    await asyncio.sleep(0.05)

    async def _ask(self, client: httpx.AsyncClient, prompt: str, stream: bool) -> str:
        kind = "stream" if stream else "request"
        try:
            if stream:
                text = await self._stream(client, prompt)
            else:
                reply = await client.post(self.url, json=_body(prompt))
                text = _text(reply.status_code, reply.content)
        except httpx.ConnectError:
            return "refused connection"
        except httpx.TimeoutException:
            return f"{kind} without an answer"
        except httpx.TransportError:
            return f"{kind} cut off"
        except Failed as error:
            return f"{kind}: {error}"
        return ANSWERED if text == self._expected[prompt] else f"{kind} with another text"

    async def _stream(self, client: httpx.AsyncClient, prompt: str) -> str:
        text, done = "", False
        async with client.stream("POST", self.url, json=_body(prompt, stream=True)) as reply:
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
    """An answer that says that there is none; the message tells which."""


@dataclass
class Cluster:
    """A cluster with the generation service."""

    node: LocalRay
    url: str
    key: str = "none"

    def processes(self, actor: str) -> dict[str, int]:
        """Process ids of the live actors of a class, by the actors' ids."""
        reply = httpx.get(
            f"{self.node.dashboard}/api/v0/actors?limit=1000&detail=1",
            headers={"Authorization": f"Bearer {self.node.token}"},
            timeout=30,
        )
        found = reply.raise_for_status().json()["data"]["result"]["result"]
        return {
            each["actor_id"]: each["pid"]
            for each in found
            if each["state"] == "ALIVE" and each["class_name"].startswith(actor)
        }

    async def break_(self, fault: str) -> float:
        """Break a part; the seconds until there is another in its place."""
        actor, what = FAULTS[fault]
        before = await asyncio.to_thread(self.processes, actor)
        victim = next(iter(before))
        start = time.monotonic()
        os.kill(before[victim], what)
        while time.monotonic() - start < REPLACED_SECONDS:
            await asyncio.sleep(0.1)
            try:
                now = await asyncio.to_thread(self.processes, actor)
            except httpx.HTTPError:
                continue
            dead = now.get(victim) != before[victim]
            if dead and len(now) >= len(before) and self._answers():
                return time.monotonic() - start
        return float("inf")

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False


@contextmanager
def cluster(folder: Path, replicas: int = 2, key: str = "none") -> Iterator[Cluster]:
    """Replicas of a tiny model behind serve.yaml's settings."""
    tokenizer = GPTJTokenizer.train([*PROMPTS, "It runs past the tower, and nobody reads."], 300)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 8,
        "n_positions": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.3,
    }
    model = GPTJForCausalLM(GPTJConfig(vocab_size=len(tokenizer), **shape))
    model.save_pretrained(folder / "model", tokenizer=tokenizer)
    config = yaml.safe_load(SERVE_CONFIG.read_text())
    (port,) = free_ports(1)
    config["http_options"]["port"] = port
    config["applications"] = config["applications"][:1]
    (application,) = config["applications"]
    application["args"] |= {"checkpoint": str(folder / "model"), "dtype": "float32"}
    (deployment,) = application["deployments"]
    deployment.pop("autoscaling_config")
    deployment["num_replicas"] = replicas
    path, log = folder / "serve.yaml", folder / "serve.log"
    path.write_text(yaml.safe_dump(config))
    with LocalRay.start(folder, cpus=4) as node:
        command = [str(Path(sys.executable).parent / "serve"), "run", str(path)]
        with running(command, environment={**os.environ, **node.environment()}, log=log) as process:
            found = Cluster(node, f"http://{HOST}:{port}", key)
            deadline = time.monotonic() + START_SECONDS
            while len(found.processes("ServeReplica")) < replicas or not found._answers():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the service does not start:\n{tail(log, 6000)}")
                time.sleep(0.5)
            yield found


async def measure(service: Cluster, faults: Sequence[str], clients: int) -> AsyncIterator[Result]:
    """Break each part in turn under load."""
    load = Load(f"{service.url}/v1/completions", clients, service.key)
    await load.begin()
    try:
        for fault in faults:
            await asyncio.sleep(QUIET_SECONDS)
            since = time.monotonic()
            replaced = await service.break_(fault)
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
    parser.add_argument("--faults", default=",".join(FAULTS), help="in this order")
    parser.add_argument("--json", type=Path, metavar="OUT", help="append a line a fault")
    arguments = parser.parse_args()
    faults = arguments.faults.split(",")
    if unknown := set(faults) - set(FAULTS):
        parser.error(f"there is no fault {', '.join(sorted(unknown))}: {', '.join(FAULTS)}")
    with (
        tempfile.TemporaryDirectory(prefix="gptj-faults-") as folder,
        cluster(Path(folder)) as service,
    ):
        asyncio.run(report(service, faults * arguments.rounds, arguments.clients, arguments.json))


async def report(service: Cluster, faults: Sequence[str], clients: int, out: Path | None) -> None:
    async for result in measure(service, faults, clients):
        print(line(result), flush=True)
        if out is not None:
            row = {**vars(result), "outcomes": dict(result.outcomes), "lost": result.lost}
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _body(prompt: str, *, stream: bool = False) -> dict[str, Any]:
    return {
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

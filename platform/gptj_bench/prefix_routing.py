"""Two replicas behind Serve's default router, and behind deployments.prefix_router, in one run.

    python -m gptj_bench.prefix_routing [--rounds 3] [--workloads shared,chats,adapters,unshared]
                                        [--clients 4] [--layers 8] [--width 8] [--json OUT]

Serves a random model (`width` x 64 wide) by two applications that differ in their router, each with
two replicas, and sends both the same requests in turns, one workload after the other:

- shared: 16 prefixes of 1,000 characters, each of five requests in random order. A replica's cache
  holds ten of them, so only both replicas together hold all.
- chats: 30 conversations of three turns, after a common system prompt of 200 characters.
- adapters: 8 adapters with five requests each; a replica has room for four at a time.
- unshared: prompts that have nothing in common, for what the router costs.

Prints for each the share of prompt tokens found in the prefix cache, by the engines' metrics, the
time to the first token, output tokens/s, and how often an adapter was loaded.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import queue
import random
import statistics
import string
import tempfile
import threading
import time
import timeit
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from ray.serve._private.constants import DEFAULT_REQUEST_ROUTER_PATH

from gptj.serving.entry.prefix_keys import keys_of
from gptj_bench import machine
from gptj_bench.local_service import LocalService, configuration, save_model
from gptj_local.processes import HOST, tail
from gptj_local.ray import LocalRay

ROUTERS = ("default", "prefix")
REPLICAS = 2
ADAPTERS, MAX_LORAS = 8, 4
NEW_TOKENS = 16
PREFIXES, PREFIX_CHARACTERS, REQUESTS = 16, 1000, 5
CONVERSATIONS, TURNS, SYSTEM_CHARACTERS = 30, 3, 200
UNSHARED = 64
CACHE_TOKENS = 10 * PREFIX_CHARACTERS  # a random character is a token
CONTEXT = 2048
START_SECONDS = 300
METRICS = {
    "asked": "ray_gptj_engine_prefix_tokens_asked_total",
    "hit": "ray_gptj_engine_prefix_tokens_hit_total",
    "loads": "ray_gptj_adapter_loads_total",
}
Body = dict[str, Any]


@dataclass
class Job:
    """Requests, one after the other; those of a chat follow the earlier replies."""

    bodies: list[Body]
    messages: list[Body] = field(default_factory=list)

    def next(self) -> Body:
        body = self.bodies.pop(0)
        if "messages" not in body:
            return body
        self.messages += body["messages"]
        return {"messages": self.messages}


@dataclass
class Measured:
    """The rounds of one workload behind one router."""

    first: list[float] = field(default_factory=list)  # seconds to the first token
    tokens: int = 0
    seconds: float = 0.0
    counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def row(self, workload: str, router: str) -> dict[str, Any]:
        first = sorted(self.first)
        return {
            "workload": workload,
            "router": router,
            "requests": len(first),
            "hit_rate": round(self.counts["hit"] / self.counts["asked"], 3),
            "ttft_p50_ms": round(statistics.median(first) * 1e3, 1),
            "ttft_p99_ms": round(first[int(0.99 * len(first))] * 1e3, 1),
            "tokens_per_s": round(self.tokens / self.seconds, 1),
            "adapter_loads": round(self.counts["loads"]),
        }


def workloads(seed: int) -> dict[str, list[Job]]:
    """New texts for each round, so that each starts without any of its prefixes cached."""
    numbers = random.Random(seed)

    def text(characters: int) -> str:
        return "".join(numbers.choices(string.ascii_lowercase, k=characters))

    def user(content: str) -> dict[str, str]:
        return {"role": "user", "content": content}

    prefixes = [text(PREFIX_CHARACTERS) for _ in range(PREFIXES)]
    system = {"role": "system", "content": text(SYSTEM_CHARACTERS)}
    instructions = [text(400) for _ in range(ADAPTERS)]
    found = {
        "shared": [Job([{"prompt": each + text(50)}]) for each in prefixes * REQUESTS],
        "chats": [
            Job(
                [
                    {"messages": [*([] if turn else [system]), user(text(150))]}
                    for turn in range(TURNS)
                ]
            )
            for _ in range(CONVERSATIONS)
        ],
        "adapters": [
            Job([{"model": f"adapter-{number}", "prompt": instructions[number] + text(50)}])
            for number in [*range(ADAPTERS)] * REQUESTS
        ],
        "unshared": [Job([{"prompt": text(500)}]) for _ in range(UNSHARED)],
    }
    for jobs in found.values():
        numbers.shuffle(jobs)
    return found


@dataclass(frozen=True)
class Service:
    """Both applications, on one cluster."""

    url: str
    metrics: str

    def run(self, router: str, jobs: Sequence[Job], clients: int) -> Measured:
        """Each client has one request at a time."""
        waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            waiting.put(job)
        found, prompt_tokens, failures = Measured(), 0, []
        lock = threading.Lock()
        before = self._counts(router)

        def client() -> None:
            nonlocal prompt_tokens
            try:
                with httpx.Client(base_url=f"{self.url}/{router}", timeout=300) as http:
                    while True:
                        job = waiting.get_nowait()
                        reply = ask(http, job.next())
                        with lock:
                            found.first.append(reply.first)
                            found.tokens += NEW_TOKENS
                            prompt_tokens += reply.prompt_tokens
                        if job.bodies:  # the user reads, while others' turns come first
                            job.messages.append({"role": "assistant", "content": reply.text})
                            waiting.put(job)
            except queue.Empty:
                pass
            except Exception as error:
                failures.append(error)

        start = time.perf_counter()
        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found.seconds = time.perf_counter() - start
        if failures:
            raise failures[0]
        deadline = time.monotonic() + 60
        while (now := self._counts(router))["asked"] < before["asked"] + prompt_tokens:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the engines' metrics lack requests: {now}")
            time.sleep(0.3)
        found.counts = {name: now[name] - before[name] for name in METRICS}
        return found

    def _counts(self, router: str) -> dict[str, float]:
        """Our counters, over an application's replicas."""
        found: dict[str, float] = dict.fromkeys(METRICS, 0.0)
        names = {metric: name for name, metric in METRICS.items()}
        for family in text_string_to_metric_families(httpx.get(self.metrics, timeout=30).text):
            for each in family.samples:
                if each.name in names and each.labels["application"] == router:
                    found[names[each.name]] += each.value
        return found


@dataclass(frozen=True)
class Reply:
    first: float  # seconds to the first token
    text: str
    prompt_tokens: int


def ask(http: httpx.Client, body: Body) -> Reply:
    chat = "messages" in body
    body = {
        **body,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    first, parts, usage = None, [], None
    start = time.perf_counter()
    route = "/v1/chat/completions" if chat else "/v1/completions"
    with http.stream("POST", route, json=body) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"{reply.status_code}: {reply.read().decode()[:500]}")
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                part = choice["delta"].get("content") if chat else choice["text"]
                if part and first is None:
                    first = time.perf_counter() - start
                parts.append(part or "")
    if first is None or usage is None or usage["completion_tokens"] != NEW_TOKENS:
        raise RuntimeError(f"the reply is incomplete: {usage}")
    return Reply(first, "".join(parts), usage["prompt_tokens"])


@contextmanager
def serving(folder: Path, layers: int, width: int) -> Iterator[Service]:
    """Once all replicas run: Serve answers as soon as one does, and then has no choice."""
    shape = {"n_layer": layers, "n_embd": 64 * width, "n_head": width, "rotary_dim": 16}
    save_model(folder, ADAPTERS, **shape, n_positions=CONTEXT)
    config = configuration(folder, REPLICAS, adapters=0, one_per_node=False)
    (ours,) = config["applications"]
    ours["args"] |= {
        "adapter_root": str(folder),
        "max_loras": MAX_LORAS,
        "cache_tokens": CACHE_TOKENS,
        "chat_template": "alpaca",
        "stalled_seconds": 120,
    }
    default = copy.deepcopy(ours) | {"name": "default", "route_prefix": "/default"}
    default["deployments"][0]["request_router_config"] = {
        "request_router_class": DEFAULT_REQUEST_ROUTER_PATH
    }
    ours |= {"name": "prefix", "route_prefix": "/prefix"}
    config["applications"] = [default, ours]
    environment = {**os.environ, "RAY_metrics_report_interval_ms": "1000"}
    with ExitStack() as stack:
        node = stack.enter_context(LocalRay.start(folder, cpus=4, environment=environment))
        url = f"http://{HOST}:{config['http_options']['port']}"
        local = LocalService(node, url, folder, config, _stack=stack)
        process = local.serve()
        deadline = time.monotonic() + START_SECONDS
        while not _all_run(local):
            if process.poll() is not None or time.monotonic() > deadline:
                log = folder / "serve.log"
                raise RuntimeError(f"the services do not start:\n{tail(log, 6000)}")
            time.sleep(0.5)
        yield Service(url, f"http://{HOST}:{node.metrics_port}/metrics")


def _all_run(service: LocalService) -> bool:
    try:
        return all(service.states(router) == ["RUNNING"] * REPLICAS for router in ROUTERS)
    except (httpx.HTTPError, KeyError):
        return False  # Serve does not run yet, or knows no application


def overhead() -> dict[str, float]:
    """Microseconds that the layer takes, by the prompt's characters."""
    found = {}
    for characters in (100, 1000, 8000):
        body = json.dumps({"prompt": "Some words. " * (characters // 12), "max_tokens": 16})
        times = timeit.repeat(lambda body=body: keys_of(body.encode(), b""), number=100, repeat=5)  # type: ignore[misc]
        found[str(characters)] = round(min(times) / 100 * 1e6, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", default=",".join(workloads(0)))
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="OUT", help="append a line a measurement")
    given = parser.parse_args()
    if unknown := set(given.workloads.split(",")) - workloads(0).keys():
        parser.error(f"unknown workload {', '.join(sorted(unknown))}")
    print(json.dumps({**machine.description(), "layer_us": overhead()}), flush=True)
    total: dict[tuple[str, str], Measured] = defaultdict(Measured)
    with (
        tempfile.TemporaryDirectory(prefix="gptj-routing-") as folder,
        serving(Path(folder), given.layers, given.width) as service,
    ):
        for router in ROUTERS:  # a warm-up
            service.run(router, workloads(-1)["unshared"][:8], given.clients)
        for number in range(given.rounds):
            jobs_by_name = workloads(number)
            for workload in given.workloads.split(","):
                jobs = jobs_by_name[workload]
                for router in ROUTERS if number % 2 == 0 else ROUTERS[::-1]:
                    measured = service.run(router, copy.deepcopy(jobs), given.clients)
                    row = {"round": number, **measured.row(workload, router)}
                    print(json.dumps(row), flush=True)
                    so_far = total[workload, router]
                    so_far.first += measured.first
                    so_far.tokens += measured.tokens
                    so_far.seconds += measured.seconds
                    for name, value in measured.counts.items():
                        so_far.counts[name] += value
    rows = [total[key].row(*key) for key in sorted(total, key=_order)]
    if given.json is not None:
        with given.json.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print(table(rows))


def _order(key: tuple[str, str]) -> tuple[int, str]:
    return list(workloads(0)).index(key[0]), key[1]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

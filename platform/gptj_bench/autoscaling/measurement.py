"""Measure a simulated replica's parameters on this machine: steps, prefill and start.

    python -m gptj_bench.autoscaling.measurement MODEL [--starts 5]

MODEL is a model folder, such as one from `python -m gptj_bench model`, or s3://. Prints JSON lines:
the machine; the seconds of a step by number of decoding sequences, and of a prompt by its tokens,
for the engine alone; then the seconds from ordering a second replica until Ray Serve has it
running, on a Ray cluster with room for it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from deployments.loading import best_dtype
from gptj import GPTJForCausalLM
from gptj.engine.backends import best_runner
from gptj.engine.engine import Engine
from gptj.serialization.json_object import to_json
from gptj_bench import machine
from gptj_bench.decode import TEXT_IDS, generate
from gptj_bench.serve import SERVE_CONFIG
from gptj_jobs import command_line
from gptj_local.processes import free_ports
from gptj_local.ray import LocalRay

BATCHES = (1, 8, 16, 32, 64)
PROMPTS = (16, 64, 256, 512)
PROMPT_TOKENS = 32  # of the decoding sequences
NEW_TOKENS = 32
REPEATS = 5
MAX_NUM_BATCHED_TOKENS = 256  # the deployment's default
START_SECONDS = 300


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=command_line.address)
    parser.add_argument("--starts", type=int, default=5)
    given = parser.parse_args(arguments)
    show(machine.description() | {"model": given.model})
    for row in engine_seconds(given.model):
        show(row)
    show(start_seconds(given.model, given.starts))


def show(row: dict[str, Any]) -> None:
    print(to_json(row), flush=True)


def engine_seconds(address: str) -> Iterator[dict[str, Any]]:
    dtype = best_dtype(torch.device("cpu"))
    model = GPTJForCausalLM.from_pretrained(address, dtype=dtype, device="cpu")
    vocabulary = min(TEXT_IDS, model.config.vocab_size)
    tokens = max(BATCHES) * (PROMPT_TOKENS + NEW_TOKENS + 32) + max(PROMPTS)
    runner = best_runner(model, tokens, release=True)
    engine = Engine(
        runner,
        eos_ids=[],
        max_num_seqs=64,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        prefix_caching=False,
    )
    numbers = random.Random(0)

    def prompt(tokens: int) -> list[int]:
        return [numbers.randrange(vocabulary) for _ in range(tokens)]

    try:
        for batch in BATCHES:
            steps = [
                generate(engine, [prompt(PROMPT_TOKENS) for _ in range(batch)], NEW_TOKENS)
                for _ in range(REPEATS)
            ]
            seconds = statistics.median(each.step_seconds for each in steps)
            yield {"measured": "step", "decoding": batch, "seconds": round(seconds, 5)}
        for length in PROMPTS:
            seconds = statistics.median(
                generate(engine, [prompt(length)], 1).seconds for _ in range(REPEATS)
            )
            yield {"measured": "prompt", "tokens": length, "seconds": round(seconds, 5)}
    finally:
        engine.close()
        runner.close()


def start_seconds(address: str, starts: int) -> dict[str, Any]:
    """Scale to two replicas and back, `starts` times."""
    config = yaml.safe_load(SERVE_CONFIG.read_text())
    (config["http_options"]["port"],) = free_ports(1)
    config["applications"] = config["applications"][:1]
    config["applications"][0]["args"]["checkpoint"] = address
    with (
        tempfile.TemporaryDirectory(prefix="gptj-start-") as folder,
        LocalRay.start(Path(folder), cpus=max(2, os.cpu_count() or 1)) as node,
    ):
        first = _scaled(node, config, 1)
        seconds = []
        for _ in range(starts):
            seconds.append(_scaled(node, config, 2))
            _scaled(node, config, 1)
    return {
        "measured": "start",
        "first_seconds": round(first, 2),  # includes starting Serve itself
        "seconds": [round(each, 2) for each in seconds],
        "median_seconds": round(statistics.median(seconds), 2),
    }


def _scaled(node: LocalRay, config: dict[str, Any], replicas: int) -> float:
    """Seconds until exactly this many replicas exist and are running."""
    wanted = copy.deepcopy(config)
    bounds = {"min_replicas": replicas, "max_replicas": replicas}
    wanted["applications"][0]["deployments"][0]["autoscaling_config"] |= bounds
    start = time.monotonic()
    _call(node, wanted)
    while (states := _states(node)) != ["RUNNING"] * replicas:
        if time.monotonic() > start + START_SECONDS:
            raise TimeoutError(f"expected {replicas} running replicas, got {states}")
        time.sleep(0.05)
    return time.monotonic() - start


def _states(node: LocalRay) -> list[str]:
    application = _call(node)["applications"].get("generation", {})
    deployment = application.get("deployments", {}).get("generation", {})
    return [replica["state"] for replica in deployment.get("replicas", [])]


def _call(node: LocalRay, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Serve's REST API: get the status or, with a config, deploy it."""
    request = urllib.request.Request(
        f"{node.dashboard}/api/serve/applications/",
        data=None if config is None else json.dumps(config).encode(),
        method="GET" if config is None else "PUT",
        headers={"Authorization": f"Bearer {node.token}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        content = reply.read()
    found: dict[str, Any] = json.loads(content) if config is None else {}
    return found


if __name__ == "__main__":
    main()

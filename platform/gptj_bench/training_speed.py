"""Tokens/s of training steps on one CPU worker, ours and transformers'.

    python -m gptj_bench.training_speed --model DIR [--runs full,lora] [--precision bf16|fp32]
        [--rows 4] [--length 256] [--steps 4] [--stage 0] [--data FILE] [--threads 2] [--repeats 1]
        [--peer PYTHON]

| run | what is trained |
|---|---|
| `full` | all weights, on rows without padding |
| `recomputed`, `selective` | the same with `model.gradient_checkpointing: true`, or `selective` |
| `lora` | LoRA on q_proj and v_proj, on the same rows |
| `packed`, `padded` | all weights, on --data's texts: best fit into rows, or a padded row each |

In bf16, ours keeps fp32 masters and moments. `--peer` is the Python of an environment with
transformers (peers/setup.sh makes one). Its full training alternates with ours: in bf16 once as
it is usually done, with weights and moments in bf16, and once with the states that ours keeps, by
autocast. Each measurement has a process of its own, whose first step, which allocates, does not
count. `python -m gptj_bench model DIR` writes a model.

Prints JSON lines: the machine, measurements, and the medians with the runs' ratios to `full` and
to the peers. A measurement of ours also has the share of the machine's matrix peak (MFU), the peak
memory, and, of one more step under PyTorch's profiler, the operators that take longest and the
share of time outside all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gptj.serialization.json_object import to_json
from gptj.training.loop import Worker, train
from gptj.training.settings import Settings
from gptj_bench.machine import description
from gptj_jobs import command_line
from gptj_local.processes import HOST, free_ports

PEER = Path(__file__).parent / "peers" / "train.py"
PEER_STATES = {"bf16": ("bf16", "masters"), "fp32": ("fp32",)}
RUNS: dict[str, dict[str, Any]] = {
    "full": {"data": {"packing": "concatenate"}},
    "recomputed": {
        "data": {"packing": "concatenate"},
        "model": {"gradient_checkpointing": True},
    },
    "selective": {
        "data": {"packing": "concatenate"},
        "model": {"gradient_checkpointing": "selective"},
    },
    "lora": {"data": {"packing": "concatenate"}, "adapter": {}},
    "packed": {"data": {"packing": "best_fit"}},
    "padded": {"data": {"packing": "none"}},
}
OPERATORS = 12  # reported


class _DoneError(Exception):
    """Enough steps were taken: nothing needs to be saved."""


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a checkpoint's folder")
    parser.add_argument("--runs", default="full,lora", help=", ".join(RUNS))
    parser.add_argument("--precision", choices=PEER_STATES, default="bf16")
    parser.add_argument("--rows", type=command_line.positive, default=4, help="of a step")
    parser.add_argument("--length", type=command_line.positive, default=256, help="tokens of a row")
    parser.add_argument("--steps", type=command_line.positive, default=4, help="that count")
    parser.add_argument("--stage", type=int, choices=range(4), default=0, help="deepspeed.stage")
    parser.add_argument("--data", default="", metavar="FILE", help="with a column text")
    parser.add_argument("--threads", type=command_line.positive, default=os.cpu_count())
    parser.add_argument("--repeats", type=command_line.positive, default=1)
    parser.add_argument("--peer", type=Path, metavar="PYTHON")
    parser.add_argument("--measure", metavar="RUN", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.measure:
        print(to_json(measure(given.measure, given)), flush=True)
        return
    runs = given.runs.split(",")
    if unknown := [run for run in runs if run not in RUNS]:
        parser.error(f"unknown runs {', '.join(unknown)}; choose from {', '.join(RUNS)}")
    if not given.data and {"packed", "padded"} & {*runs}:
        parser.error("packed and padded need --data FILE")
    print(to_json(description()), flush=True)
    rates: dict[str, list[float]] = {}
    for _ in range(given.repeats):
        for command in commands(runs, given):
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            line = done.stdout.strip().splitlines()[-1]
            print(line, flush=True)
            found = json.loads(line)
            rates.setdefault(found["engine"], []).append(found["useful_tokens_per_s"])
    medians = {engine: statistics.median(each) for engine, each in rates.items()}
    print(to_json({"useful_tokens_per_s": medians, "ratios": ratios(medians)}), flush=True)


def commands(runs: Sequence[str], given: argparse.Namespace) -> Iterator[list[str]]:
    sizes = [
        word
        for name in ("model", "rows", "length", "steps", "threads")
        for word in (f"--{name}", str(getattr(given, name)))
    ]
    ours = ["--precision", given.precision, "--stage", str(given.stage), "--data", given.data]
    for run in runs:
        yield [sys.executable, "-m", __spec__.name, *sizes, *ours, "--measure", run]
        if run == "full" and given.peer is not None:
            for states in PEER_STATES[given.precision]:
                yield [str(given.peer), str(PEER), *sizes, "--states", states]


def ratios(medians: dict[str, float]) -> dict[str, float]:
    """Of `full` to the peers, of other ways to train to `full`, of `packed` to `padded`."""
    pairs = [("full", engine) for engine in medians if engine not in RUNS]
    pairs += [(other, "full") for other in ("recomputed", "selective", "lora")]
    pairs += [("packed", "padded")]
    return {
        f"{one} / {other}": round(medians[one] / medians[other], 2)
        for one, other in pairs
        if {one, other} <= medians.keys()
    }


def measure(run: str, given: argparse.Namespace) -> dict[str, Any]:
    """A run's medians over its steps, in this process."""
    points: list[dict[str, float]] = []
    profiler = profile(activities=[ProfilerActivity.CPU])
    began = 0.0

    def watch(point: dict[str, float]) -> None:
        nonlocal began
        points.append(point)
        if len(points) == given.steps + 1:
            profiler.start()
            began = time.perf_counter()
        elif len(points) == given.steps + 2:
            raise _DoneError

    torch.set_num_threads(given.threads)
    fields = {name: dict(value) for name, value in RUNS[run].items()}
    fields["data"]["sequence_length"] = given.length
    if given.data:
        fields["data"]["train"] = given.data
    with tempfile.TemporaryDirectory(prefix="gptj-speed-") as folder:
        settings = Settings.model_validate(
            {
                "storage": folder,
                "steps": given.steps + 3,
                "batch_size": given.rows,
                "micro_batch_size": given.rows,
                "log_every": 1,
                "deepspeed": {"stage": given.stage, "precision": given.precision},
                **fields,
                "model": {"checkpoint": given.model, **fields.get("model", {})},
            }
        )
        (port,) = free_ports(1)
        os.environ.update(MASTER_ADDR=HOST, MASTER_PORT=str(port))
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        torch.distributed.init_process_group("gloo", rank=0, world_size=1)
        worker = Worker(0, 1, torch.device("cpu"), lambda *_: None, watch=watch)
        with contextlib.suppress(_DoneError):
            train(settings, worker)
        seconds = time.perf_counter() - began
        profiler.stop()
        torch.distributed.destroy_process_group()
    counted = points[1 : given.steps + 1]
    shares = operator_shares(profiler, seconds)
    return {
        "engine": run,
        "precision": given.precision,
        "stage": given.stage,
        "rows": given.rows,
        "length": given.length,
        "tokens_per_s": _median(
            [each["tokens_per_second"] / each["useful_tokens"] for each in counted]
        ),
        "useful_tokens_per_s": _median([each["tokens_per_second"] for each in counted]),
        "each": [round(each["tokens_per_second"], 1) for each in counted],
        "mfu": round(statistics.median(each["mfu"] for each in counted), 3),
        "memory_gb": round(counted[-1]["memory_bytes"] / 1e9, 2),
        "operators": dict(list(shares.items())[:OPERATORS]),
        "outside_operators": round(max(0.0, 1 - sum(shares.values())), 3),
    }


def operator_shares(profiler: profile, seconds: float) -> dict[str, float]:
    """Each operator's share of the time, without the operators that it calls; largest first."""
    spent = {each.key: each.self_cpu_time_total / 1e6 for each in profiler.key_averages()}
    ordered = sorted(spent.items(), key=lambda each: each[1], reverse=True)
    return {name: round(each / seconds, 3) for name, each in ordered}


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 1)


if __name__ == "__main__":
    main()

"""The throughput of jobs/batch_inference.py relative to the bare engine, on the same prompts.

    python -m gptj_bench.batch_inference --model DIR --dtype bfloat16|float32|float16|int8|int4|fp8
                                         [--rows 256] [--prompt-tokens 64] [--new-tokens 64]
                                         [--max-num-seqs 16] [--repeats 3]

Greedy, ignoring eos. The engine gets all rows' token ids at once. The job, on a Ray cluster of this
machine, reads text from a file and writes text; it runs with `rows` rows and with three times as
many, and the difference gives the time of the rows, without starting Ray and loading the model.
Prints JSON lines: the machine, each measurement, and the medians with their ratio (goal: 0.9).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gptj import GPTJTokenizer
from gptj.engine.engine import Engine
from gptj.serialization.json_object import to_json
from gptj.storage.addresses import absolute
from gptj_bench import machine
from gptj_bench.decode import (
    DTYPES,
    SPARE_TOKENS,
    TEXT_IDS,
    WARM_UP_TOKENS,
    generate,
    load_runner,
    split_dtype,
)
from gptj_jobs import command_line
from gptj_local.ray import LocalRay

PROGRAM = Path(__file__).resolve().parents[2] / "jobs" / "batch_inference.py"
LONGER = 3  # times the rows of the short run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=command_line.address, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args(arguments)
    given.model = absolute(given.model) if Path(given.model).exists() else given.model
    print(to_json(machine.description()), flush=True)
    texts, ids = prompts(given)
    found: dict[str, list[float]] = {"engine": [], "job": []}
    with tempfile.TemporaryDirectory(prefix="gptj-benchmark-") as name:
        folder = Path(name)
        # One CPU more than exist, for the reading task, which mostly waits.
        with LocalRay.start(folder / "ray", cpus=(os.cpu_count() or 1) + 1) as node:
            environment = {**os.environ, **node.environment()}
            for repeat in range(given.repeats):  # alternately, since a machine's speed varies
                engine = engine_speed(given, ids)
                job = job_speed(given, texts, folder / str(repeat), environment)
                for kind, speed in (("engine", engine), ("job", job)):
                    found[kind].append(speed)
                    print(to_json({"kind": kind, "tokens_per_s": round(speed, 1)}), flush=True)
    medians = {kind: statistics.median(speeds) for kind, speeds in found.items()}
    rounded = {f"{kind}_tokens_per_s": round(speed, 1) for kind, speed in medians.items()}
    print(
        to_json({**vars(given), **rounded, "ratio": round(medians["job"] / medians["engine"], 3)})
    )


def prompts(given: argparse.Namespace) -> tuple[list[str], list[list[int]]]:
    """Random texts, and their ids as the job will tokenize them."""
    tokenizer = GPTJTokenizer.from_pretrained(given.model)
    numbers = random.Random(0)
    below = min(TEXT_IDS, len(tokenizer) - 1)
    count = (LONGER - 1) * given.rows
    texts = [
        tokenizer.decode([numbers.randrange(below) for _ in range(given.prompt_tokens)])
        for _ in range(count)
    ]
    return texts, [tokenizer.encode(text) for text in texts]


def engine_speed(given: argparse.Namespace, ids: Sequence[Sequence[int]]) -> float:
    """New tokens/s of the engine, configured as in the job's workers."""
    torch.set_num_threads(os.cpu_count() or 1)
    longest = max(map(len, ids)) + given.new_tokens + SPARE_TOKENS
    runner = load_runner(given.model, given.dtype, lambda _: given.max_num_seqs * longest)
    engine = Engine(
        runner,
        eos_ids=[],
        max_num_seqs=given.max_num_seqs,
        max_queued=len(ids),
        max_num_batched_tokens=max(256, given.max_num_seqs),
        prefix_caching=False,
    )
    try:
        generate(engine, ids[: given.max_num_seqs], WARM_UP_TOKENS)
        timing = generate(engine, ids, given.new_tokens)
    finally:
        engine.close()
        runner.close()
    return timing.tokens / timing.seconds


def job_speed(
    given: argparse.Namespace, texts: Sequence[str], folder: Path, environment: dict[str, str]
) -> float:
    """New tokens/s of the rows that the longer of two runs has in addition."""
    folder.mkdir()
    seconds = []
    for number, count in enumerate((given.rows, LONGER * given.rows)):
        data = folder / f"{number}.jsonl"
        rows = [{"text": texts[n % len(texts)]} for n in range(count)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        started = time.monotonic()
        _run(given, data, folder / f"output-{number}", environment)
        seconds.append(time.monotonic() - started)
    more_rows = (LONGER - 1) * given.rows
    speed: float = more_rows * given.new_tokens / (seconds[1] - seconds[0])
    return speed


def _run(given: argparse.Namespace, data: Path, output: Path, environment: dict[str, str]) -> None:
    dtype, quantization = split_dtype(given.dtype)
    words = [
        f"args.dtype={dtype}",
        f"args.quantization={quantization}",
        f"cpus={os.cpu_count() or 1}",
        "args.prefix_caching=false",
        f"args.max_num_seqs={given.max_num_seqs}",
        f"parameters.max_tokens={given.new_tokens}",
        "parameters.temperature=0",
        "parameters.ignore_eos=true",
    ]
    command = [sys.executable, str(PROGRAM), given.model, str(data), str(output), *words]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr[-3000:]}")
    index: dict[str, Any] = json.loads((output / "index.json").read_text())
    if index["failed"]:
        raise RuntimeError(f"{index['failed']} rows failed: see {output}")


if __name__ == "__main__":
    main()

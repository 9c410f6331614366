"""How much memory data take on their way to a training, at several sizes: it should not grow.

    python -m gptj_bench.data_memory [--megabytes 50 200] [--task TASK] [--squad] [--limit MB]

Each size has a process of its own: raw rows are prepared, become a node's memory-mapped examples,
and go through the loader for an epoch. The peak is what the process had of private memory at most
(RssAnon) beyond what it had before; mapped files, which the kernel can drop, are not in it. With
`--limit` the kernel gives it no more than so much (RLIMIT_DATA). One JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from threading import Event, Thread
from typing import cast

from gptj import GPTJTokenizer
from gptj.data.batches import BatchOrder
from gptj.data.preparing import prepare
from gptj.data.shards import SHARD_KINDS, TaskName
from gptj.serialization.json_object import to_json
from gptj.training.dataset import node_data, raw_plan
from gptj.training.loader import Loader
from gptj.training.settings import Settings

WORDS = "the cat is old and the dog is new so the house is so so and quite what it was".split()
SAMPLE_SECONDS = 0.005


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--task", choices=list(SHARD_KINDS), default="causal-lm")
    parser.add_argument("--shard-characters", type=int, default=2**20)
    parser.add_argument("--squad", action="store_true", help="rows in SQuAD's own form")
    parser.add_argument("--limit", type=int, metavar="MB", help="of private memory, beyond now's")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    task = cast(TaskName, "question-answering" if options.squad else options.task)
    if options.measure:
        found = measure(
            task, options.megabytes[0], options.shard_characters, options.squad, options.limit
        )
        print(to_json(found), flush=True)
        return
    for size in options.megabytes:
        fixed = ["--task", task, "--shard-characters", str(options.shard_characters)]
        fixed += ["--squad"] if options.squad else []
        fixed += ["--limit", str(options.limit)] if options.limit is not None else []
        command = [sys.executable, "-m", __spec__.name, "--measure", "--megabytes", str(size)]
        subprocess.run([*command, *fixed], check=True)


def measure(
    task: TaskName, megabytes: int, shard_characters: int, squad: bool, limit: int | None
) -> dict[str, object]:
    """The peak of one size, in this process."""
    tokenizer = GPTJTokenizer.train([" ".join(WORDS), "0123456789"], 400)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = folder / ("train.json" if squad else "rows.jsonl")
        write_rows(raw, task, megabytes)
        if squad:
            as_squad(raw)
        if limit is not None:
            most = status("VmData") + limit * 1_000_000
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        settings = Settings(task=task, storage=name, data={"train": str(raw)})  # type: ignore[arg-type]
        with peak_of_private_memory() as peak:
            plan = raw_plan(settings, "train", tokenizer, chunk_characters=shard_characters)
            index = prepare(plan, str(folder / "prepared"), tokenizer)
            prepared = {"train": str(folder / "prepared")}
            data = node_data(settings, tokenizer, folder, prepared).train
            tokens = 0
            steps = len(data) // 8
            order = BatchOrder(len(data), 8, seed=0)
            with Loader(
                data, order, rank=0, world_size=1, micro_batch=8, first=0, last=steps
            ) as loader:
                for _ in range(steps):
                    tokens += loader.next()[0].tokens
    return {
        "task": task,
        "squad": squad,
        "raw_mb": megabytes,
        "limit_mb": limit,
        "tokens": index.tokens,
        "examples": len(data),
        "peak_mb": round(peak[0] / 1e6, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def write_rows(path: Path, task: TaskName, megabytes: float) -> None:
    """Rows of about a kilobyte, all of them different."""
    with path.open("w") as file:
        number = 0
        while file.tell() < megabytes * 1e6:
            number += 1
            text = f"{number} " + " ".join(WORDS[(number * n) % len(WORDS)] for n in range(1, 200))
            row: dict[str, object] = {"text": text, "label": f"label {number % 7}"}
            if task == "question-answering":
                place = text.find("the")
                answers = [{"text": "the", "answer_start": place}] if place >= 0 else []
                row = {"question": f"what is {number}?", "context": text, "answers": answers}
            file.write(json.dumps(row) + "\n")


def as_squad(path: Path) -> None:
    """Turn question answering's rows into SQuAD's own form, ten to an article."""
    lines = path.with_suffix(".lines")
    path.rename(lines)
    with lines.open() as rows, path.open("w") as file:
        file.write('{"version": "v2.0", "data": [')
        for number, articles in enumerate(batched(rows, 10)):
            fields = [json.loads(row) for row in articles]
            paragraphs = [{"context": each.pop("context"), "qas": [each]} for each in fields]
            article = {"title": str(number), "paragraphs": paragraphs}
            file.write(("," if number else "") + json.dumps(article))
        file.write("]}")
    lines.unlink()


def batched(rows: Iterable[str], size: int) -> Iterator[list[str]]:
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


@contextmanager
def peak_of_private_memory() -> Iterator[list[int]]:
    """Bytes beyond those at the beginning, in a list of one, once the block has ended."""
    before, peak, done = private_memory(), [0], Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], private_memory() - before)

    thread = Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def private_memory() -> int:
    """Bytes of this process that no file backs."""
    return status("RssAnon")


def status(name: str) -> int:
    """Bytes, of this process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}: this needs Linux 4.5 or later")


if __name__ == "__main__":
    main()

"""How much memory data take on their way to a training, at several sizes: it should not grow.

    python -m gptj_bench.data_memory [--megabytes 50 200] [--task TASK] [--shard-characters N]

Each size has a process of its own: raw rows are prepared, become a node's memory-mapped examples,
and go through the loader for an epoch. The peak is what the process had of private memory at most
(RssAnon) beyond what it had before; mapped files, which the kernel can drop, are not in it. One
JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

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
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.measure:
        found = measure(options.task, options.megabytes[0], options.shard_characters)
        print(to_json(found), flush=True)
        return
    for size in options.megabytes:
        fixed = ["--task", options.task, "--shard-characters", str(options.shard_characters)]
        command = [sys.executable, "-m", __spec__.name, "--measure", "--megabytes", str(size)]
        subprocess.run([*command, *fixed], check=True)


def measure(task: TaskName, megabytes: int, shard_characters: int) -> dict[str, object]:
    """The peak of one size, in this process."""
    tokenizer = GPTJTokenizer.train([" ".join(WORDS), "0123456789"], 400)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = folder / "rows.jsonl"
        write_rows(raw, task, megabytes)
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
        "raw_mb": megabytes,
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
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this needs Linux 4.5 or later")


if __name__ == "__main__":
    main()

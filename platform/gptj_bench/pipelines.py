"""Classification and question answering beside transformers, on the same texts.

    python -m gptj_bench.pipelines [--task classification,question-answering]
        [--dtypes float32,bfloat16,int8] [--peer-dtypes float32,bfloat16] [--batches 1,8,16]
        [--clients 16] [--texts 48] [--rounds 3] [--layers 16] [--width 1024] [--threads 2]
        [--median-words 40] [--peer PYTHON]

Random models of one layout, in the precisions given. Ours is the deployment's application behind
uvicorn, and `--clients` clients ask it over HTTP, one text at a time. transformers gets all
texts at once, in the same process as its model, in batches of each size: the pipeline
text-classification, and for question answering, for which transformers 5 has none, its model in a
loop (peers/pipeline.py). `--peer` is the Python of an environment with transformers; default: this.

Texts are English, their numbers of words lognormal: a few of them ten times as long as the median.
Contexts have three times as many words. In each round every engine answers all texts once, in turn.
Prints JSON lines: the machine, each measurement (wall seconds, and CPU seconds of the process with
the model), and each engine's medians with the ratios of transformers' fastest setting of all to it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import uvicorn

from deployments import classification, question_answering
from deployments.loading import BatchArguments
from gptj import GPTJConfig, GPTJForQuestionAnswering, GPTJForSequenceClassification, GPTJTokenizer
from gptj.data import samples
from gptj.serialization.json_object import to_json
from gptj.serving.classification import classification_app
from gptj.serving.question_answering import question_answering_app
from gptj_bench import machine
from gptj_bench.decode import DTYPES, split_dtype
from gptj_bench.vocabulary import gpt2_tokenizer
from gptj_jobs import command_line
from gptj_local.processes import HOST, free_ports, running

PEER = Path(__file__).parent / "peers" / "pipeline.py"
HEADS = {
    "classification": GPTJForSequenceClassification,
    "question-answering": GPTJForQuestionAnswering,
}
SIGMA = 0.8  # of the lognormal distribution
MIN_WORDS, MAX_WORDS = 4, 280
CONTEXT_WORDS = 3  # times a text's
START_SECONDS = 300
Row = dict[str, Any]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default=",".join(HEADS))
    parser.add_argument("--dtypes", default="float32,bfloat16,int8", help="of ours")
    parser.add_argument("--peer-dtypes", default="float32,bfloat16", help="of transformers")
    parser.add_argument("--batches", default="1,8,16", help="of transformers")
    parser.add_argument("--clients", type=command_line.positive, default=16)
    parser.add_argument("--texts", type=command_line.positive, default=48)
    parser.add_argument("--rounds", type=command_line.positive, default=3)
    parser.add_argument("--layers", type=command_line.positive, default=16)
    parser.add_argument("--width", type=command_line.positive, default=1024)
    parser.add_argument("--threads", type=command_line.positive, default=os.cpu_count())
    parser.add_argument("--median-words", type=command_line.positive, default=40)
    parser.add_argument("--peer", type=Path, default=Path(sys.executable), metavar="PYTHON")
    parser.add_argument("--serve", metavar="DTYPE", help=argparse.SUPPRESS)  # in a process of ours
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.serve:
        serve(given.task, given.model, given.serve, given.port, given.threads)
        return
    tasks, ours = given.task.split(","), given.dtypes.split(",")
    if unknown := (set(tasks) - set(HEADS)) | (set(ours) - set(DTYPES)):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    show({**machine.description(), "transformers": machine.installed("transformers")})
    show({"settings": {name: str(value) for name, value in vars(given).items()}})
    for task in tasks:
        for row in compare(task, ours, given):
            show(row)


def compare(task: str, dtypes: Sequence[str], given: argparse.Namespace) -> Iterator[Row]:
    """Each measurement, then the medians."""
    with tempfile.TemporaryDirectory(prefix="gptj-pipelines-") as folder, ExitStack() as stack:
        model = Path(folder) / "model"
        tokens = write_model(task, model, given.layers, given.width)
        inputs = texts(task, given.texts, given.median_words)
        lengths = [len(tokens.encode(text_of(each))) for each in inputs]
        yield {
            "task": task,
            "texts": len(inputs),
            "tokens": sum(lengths),
            "shortest": min(lengths),
            "median": statistics.median(lengths),
            "longest": max(lengths),
        }
        engines: dict[str, Ours | Theirs] = {}
        for dtype in dtypes:
            engines[f"ours, {dtype}"] = stack.enter_context(
                Ours.start(task, model, dtype, given.clients, given.threads)
            )
        for dtype in given.peer_dtypes.split(","):
            process = stack.enter_context(Theirs.start(task, model, dtype, given))
            for batch in map(int, given.batches.split(",")):
                engines[f"transformers, {dtype}, batch {batch}"] = process.with_batch(batch)
        rows: dict[str, list[Row]] = {name: [] for name in engines}
        for engine in engines.values():
            engine.answer(inputs[: max(2, given.clients)])  # allocations and compilation
        for number in range(given.rounds):
            for name, engine in engines.items():
                rows[name].append(engine.answer(inputs))
                yield {"task": task, "engine": name, "round": number, **rows[name][-1]}
        yield from medians(task, rows, sum(lengths))


def medians(task: str, rows: dict[str, list[Row]], tokens: int) -> Iterator[Row]:
    """Each engine's, and transformers' fastest setting divided by it; medians of each round's."""
    theirs = [name for name in rows if name.startswith("transformers")]
    best = {
        key: min(theirs, key=lambda name: statistics.median(row[key] for row in rows[name]))
        for key in ("wall_s", "cpu_s")
    }
    for name, each in rows.items():
        summary: Row = {"task": task, "engine": name}
        for key, fastest in best.items():
            summary[key] = round(statistics.median(row[key] for row in each), 3)
            ratios = [other[key] / row[key] for other, row in zip(rows[fastest], each, strict=True)]
            summary[f"{key}_ratio"] = round(statistics.median(ratios), 2)
            summary[f"{key}_ratios"] = [round(ratio, 2) for ratio in ratios]
        summary["tokens_per_s"] = round(tokens / summary["wall_s"], 1)
        yield summary


class Ours:
    """The application in a process of its own."""

    def __init__(self, process: psutil.Process, url: str, clients: int) -> None:
        self._process = process
        self._url = url
        self._clients = clients

    @classmethod
    @contextmanager
    def start(
        cls, task: str, model: Path, dtype: str, clients: int, threads: int
    ) -> Iterator[Ours]:
        (port,) = free_ports(1)
        log = model.parent / f"{dtype}.log"
        command = [sys.executable, "-m", "gptj_bench.pipelines", "--task", task, "--serve", dtype]
        command += [f"--model={model}", f"--port={port}", f"--threads={threads}"]
        with running(command, environment=os.environ, log=log) as process:
            url = f"http://{HOST}:{port}"
            deadline = time.monotonic() + START_SECONDS
            while not answers(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the service does not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.2)
            yield cls(psutil.Process(process.pid), url, clients)

    def answer(self, inputs: Sequence[Any]) -> Row:
        before = self._process.cpu_times()
        wall = asyncio.run(self._ask(list(inputs)))
        after = self._process.cpu_times()
        cpu = after.user + after.system - before.user - before.system
        return {"wall_s": round(wall, 3), "cpu_s": round(cpu, 3)}

    async def _ask(self, waiting: list[Any]) -> float:
        """Wall seconds, without creating the session, which reads certificates."""
        limits = httpx.Limits(max_connections=self._clients)
        async with httpx.AsyncClient(timeout=START_SECONDS, limits=limits) as session:

            async def client() -> None:
                while waiting:
                    reply = await session.post(self._url, json={"inputs": waiting.pop(0)})
                    reply.raise_for_status()

            start = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(self._clients)))
            return time.perf_counter() - start


class Theirs:
    """peers/pipeline.py in a process of its own, with one batch size."""

    def __init__(self, process: subprocess.Popen[str], batch: int) -> None:
        self._process = process
        self._batch = batch

    @classmethod
    @contextmanager
    def start(
        cls, task: str, model: Path, dtype: str, given: argparse.Namespace
    ) -> Iterator[Theirs]:
        command = [str(given.peer), str(PEER), task, f"--model={model}", f"--dtype={dtype}"]
        command += [f"--threads={given.threads}"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
            found = cls(process, 1)
            found._read()
            try:
                yield found
            finally:
                process.kill()

    def with_batch(self, batch: int) -> Theirs:
        return Theirs(self._process, batch)

    def answer(self, inputs: Sequence[Any]) -> Row:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"batch": self._batch, "inputs": list(inputs)}) + "\n")
        self._process.stdin.flush()
        return {name: round(seconds, 3) for name, seconds in self._read().items()}

    def _read(self) -> Row:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"transformers ended with status {self._process.wait()}")
        reply: Row = json.loads(line)
        return reply


def serve(task: str, model: str, dtype: str, port: int, threads: int) -> None:
    """Run the deployment's application until killed."""
    torch.set_num_threads(threads)
    plain, quantization = split_dtype(dtype)
    settings: Any = {"checkpoint": model, "dtype": plain, "quantization": quantization}
    device = torch.device("cpu")
    if task == "classification":
        labels = classification.load_service(BatchArguments(**settings), device)
        app = classification_app(labels, lambda: labels.alive(START_SECONDS))
    else:
        arguments = question_answering.Arguments(**settings)
        answering = question_answering.load_service(arguments, device)
        app = question_answering_app(answering, lambda: answering.alive(START_SECONDS))
    uvicorn.run(app, host=HOST, port=port, log_level="warning")


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def texts(task: str, number: int, median: int) -> list[Any]:
    """Inputs of the task, always the same ones."""
    numbers = random.Random(0)
    words = " ".join(row["text"] for row in samples.read("sample://documentation")).split()

    def text(times: float) -> str:
        drawn = numbers.lognormvariate(math.log(median), SIGMA) * times
        count = max(MIN_WORDS, min(MAX_WORDS, round(drawn)))
        start = numbers.randrange(len(words) - count)
        return " ".join(words[start : start + count])

    if task == "classification":
        return [text(1) for _ in range(number)]
    return [{"question": text(10 / median), "context": text(CONTEXT_WORDS)} for _ in range(number)]


def text_of(each: Any) -> str:
    return each if isinstance(each, str) else f"{each['question']}{each['context']}"


def write_model(task: str, folder: Path, layers: int, width: int) -> GPTJTokenizer:
    """A random fp32 model with GPT-2's vocabulary; returns its tokenizer."""
    tokenizer = gpt2_tokenizer()
    torch.manual_seed(0)
    heads, pad = width // 64, tokenizer.eos_token_id
    config = GPTJConfig(n_embd=width, n_layer=layers, n_head=heads, rotary_dim=32, pad_token_id=pad)
    HEADS[task](config).save_pretrained(str(folder), tokenizer=tokenizer)
    return tokenizer


def show(row: Row) -> None:
    print(to_json(row), flush=True)


if __name__ == "__main__":
    main()

"""Benchmark the engine and the service against the engines that users might choose instead.

    python -m gptj_bench decode --model DIR --dtype bfloat16,float32,float16,int8,int4,fp8
                             [--batch 1,8,16] [--prompt-tokens 64] [--new-tokens 64] [--threads 2]
                             [--repeats 1] [--peers DIR] [--least-gb-per-s 0]
    python -m gptj_bench decode --preset 6b …  (random weights, made on the device)
    python -m gptj_bench serve  --model DIR --dtype … [--concurrency 1,8,32] [--rounds 2]
                             [--prompt-tokens 64] [--new-tokens 48] [--repeats 1] [--peers DIR]
    python -m gptj_bench mlperf --model DIR --dtype … [--scenario offline|server|both]
                             [--prompts DATA] [--prompt-tokens 64] [--samples 24]
                             [--min-duration 10] [--target-qps 1] [--concurrency 32]
                             [--logs outputs/mlperf] [--url ADDRESS]
    python -m gptj_bench grammar --model DIR --dtype … [--batch 8,16] [--new-tokens 64]
                             [--repeats 7] [--outputs 4]
    python -m gptj_bench speculation --dtype … [--batch 1,8] [--new-tokens 128] [--repeats 5]
                             [--threads 2] [--width 16] [--layers 16]
    python -m gptj_bench adapters --model DIR --dtype … [--batch 8] [--adapters 8] [--rank 16]
                             [--modules q_proj,v_proj] [--new-tokens 64] [--repeats 7]
    python -m gptj_bench perplexity --model DIR --data FILE
                             [--dtypes float32,bfloat16,int8,int4] [--quantized DIR]
    python -m gptj_bench load   --folder DIR [--size 6b|small|tiny] [--repeats 1] [--readers …]
                             [--no-s3] [--keep]
    python -m gptj_bench model DIR

Prints JSON lines: the machine and settings first, then measurements, then medians over the repeats
and our ratio to the best other engine of that dtype; at the end a table. With --peers, a folder
with the environments that peers/setup.sh makes, other engines alternate with ours, one at a time.
A measurement of `decode` on a CPU is repeated while it is disturbed, see pace.py; with
--least-gb-per-s it waits until memory gives that much.
`model` writes a random GPT-J of 305 M parameters with GPT-2's vocabulary (from a development
dependency) to measure with. `perplexity` measures the cost of the engine's dtypes on a text, in
rows as long as the model's context; int4 is rounded to nearest, and --quantized adds the folder
that jobs/quantize.py made of the model. `grammar` measures the cost of constrained output, see
grammar.py; `speculation` its gains and costs, on its own weights, see
speculation.py; `adapters` the cost of concurrent adapters, see adapters.py. `mlperf` sends MLPerf's
load to our service, or to one at --url: see mlperf.py. `load` writes a random fp16 model into DIR
and, by default, a second copy into an S3 server there, reads them in separate processes (see
load_weights.py), from S3 with and without the node's checkpoint cache, and deletes them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer, storage
from gptj.adapters.config import TARGET_MODULES
from gptj.checkpoints.manifest import MANIFEST
from gptj.config import PRESETS
from gptj.engine.runners.base import PAGE_SIZE, Runner
from gptj.engine.runners.lora import LoRALimits
from gptj.serialization.json_object import to_json
from gptj_bench import adapters, grammar, load_weights, machine, mlperf
from gptj_bench.decode import DTYPES, OURS, TEXT_IDS, Decode, load_runner, split_dtype
from gptj_bench.http_load import Load
from gptj_bench.perplexity import Perplexity
from gptj_bench.serve import MODEL_NAME, ours, ray_serve_llm, vllm
from gptj_bench.speculation import SpeculationBenchmark
from gptj_bench.vocabulary import gpt2_tokenizer
from gptj_jobs import command_line

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, default_batch, new in (("decode", "1,8,16", 64), ("serve", "1,8,32", 48)):
        command = commands.add_parser(name)
        command.add_argument("--model", type=command_line.address, required=name == "serve")
        if name == "decode":
            command.add_argument("--dtype", default=("bfloat16",), type=_dtypes)
        else:
            command.add_argument("--dtype", default="bfloat16", choices=DTYPES)
        sizes = "--batch" if name == "decode" else "--concurrency"
        command.add_argument(sizes, default=default_batch, type=_numbers, dest="sizes")
        command.add_argument("--prompt-tokens", type=int, default=64)
        command.add_argument("--new-tokens", type=int, default=new)
        command.add_argument("--repeats", type=int, default=1)
        command.add_argument("--peers", type=command_line.folder)
        if name == "decode":
            command.add_argument("--preset", choices=PRESETS)  # random weights
            command.add_argument("--threads", type=int, default=os.cpu_count())
            command.add_argument("--least-gb-per-s", type=float, default=0.0)
        else:
            command.add_argument("--rounds", type=int, default=2)
    command = commands.add_parser("grammar")
    command.add_argument("--model", type=command_line.address, required=True)
    command.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    command.add_argument("--batch", default="8,16", type=_numbers, dest="sizes")
    command.add_argument("--new-tokens", type=int, default=64)
    command.add_argument("--repeats", type=int, default=7)
    command.add_argument("--outputs", type=int, default=4)  # random ones of each schema
    command = commands.add_parser("speculation")
    command.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    command.add_argument("--batch", default="1,8", type=_numbers, dest="sizes")
    command.add_argument("--new-tokens", type=int, default=128)
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--threads", type=int, default=os.cpu_count())
    command.add_argument("--width", type=int, default=16)  # n_embd / 64
    command.add_argument("--layers", type=int, default=16)
    command = commands.add_parser("adapters")
    command.add_argument("--model", type=command_line.address, required=True)
    command.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    command.add_argument("--batch", default="8", type=_numbers, dest="sizes")
    command.add_argument("--adapters", type=int, default=8)
    command.add_argument("--rank", type=int, default=16)
    command.add_argument("--modules", type=_modules, default=("q_proj", "v_proj"))
    command.add_argument("--new-tokens", type=int, default=64)
    command.add_argument("--repeats", type=int, default=7)
    mlperf.add_arguments(commands.add_parser("mlperf"))
    command = commands.add_parser("perplexity")
    command.add_argument("--model", type=command_line.address, required=True)
    command.add_argument("--data", type=command_line.data_address, required=True)
    command.add_argument("--dtypes", default="float32,bfloat16,int8,int4", type=_dtypes)
    command.add_argument("--quantized", type=command_line.address)
    command = commands.add_parser("load")
    command.add_argument("--folder", required=True, type=command_line.folder)
    command.add_argument("--size", default="6b", choices=["6b", "small", "tiny"])
    command.add_argument("--repeats", type=int, default=1)
    command.add_argument(
        "--readers", nargs="+", choices=load_weights.READERS, default=load_weights.READERS
    )
    command.add_argument("--no-s3", action="store_true")
    command.add_argument("--keep", action="store_true", help="keep the model on disk")
    commands.add_parser("model").add_argument("folder", type=command_line.address)
    given = parser.parse_args(arguments)
    if given.command == "model":
        write_model(given.folder)
        return
    if given.command == "decode" and (given.model is None) == (given.preset is None):
        parser.error("give either --model or --preset")
    if given.command == "decode" and given.preset and given.peers:
        parser.error("--peers needs --model: other engines read their weights from a folder")
    settings = {name: str(value) for name, value in vars(given).items()}
    _show({**machine.description(), "settings": settings})
    if given.command == "mlperf":
        for row in mlperf.measure(given):
            _show(row)
        return
    if given.command == "grammar":
        for row in constrained(given):
            _show(row)
        return
    if given.command == "speculation":
        benchmark = SpeculationBenchmark(
            given.dtype,
            tuple(given.sizes),
            given.new_tokens,
            given.threads,
            given.repeats,
            given.width,
            given.layers,
        )
        for row in benchmark.run():
            _show(row)
        return
    if given.command == "adapters":
        for row in adapted(given):
            _show(row)
        return
    if given.command == "perplexity":
        for row in Perplexity(given.model, given.data, given.dtypes, given.quantized).run():
            _show(row)
        return
    if given.command == "load":
        load(given)
        return
    rows = decode(given) if given.command == "decode" else serve(given)
    summary = summarized(rows)
    for row in summary:
        _show(row)
    print(table(summary))


def decode(given: argparse.Namespace) -> list[Row]:
    benchmark = Decode(
        given.model or given.preset,
        given.dtype,
        tuple(given.sizes),
        given.prompt_tokens,
        given.new_tokens,
        given.threads,
        given.repeats,
        given.preset is not None,
        given.peers,
        given.least_gb_per_s,
    )
    rows = [_show(row) for row in benchmark.run()]
    return [row for row in rows if "tokens_per_s" in row]


def serve(given: argparse.Namespace) -> list[Row]:
    """Our service, vLLM's, and Ray Serve LLM under the same load, each after a warm-up."""
    dtype, quantization = split_dtype(given.dtype)
    arguments = {"dtype": dtype, "quantization": quantization}
    rows: list[Row] = []
    for _ in range(given.repeats):
        with tempfile.TemporaryDirectory(prefix="gptj-benchmark-") as name:
            folder = Path(name)
            rows += _loaded(OURS, given.dtype, ours(given.model, arguments, folder), given)
            if given.peers:
                python = given.peers / "vllm" / "bin" / "python"
                rows += _loaded("vllm", "bfloat16", vllm(given.model, python, folder), given)
                python = given.peers / "ray-llm" / "bin" / "python"
                service = ray_serve_llm(given.model, python, folder)
                rows += _loaded("ray-serve-llm", "bfloat16", service, given)
    return rows


def constrained(given: argparse.Namespace) -> Iterator[Row]:
    tokenizer = GPTJTokenizer.from_pretrained(given.model)
    rows = GPTJConfig.from_pretrained(given.model).vocab_size
    yield from grammar.libraries(tokenizer, rows, given.outputs)
    for batch in given.sizes:
        tokens = batch * (grammar.PROMPT + given.new_tokens + PAGE_SIZE)
        runner = load_runner(given.model, given.dtype, partial(_cache, tokens))
        yield from grammar.steps(runner, tokenizer, batch, given.new_tokens, given.repeats)
        runner.close()


def adapted(given: argparse.Namespace) -> Iterator[Row]:
    for batch in given.sizes:
        tokens = batch * (adapters.PROMPT + given.new_tokens + PAGE_SIZE)

        def make(lora: LoRALimits | None, tokens: int = tokens) -> Runner:
            return load_runner(given.model, given.dtype, partial(_cache, tokens), lora=lora)

        settings = (given.adapters, given.rank, given.modules, given.new_tokens, given.repeats)
        yield from adapters.measure(make, batch, *settings)


def _cache(tokens: int, config: GPTJConfig) -> int:
    """Cache tokens: at least one context."""
    return max(tokens, config.n_positions)


def load(given: argparse.Namespace) -> None:
    """Write the model, read it from disk and from S3, and delete it."""
    folder, server = str(given.folder / f"load-{given.size}"), given.folder / "load-s3"
    try:
        if not storage.exists(storage.join(folder, MANIFEST)):
            _show(load_weights.create(folder, given.size))
        rows = [_show(row) for row in load_weights.from_disk(folder, given.readers, given.repeats)]
        if not given.no_s3:
            from_s3 = load_weights.from_s3(folder, server, given.readers, given.repeats)
            rows += [_show(row) for row in from_s3]
    finally:
        storage.delete_folder(str(server))
        if not given.keep:
            storage.delete_folder(folder)
    summary = load_weights.summarized(rows)
    for row in summary:
        _show(row)
    print(load_weights.table(summary))


def _loaded(
    engine: str, dtype: str, service: AbstractContextManager[str], given: argparse.Namespace
) -> Iterator[Row]:
    vocabulary = min(TEXT_IDS, GPTJConfig.from_pretrained(given.model).vocab_size)
    with service as address:
        load = Load(
            f"{address}/v1/completions",
            MODEL_NAME,
            given.rounds,
            given.prompt_tokens,
            given.new_tokens,
            vocabulary,
        )
        load.run(2)
        for concurrency in given.sizes:
            yield _show({"engine": engine, "dtype": dtype, **load.run(concurrency)})


def summarized(rows: Sequence[Row]) -> list[Row]:
    """Medians over repeats, and our tokens/s by those of the best other engine of that dtype.

    The ratio is the median of the repeats', in each of which engines were measured in turn.
    """
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        size = row["batch"] if "batch" in row else row["concurrency"]
        groups.setdefault((row["engine"], row["dtype"], size), []).append(row)
    summary: list[Row] = []
    for (engine, dtype, size), each in groups.items():
        numbers = {
            name: round(statistics.median(row[name] for row in each), 3)
            for name in each[0]
            if all(isinstance(row.get(name), int | float) for row in each)
        }
        summary.append({**numbers, "engine": engine, "dtype": dtype, "size": size})
        disturbed = sum("disturbed" in row for row in each)
        if disturbed:
            summary[-1]["disturbed"] = f"{disturbed} of {len(each)}"
        others = [
            group
            for (other, its_dtype, its_size), group in groups.items()
            if (its_dtype, its_size) == (dtype, size) and other != OURS
        ]
        if engine == OURS and others:
            summary[-1]["times_best_peer"] = round(
                statistics.median(
                    row["tokens_per_s"] / max(other["tokens_per_s"] for other in beside)
                    for row, *beside in zip(each, *others, strict=True)
                ),
                2,
            )
    return summary


def table(summary: Sequence[Row]) -> str:
    """A Markdown table with a row per engine and size."""
    names = ["engine", "dtype", "size", "tokens_per_s", "times_best_peer", "share_of_memory_limit"]
    names += ["first_token_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "failed"]
    names += ["read_gb_per_s", "disturbed"]
    used = [name for name in names if any(name in row for row in summary)]
    lines = [used, ["---"] * len(used)]
    lines += [[str(row.get(name, "")) for name in used] for row in summary]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_model(folder: str) -> None:
    """A random GPT-J of 305 M parameters, in bf16."""
    torch.manual_seed(0)
    config = GPTJConfig(n_embd=1024, n_layer=16, n_head=16, rotary_dim=32)
    model = GPTJForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, tokenizer=gpt2_tokenizer())
    print(folder)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _modules(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(TARGET_MODULES):
        raise argparse.ArgumentTypeError(f"{text}: each must be one of {', '.join(TARGET_MODULES)}")
    return names


def _dtypes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(DTYPES):
        raise argparse.ArgumentTypeError(f"{text}: each must be one of {', '.join(DTYPES)}")
    return names


def _show(row: Row) -> Row:
    print(to_json(row), flush=True)
    return row


if __name__ == "__main__":
    main()

"""Time and peak memory to load a model for inference, from disk or S3.

Each measurement is a separate process, `python -m gptj_bench.load_weights READER ADDRESS`, which
prints one JSON object. READER is one of

    plain            reads the same bytes and discards them: four threads from disk, sixteen
                     connections from S3
    gptj             GPTJForCausalLM.from_pretrained, verifying each file's SHA-256
    gptj-unverified  the same without verification
    gptj-replica     with weights packed for the kernels, as in a deployment (bf16)
    transformers     transformers' from_pretrained

All but the first then generate a token, since mapped weights are read on first use. `peak_gb` is
the process's peak resident memory, including code and mapped files (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptj import GPTJConfig, GPTJForCausalLM, storage
from gptj.checkpoints.cache import FOLDER_VARIABLE, SIZE_VARIABLE
from gptj.checkpoints.folder import CONFIG
from gptj.checkpoints.manifest import MANIFEST, FolderWriter
from gptj.checkpoints.skeleton import without_weights
from gptj.checkpoints.weights import SHARD_BYTES, TensorSpec, write_weights
from gptj.engine.backends import best_runner
from gptj.engine.engine import Engine
from gptj_bench.decode import generate
from gptj_local.s3 import LocalS3

READERS = ("plain", "gptj", "gptj-unverified", "gptj-replica", "transformers")
PROMPT = (464, 3290)  # "The dog"; short, since fp16 is slow on CPUs without it
PIECE_BYTES = 8 * 2**20
THREADS = 4  # of the plain read; more are no faster
PARTS = 16  # concurrent requests of the plain download, as in gptj.storage
PROBES = 200
DROP_SECONDS = 0.5
SECONDS = 1800  # timeout of one measurement
S3_READERS = ("plain", "gptj", "gptj-unverified")
CACHE_READERS = ("gptj", "gptj-unverified")  # those that use the node's checkpoint cache

Row = dict[str, Any]


def create(folder: str, size: str) -> Row:
    """Write a random fp16 GPT-J of a preset, tensor by tensor, in at least three files."""
    start = time.perf_counter()
    with without_weights():
        model = GPTJForCausalLM(GPTJConfig.preset(size))
    model = model.to(torch.float16)
    specs = [TensorSpec(n, tuple(p.shape), torch.float16) for n, p in model.named_parameters()]
    total = sum(spec.size for spec in specs)
    with FolderWriter(folder) as writer:
        write_weights(writer, specs, _random(specs), min(SHARD_BYTES, total // 2))
        writer.write(CONFIG, model.config_to_save().to_json().encode())
    seconds = time.perf_counter() - start
    return {"created": folder, "bytes": weight_bytes(folder), "seconds": round(seconds, 1)}


def _random(specs: Sequence[TensorSpec]) -> Iterator[Tensor]:
    torch.manual_seed(0)
    for spec in specs:
        if len(spec.shape) == 2:
            yield torch.empty(spec.shape).normal_(std=0.02)
        else:
            norm = ".ln_" in spec.name and spec.name.endswith("weight")
            yield torch.full(spec.shape, float(norm))


def weight_files(address: str) -> list[storage.FileInfo]:
    return [f for f in storage.list_files(address) if f.name.endswith(".safetensors")]


def weight_bytes(address: str) -> int:
    return sum(file.size for file in weight_files(address))


def from_disk(folder: str, readers: Sequence[str], repeats: int) -> Iterator[Row]:
    """Each reader with a cold page cache, then with a warm one."""
    for _ in range(repeats):
        for cache in ("cold", "warm"):
            for reader in readers:
                if cache == "cold":
                    drop(Path(folder))
                else:
                    _plain(folder)  # warms the page cache
                state = {"from": "disk", "cache": cache, "cached_share": cached_share(Path(folder))}
                yield {**state, **measure(reader, folder)}


def from_s3(folder: str, place: Path, readers: Sequence[str], repeats: int) -> Iterator[Row]:
    """From an S3 server on this machine, whose files are kept out of the page cache.

    A remote server would not fill this machine's memory either, and files and model would not fit
    together. Then through the node's cache: empty, with the files on disk, and in the page cache.
    """
    with LocalS3.start(place) as server:
        os.environ.update(server.environment())
        address = "s3://gptj/load"
        files = storage.list_files(folder)
        storage.for_each(
            lambda file: storage.upload(file.address, storage.join(address, file.name)),
            sorted(files, key=lambda file: file.name == MANIFEST),
            at_once=1,
        )
        drop(Path(folder))
        for _ in range(repeats):
            for reader in (each for each in readers if each in S3_READERS):
                os.sync()
                with dropping(place):
                    row = measure(reader, address)
                yield {"from": "s3", "cache": "cold", **row}
            for reader in (each for each in readers if each in CACHE_READERS):
                yield from _through_cache(reader, address, place)


def _through_cache(reader: str, address: str, place: Path) -> Iterator[Row]:
    """Measure through the node's cache, in a folder beside the server's."""
    folder = place.with_name(f"{place.name}-cache")
    size = 2 * sum(file.size for file in storage.list_files(address)) / 1e9
    environment = {FOLDER_VARIABLE: str(folder), SIZE_VARIABLE: str(size)}
    try:
        for cache in ("empty", "cold", "warm"):
            os.sync()
            if cache == "cold":
                drop(folder)
            with dropping(place):
                row = measure(reader, address, environment)
            yield {"from": "s3, cached", "cache": cache, **row}
    finally:
        storage.delete_folder(str(folder))


def measure(reader: str, address: str, environment: Mapping[str, str] | None = None) -> Row:
    """One measurement in a new process, with additional environment variables."""
    command = [sys.executable, "-m", "gptj_bench.load_weights", reader, address]
    variables = {**os.environ, **(environment or {})}
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=variables)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    row: Row = json.loads(result.stdout.splitlines()[-1])
    return row


def drop(folder: Path) -> None:
    """Evict a folder's files, which must be synced, from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # deleted by the server meanwhile
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


@contextmanager
def dropping(folder: Path) -> Iterator[None]:
    """Keep evicting a folder's files from the page cache during the block."""
    drop(folder)
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(DROP_SECONDS):
            drop(folder)

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(work)
        try:
            yield
        finally:
            ended.set()
        future.result()


def cached_share(folder: Path) -> float:
    """Fraction of the weights in the page cache, by probing pages far apart.

    Each page is probed at most once, since a miss reads it in.
    """
    files = weight_files(str(folder))
    step = max(mmap.PAGESIZE, sum(f.size for f in files) // PROBES // mmap.PAGESIZE * mmap.PAGESIZE)
    probes = cached = 0
    for file in files:
        descriptor = os.open(file.address, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead
            for offset in range(0, file.size, step):
                probes += 1
                try:
                    os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
                    cached += 1
                except BlockingIOError:
                    pass  # a miss: it would have to be read from disk
        finally:
            os.close(descriptor)
    return round(cached / probes, 3)


def summarized(rows: Sequence[Row]) -> list[Row]:
    """Medians over the repeats, relative to the plain read of the same bytes."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["from"], row["cache"], row["reader"]), []).append(row)
    summary: list[Row] = []
    for (place, cache, reader), each in groups.items():
        row = {"from": place, "cache": cache, "reader": reader}
        for name in ("seconds", "first_token_seconds", "gb_per_s", "peak_gb", "peak_of_size"):
            if name in each[0]:
                row[name] = round(statistics.median(one[name] for one in each), 3)
        summary.append(row)
    plain = {(r["from"], r["cache"]): r["seconds"] for r in summary if r["reader"] == "plain"}
    for row in summary:
        if (row["from"], row["cache"]) in plain and row["reader"] != "plain":
            base = plain[row["from"], row["cache"]]
            row["times_plain"] = round(row["seconds"] / base, 2)
            row["with_token_times_plain"] = round(until_token(row) / base, 2)
    direct = {r["reader"]: r for r in summary if r["from"] == "s3"}
    for row in summary:
        if row["from"] == "s3, cached" and row["reader"] in direct:
            row["with_token_times_s3"] = round(
                until_token(row) / until_token(direct[row["reader"]]), 2
            )
    return summary


def until_token(row: Row) -> float:
    """Seconds for loading and the first token, which reads mapped weights."""
    return float(row["seconds"] + row["first_token_seconds"])


def table(summary: Sequence[Row]) -> str:
    """A Markdown table."""
    names = ["from", "cache", "reader", "seconds", "times_plain", "first_token_seconds"]
    names += ["with_token_times_s3", "gb_per_s", "peak_gb", "peak_of_size"]
    lines = [names, ["---"] * len(names)]
    lines += [[str(row.get(name, "")) for name in names] for row in summary]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("address")
    given = parser.parse_args()
    size = weight_bytes(given.address)
    if given.reader == "plain":
        row = _plain(given.address)
    elif given.reader == "transformers":
        row = _transformers(given.address)
    elif given.reader == "gptj-replica":
        row = _replica(given.address)
    else:
        row = _ours(given.address, verify=given.reader == "gptj")
    peak = peak_bytes()
    print(
        json.dumps(
            {
                "reader": given.reader,
                "bytes": size,
                **row,
                "gb_per_s": round(size / row["seconds"] / 1e9, 2),
                "peak_gb": round(peak / 1e9, 3),
                "peak_of_size": round(peak / size, 3),
            }
        )
    )


def _plain(address: str) -> Row:
    files = weight_files(address)
    pieces = [
        (file, start, min(length, file.size - start))
        for length in [storage.PART_BYTES if storage.is_s3(address) else PIECE_BYTES]
        for file in files
        for start in range(0, file.size, length)
    ]
    start = time.perf_counter()
    if storage.is_s3(address):
        _download(pieces)
    else:
        _read(pieces)
    return {"seconds": round(time.perf_counter() - start, 3)}


def _read(pieces: Sequence[tuple[storage.FileInfo, int, int]]) -> None:
    opened = {file.address: os.open(file.address, os.O_RDONLY) for file, _, _ in pieces}
    buffers = [bytearray(PIECE_BYTES) for _ in range(THREADS)]

    def read(piece: tuple[storage.FileInfo, int, int]) -> None:
        file, offset, length = piece
        buffer = buffers.pop()
        count = os.preadv(opened[file.address], [memoryview(buffer)[:length]], offset)
        assert count == length, f"{file.address} ended early"
        buffers.append(buffer)

    storage.for_each(read, pieces, at_once=THREADS)
    for descriptor in opened.values():
        os.close(descriptor)


def _download(pieces: Sequence[tuple[storage.FileInfo, int, int]]) -> None:
    """With plain boto3, one range per request."""
    import boto3
    from botocore.config import Config

    client = boto3.client("s3", config=Config(max_pool_connections=PARTS))

    def get(piece: tuple[storage.FileInfo, int, int]) -> None:
        file, offset, length = piece
        bucket, key = storage.split_s3(file.address)
        span = f"bytes={offset}-{offset + length - 1}"
        body = client.get_object(Bucket=bucket, Key=key, Range=span)["Body"]
        count = 0
        while chunk := body.read(2**20):
            count += len(chunk)
        assert count == length, f"{file.address} ended early"

    with ThreadPoolExecutor(PARTS) as pool:
        for _ in pool.map(get, pieces):
            pass


def _ours(address: str, verify: bool) -> Row:
    start = time.perf_counter()
    model = GPTJForCausalLM.from_pretrained(address, verify=verify)
    seconds = time.perf_counter() - start
    assert model.dtype == torch.float16
    return {"seconds": round(seconds, 3), **_loaded(), **_first_token(model)}


def _replica(address: str) -> Row:
    start = time.perf_counter()
    model = GPTJForCausalLM.from_pretrained(address, dtype=torch.bfloat16)
    runner = best_runner(model, 64, release=True)
    seconds = time.perf_counter() - start
    row = {"seconds": round(seconds, 3), "runner": type(runner).__name__, **_loaded()}
    engine = Engine(
        runner, eos_ids=[], max_num_seqs=1, max_num_batched_tokens=64, prefix_caching=False
    )
    try:
        timing = generate(engine, [PROMPT], 1)
    finally:
        engine.close()
    return {**row, "first_token_seconds": round(timing.seconds, 3)}


def _transformers(address: str) -> Row:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(address, dtype="auto")
    seconds = time.perf_counter() - start
    assert model.dtype == torch.float16
    row = {"seconds": round(seconds, 3), "version": transformers.__version__, **_loaded()}
    return {**row, **_first_token(model)}


def _loaded() -> Row:
    """Peak memory before the first token."""
    return {"loaded_peak_gb": round(peak_bytes() / 1e9, 3)}


def _first_token(model: Any) -> Row:
    prompt = torch.tensor([PROMPT])
    start = time.perf_counter()
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=1
    )
    seconds = time.perf_counter() - start
    return {"first_token_seconds": round(seconds, 3), "token": int(ids[0, -1])}


def peak_bytes() -> int:
    """This process's peak resident memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not report a process's peak memory")


if __name__ == "__main__":
    main()

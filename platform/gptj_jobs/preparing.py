"""Prepares data with Ray Data: a plan in, records of the written shards out."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
from ray.exceptions import RayError

from gptj import storage
from gptj.data.prepared import Shard, tokenizer_digest
from gptj.data.preparing import Plan, chunks, write_shard
from gptj.data.rows import DataError
from gptj.tokenizer import GPTJTokenizer
from gptj_jobs.ray_errors import reason

PROGRESS_SECONDS = 10

logger = logging.getLogger("preparing")


def write_shards(
    plan: Plan,
    folder: str,
    load: Callable[[], GPTJTokenizer],
    workers: int | None,
    addresses: Sequence[str],
) -> Iterator[Shard]:
    """Shards as they are written, in any order; Ray Data throttles readers that are too fast.

    Args:
        addresses: all that the plan, the folder and `load` read or write.

    Raises:
        DataError: for a bad row, or any other error of `write_shard`.
        OSError: for Ray's errors, such as a node out of memory.
    """
    logger.info(
        "preparing %s: %d files of %.1f MB", plan.address, len(plan.sizes), sum(plan.sizes) / 1e6
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = plan.chunk_characters  # bytes: about one chunk per block
    shared = ray.put(plan)
    parts = ray.data.from_items(
        [{"part": part} for part in range(len(plan.parts))], override_num_blocks=len(plan.parts)
    )
    # Reading waits for I/O and needs less CPU than tokenizing. Different numbers also keep Ray Data
    # from fusing the two into one task. A single CPU must have room for both.
    cpu = 1 if ray.cluster_resources().get("CPU", 0) >= 2 else 0.5
    read = parts.map_batches(
        partial(_read, plan=shared, addresses=addresses), batch_size=1, num_cpus=cpu / 2
    )
    written = read.map_batches(
        partial(_write, plan=shared, folder=folder, load=load, addresses=addresses),
        batch_size=1,
        num_cpus=cpu,
        compute=ray.data.TaskPoolStrategy(workers),
    )
    started = last = time.monotonic()
    rows = count = 0
    for row in _rows(written):
        shard = pickle.loads(row["shard"])  # pickled by our own tasks
        if isinstance(shard, str):
            raise DataError(shard)
        count, rows = count + 1, rows + shard.rows
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            logger.info("%d shards, %d rows, %.0f s", count, rows, last - started)
        yield shard


def _rows(written: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    try:
        yield from written.iter_rows()
    except RayError as error:
        raise OSError(
            f"Ray stopped preparing the data: {reason(error)}; rerun the command to resume"
        ) from error


# Data and storage errors are passed on as messages, in place of a chunk or shard: Ray Data would
# wrap them in its own traceback, without the error's type.


def _read(batch: dict[str, Any], plan: Any, addresses: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A part's chunks, or an error message."""
    try:
        storage.be_patient(addresses)  # this process is new, but the driver has listed the files
        for part in batch["part"]:
            for chunk in chunks(ray.get(plan), int(part)):
                yield {"chunk": _pickled([chunk])}
    except (ValueError, OSError) as error:
        yield {"chunk": _pickled([str(error)])}


def _write(
    batch: dict[str, Any],
    plan: Any,
    folder: str,
    load: Callable[[], GPTJTokenizer],
    addresses: Sequence[str],
) -> dict[str, Any]:
    """The shards of some chunks, or an error message."""
    found: list[Shard | str] = []
    try:
        storage.be_patient(addresses)
        plan, tokenizer = ray.get(plan), load()
        if tokenizer_digest(tokenizer) != plan.tokenizer:
            raise DataError(
                "a node has another tokenizer at this address: put it on S3 or in a folder that "
                "all nodes share"
            )
        for chunk in map(pickle.loads, batch["chunk"]):
            done = chunk if isinstance(chunk, str) else write_shard(plan, folder, chunk, tokenizer)
            found.append(done)
    except (ValueError, OSError) as error:
        found.append(str(error))
    return {"shard": _pickled(found)}


def _pickled(values: Sequence[Any]) -> Any:
    return np.array([pickle.dumps(value) for value in values], dtype=object)

#!/usr/bin/env python
"""Tokenize data once, in parallel, for any number of runs of jobs/finetune.py (task=causal-lm).

    ray job submit -- jobs/prepare_data.py DATA DESTINATION tokenizer=ADDRESS [key=value …]

DATA is Parquet, JSON, CSV or text (also .gz, .zst), of any size: a file, folder or pattern, local
or s3://…, or sample://NAME, with `text`, `prompt` and `completion`, or `messages`. DESTINATION, a
new folder that all nodes can reach, gets Parquet shards of token ids, an index (counts, settings,
the tokenizer's hash), the tokenizer and, last, a manifest; give it to a training as data.train. The
same command, submitted again, continues where it stopped. The bytes do not depend on the number of
workers.
Keys, with their defaults:

    tokenizer=…             the model's, or another folder with a tokenizer, s3://… or a hub id
    revision=…              of a hub id
    chat_template=…         of messages: a Jinja file, or the name of a built-in template;
                            default: the tokenizer's
    columns.NAME=…          our column's name in the data, such as columns.text=review
    delimiter=…             of CSV; default: the one in the header
    bad_rows=refuse         or skip: leave out rows that cannot be used; the index counts and
                            names them
    shard_characters=16777216   text of a shard, all of which is in memory at once
    workers=…               tasks that tokenize at once; default: as many as the CPUs allow
"""

from __future__ import annotations

import logging
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from gptj import storage
from gptj.chat import read_template
from gptj.data.prepared import Index, Shard, tokenizer_digest
from gptj.data.preparing import (
    CHUNK_CHARACTERS,
    Plan,
    begin,
    chunks,
    finish,
    tokenizer_at,
    write_shard,
)
from gptj.data.rows import DataError
from gptj.extras import missing
from gptj.storage.addresses import absolute, normalized
from gptj.tokenizer import GPTJTokenizer
from gptj.training.sections import Delimiter
from jobs.key_value import checked, help_if_asked

try:
    import ray
    import ray.data
except ModuleNotFoundError as error:
    raise missing(error, "jobs/prepare_data.py", extra="train") from error

PROGRESS_SECONDS = 10

logger = logging.getLogger("prepare_data")


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    data: Annotated[str, AfterValidator(partial(normalized, samples=True))]
    destination: Annotated[str, AfterValidator(normalized)]
    tokenizer: Annotated[str, AfterValidator(normalized)]
    revision: str | None = None
    chat_template: str | None = None
    columns: dict[str, str] = {}
    delimiter: Delimiter | None = None
    bad_rows: Literal["refuse", "skip"] = "refuse"
    shard_characters: Annotated[int, Field(ge=1)] = CHUNK_CHARACTERS
    workers: Annotated[int, Field(ge=1)] | None = None


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line of this process, or the given one."""
    words = sys.argv[1:] if words is None else words
    help_if_asked(words, __doc__)
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stdout, format="%(asctime)s %(message)s", force=True
    )
    logger.setLevel(logging.INFO)
    try:
        index = prepare(read_settings(words))
    except (ValueError, OSError) as error:  # what a user can put right: no traceback
        sys.exit(f"error: {error}")
    logger.info("%s", summary(index))
    for each in index.bad:
        logger.info("skipped: %s", each)


def read_settings(words: Sequence[str]) -> Settings:
    """The command line's words, checked; ValueError naming the key, its value and the remedy."""
    if len(words) < 2 or any("=" not in word for word in words[2:]):
        raise ValueError(f"the command line is\n{__doc__}")
    fields: dict[str, Any] = {"data": words[0], "destination": words[1], "columns": {}}
    for word in words[2:]:
        key, _, value = word.partition("=")
        section, _, name = key.removeprefix("data.").partition(".")
        if section == "columns" and name:
            fields["columns"][name] = value
        elif not name and section in Settings.model_fields.keys() - {"data", "destination"}:
            fields[section] = value
        else:
            raise ValueError(f"{word}: there is no such key\n{__doc__}")
    if "tokenizer" not in fields:
        raise ValueError("tokenizer= is missing: the model's folder, s3://… or hub id")
    return checked(Settings, fields)


def prepare(settings: Settings) -> Index:
    """Do what is left to do. DataError, StorageError: for what cannot be read or written."""
    folder = absolute(settings.destination)
    address = settings.tokenizer
    if Path(address).exists():  # or else it may be a hub id
        address = absolute(address)
    template = settings.chat_template
    source = None if template is None else read_template(template)
    load = partial(tokenizer_at, address, settings.revision, source)
    tokenizer = load()
    plan = Plan.of(
        absolute(settings.data, samples=True),
        tokenizer,
        names=settings.columns,
        delimiter=settings.delimiter,
        bad_rows=settings.bad_rows,
        chunk_characters=settings.shard_characters,
    )
    storage.check_writable(folder)
    if (done := begin(plan, folder)) is not None:
        logger.info("%s is finished already", folder)
        return done
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)
    logger.info(
        "preparing %s: %d files of %.1f MB", plan.address, len(plan.sizes), sum(plan.sizes) / 1e6
    )
    shards = list(_shards(plan, folder, load, settings.workers))
    return finish(plan, folder, shards, tokenizer)


def summary(index: Index) -> str:
    learned = "" if index.learned == index.tokens else f", of which {index.learned} are learned"
    skipped = f"; {index.skipped} bad rows were skipped" if index.skipped else ""
    files = sum(shard.rows > 0 for shard in index.shards)
    return f"{index.rows} rows, {index.tokens} tokens{learned}, in {files} shards{skipped}"


def _shards(
    plan: Plan, folder: str, load: Callable[[], GPTJTokenizer], workers: int | None
) -> Iterator[Shard]:
    """Shards as they are written, in any order; Ray Data holds back readers that are too fast."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = plan.chunk_characters  # bytes: about a chunk, to be shared out
    shared = ray.put(plan)
    parts = ray.data.from_items(
        [{"part": part} for part in range(len(plan.parts))], override_num_blocks=len(plan.parts)
    )
    # Reading waits for bytes and needs less of a CPU than tokenizing. Different needs also keep Ray
    # Data from fusing the two into one task.
    read = parts.map_batches(partial(_read, plan=shared), batch_size=1, num_cpus=0.5)
    written = read.map_batches(
        partial(_write, plan=shared, folder=folder, load=load),
        batch_size=1,
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(workers),
    )
    started = last = time.monotonic()
    rows = count = 0
    for row in written.iter_rows():
        shard = pickle.loads(row["shard"])  # by our own tasks
        if isinstance(shard, str):
            raise DataError(shard)
        count, rows = count + 1, rows + shard.rows
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            logger.info("%d shards, %d rows, %.0f s", count, rows, last - started)
        yield shard


# Errors of data or storage are passed on as messages, in place of a chunk or shard: Ray Data would
# wrap them in a traceback of its own, without the error's type.


def _read(batch: dict[str, Any], plan: Any) -> Iterator[dict[str, Any]]:
    """The chunks of a part, or what is wrong with it."""
    try:
        for part in batch["part"]:
            for chunk in chunks(ray.get(plan), int(part)):
                yield {"chunk": _pickled([chunk])}
    except (ValueError, OSError) as error:
        yield {"chunk": _pickled([str(error)])}


def _write(
    batch: dict[str, Any], plan: Any, folder: str, load: Callable[[], GPTJTokenizer]
) -> dict[str, Any]:
    """The records of the shards of some chunks, or what is wrong with them."""
    found: list[Shard | str] = []
    try:
        plan, tokenizer = ray.get(plan), load()
        if tokenizer_digest(tokenizer) != plan.tokenizer:
            raise DataError(
                "a node has another tokenizer at this address: put it where all nodes read the same"
            )
        for chunk in map(pickle.loads, batch["chunk"]):
            done = chunk if isinstance(chunk, str) else write_shard(plan, folder, chunk, tokenizer)
            found.append(done)
    except (ValueError, OSError) as error:
        found.append(str(error))
    return {"shard": _pickled(found)}


def _pickled(values: Sequence[Any]) -> Any:
    return np.array([pickle.dumps(value) for value in values], dtype=object)


if __name__ == "__main__":
    main()

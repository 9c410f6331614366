#!/usr/bin/env python
"""Tokenize data once, in parallel, for any number of runs of jobs/finetune.py.

    ray job submit -- jobs/prepare_data.py DATA DESTINATION tokenizer=ADDRESS [key=value …]

DATA is Parquet, JSON, CSV or text (also .gz, .zst), of any size: a file, folder or pattern, local
or s3://…, or sample://NAME, with the columns of the task. DESTINATION, a new folder that all nodes
can reach, gets Parquet shards of token ids, an index (counts, settings, the tokenizer's hash), the
tokenizer and, last, a manifest; give it to a training as data.train. The same command, submitted
again, continues where it stopped. The bytes do not depend on the number of workers.

Keys, with their defaults:

    task=causal-lm          or classification, question-answering
    tokenizer=…             the model's, or another folder with a tokenizer, s3://… or a hub id
    revision=…              of a hub id
    chat_template=…         of messages: a Jinja file, or the name of a built-in template;
                            default: the tokenizer's
    columns.NAME=…          our column's name in the data, such as columns.text=review
    label_names=…           classification: all labels, as [World, Sports], or the data's value
                            for each, as {1: World, 2: Sports}; rows with other labels are bad;
                            default: a run finds them
    problem_type=…          classification: single_label_classification, regression or
                            multi_label_classification; for a regression, rows whose label is
                            not a finite number are bad; default: a run says or finds it
    delimiter=…             of CSV; default: the one in the header
    bad_rows=refuse         or skip: leave out unusable rows; the index counts and
                            names them
    shard_characters=16777216   text per shard, which must fit in memory
    workers=…               concurrent tokenizing tasks; default: as many as the CPUs allow
"""

from __future__ import annotations

import sys

from gptj_jobs.key_value import help_if_asked

if __name__ == "__main__":
    help_if_asked(sys.argv[1:], __doc__)  # before the imports, which take seconds

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from gptj import storage
from gptj.chat import read_template
from gptj.checkpoints.folder import check_outside
from gptj.data.prepared import Index
from gptj.data.preparing import CHUNK_CHARACTERS, FILES, Plan, begin, finish, tokenizer_at
from gptj.data.shards import TaskName
from gptj.data.sources import check_apart
from gptj.environment.extras import missing
from gptj.storage.addresses import absolute, normalized
from gptj.training.sections import Delimiter, ProblemType
from gptj.training.tasks import TASKS
from gptj_jobs.key_value import checked, parsed_yaml

try:
    import ray

    from gptj_jobs.preparing import write_shards
except ModuleNotFoundError as error:
    raise missing(error, "jobs/prepare_data.py", extra="train") from error

logger = logging.getLogger("prepare_data")


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Annotated[str, AfterValidator(partial(normalized, samples=True))]
    destination: Annotated[str, AfterValidator(normalized)]
    tokenizer: Annotated[str, AfterValidator(normalized)]
    revision: str | None = None
    chat_template: str | None = None
    task: TaskName = "causal-lm"
    columns: dict[str, str] = {}
    label_names: list[str] | dict[str, str] | None = None
    problem_type: ProblemType | None = None
    delimiter: Delimiter | None = None
    bad_rows: Literal["refuse", "skip"] = "refuse"
    shard_characters: Annotated[int, Field(ge=1)] = CHUNK_CHARACTERS
    workers: Annotated[int, Field(ge=1)] | None = None


def main(words: Sequence[str] | None = None) -> None:
    """Run this process's command line, or `words`."""
    words = sys.argv[1:] if words is None else words
    help_if_asked(words, __doc__)
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stdout, format="%(asctime)s %(message)s", force=True
    )
    for name in (logger.name, "preparing"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        index = prepare(read_settings(words))
    except (ValueError, OSError) as error:  # users' errors need no traceback
        sys.exit(f"error: {error}")
    logger.info("%s", summary(index))
    for each in index.bad:
        logger.info("skipped: %s", each)


def read_settings(words: Sequence[str]) -> Settings:
    """Parse the command line; ValueError with the key, its value and the remedy."""
    if len(words) < 2 or any("=" not in word for word in words[2:]):
        raise ValueError(f"usage:\n{__doc__}")
    fields: dict[str, Any] = {"data": words[0], "destination": words[1], "columns": {}}
    for word in words[2:]:
        key, _, value = word.partition("=")
        section, _, name = key.removeprefix("data.").partition(".")
        if section == "columns" and name:
            fields["columns"][name] = value
        elif not name and section in Settings.model_fields.keys() - {"data", "destination"}:
            is_names = section == "label_names"
            fields[section] = parsed_yaml(word, value, is_text=True) if is_names else value
        else:
            raise ValueError(f"{word}: unknown key\n{__doc__}")
    if "tokenizer" not in fields:
        raise ValueError("tokenizer= is missing: the model's folder, s3://… or hub id")
    settings = checked(Settings, fields)
    for key in ("label_names", "problem_type"):
        if getattr(settings, key) is not None and settings.task != "classification":
            raise ValueError(f"{key}= has no effect with task={settings.task}: leave it out")
    if settings.problem_type == "regression" and isinstance(settings.label_names, dict):
        raise ValueError("label_names= must be a list for a regression, not a mapping")
    known = TASKS[settings.task].columns
    if unknown := settings.columns.keys() - set(known):
        raise ValueError(
            f"columns.{min(unknown)}: task={settings.task} has no such column; it has "
            f"{', '.join(known)}"
        )
    return settings


def prepare(settings: Settings) -> Index:
    """Prepare what is left. DataError, StorageError: if data cannot be read or written."""
    folder = absolute(settings.destination)
    check_apart(settings.data, folder, FILES)
    address = settings.tokenizer
    if Path(address).exists():  # otherwise it may be a hub id
        address = absolute(address)
    check_outside(folder, address)
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
        task=settings.task,
        label_names=settings.label_names,
        problem_type=settings.problem_type,
    )
    storage.check_writable(folder)
    if (done := begin(plan, folder)) is not None:
        logger.info("%s is already complete", folder)
        return done
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)
    shards = write_shards(plan, folder, load, settings.workers, (plan.address, folder, address))
    return finish(plan, folder, shards, tokenizer)


def summary(index: Index) -> str:
    learned = "" if index.learned == index.tokens else f", of which {index.learned} are learned"
    skipped = f"; {index.skipped} bad rows were skipped" if index.skipped else ""
    files = sum(shard.rows > 0 for shard in index.shards)
    return f"{index.rows} rows, {index.tokens} tokens{learned}, in {files} shards{skipped}"


if __name__ == "__main__":
    main()

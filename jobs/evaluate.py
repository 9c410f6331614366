#!/usr/bin/env python
"""Measure a checkpoint on data, and print one JSON object.

    jobs/evaluate.py CHECKPOINT DATA [key=value …]

CHECKPOINT is a folder, `s3://…` or a hub id; DATA is Parquet, JSON, CSV or text (also .gz, .zst): a
file, folder or pattern, local or `s3://…`, or `sample://NAME/evaluation`. The model's head
determines the metrics: perplexity; accuracy and F1, also by class with a confusion matrix, or
regression error; exact match and F1. Progress, and how labels were read, goes to standard
error. Keys, with their defaults:

    batch_size=8            rows per batch
    sequence_length=…       tokens of a row; default: as in training, or else the whole context
    stride=…                question answering: tokens that windows share; default: as in training
    packing=…               language modelling: best_fit (documents apart), concatenate, none;
                            default: as in training, or else concatenate
    columns.NAME=…          our column's name in the data, such as columns.text=review
    delimiter=…             of CSV; default: the one in the header
    label_names=…           the data's value for each label, such as {1: World, 2: Sports}, or
                            all labels in the order of the outputs; default: as in training
    limit=…                 rows to read, or sequences of a text; default: all
    unigram=TRAIN_DATA      language modelling: also the perplexity of its token frequencies
    dtype=…                 of the weights: float32, bfloat16, float16; default: as stored
    device=…                cpu or cuda; default: cuda if available
    revision=…              of a hub id

Training's names of these settings (data.columns.text, data.label_names) also work.
"""

from __future__ import annotations

import sys

from gptj_jobs.key_value import help_if_asked

if __name__ == "__main__":
    help_if_asked(sys.argv[1:], __doc__)  # before the imports, which take seconds

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import nn

from gptj.checkpoints.folder import ModelFolder
from gptj.config import GPTJConfig, parse_dtype
from gptj.data.causal_lm import CausalLMData
from gptj.data.labels import LabelSet
from gptj.data.packing import Packing
from gptj.data.prepared import Prepared
from gptj.data.preparing import Plan, chunks, prepare
from gptj.data.rows import DataError, Row
from gptj.data.sources import find_columns, read_rows
from gptj.pretrained import GPTJPreTrainedModel
from gptj.storage.addresses import normalized
from gptj.storage.scratch import scratch_folder
from gptj.tokenizer import GPTJTokenizer
from gptj.training.class_scores import class_scores
from gptj.training.evaluation import collect
from gptj.training.sections import DataSettings, Delimiter
from gptj.training.tasks import TASKS, AnyTask, task_of
from gptj.training.tasks.causal_lm import unigram_perplexity
from gptj_jobs import command_line
from gptj_jobs.key_value import checked, parsed_yaml

PROGRESS_SECONDS = 5
DEFAULT_STRIDE = 128  # tokens; a quarter of shorter windows

logger = logging.getLogger("evaluate")

Positive = Annotated[int, Field(ge=1)]
DataAddress = Annotated[str, AfterValidator(partial(normalized, samples=True))]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: Annotated[str, AfterValidator(normalized)]
    data: DataAddress
    batch_size: Positive = 8
    sequence_length: Positive | None = None
    stride: Annotated[int, Field(ge=0)] | None = None
    packing: Packing | None = None
    columns: dict[str, str] = {}
    delimiter: Delimiter | None = None
    label_names: list[str] | dict[str, str] | None = None
    limit: Positive | None = None
    unigram: DataAddress | None = None
    dtype: str | None = None
    device: str | None = None
    revision: str | None = None


def main() -> None:
    command_line.log_to_stderr(logger.name)
    try:
        result = measure(read_settings(sys.argv[1:]))
        print(json.dumps(result, allow_nan=False))
    except (ValueError, OSError) as error:  # users' errors need no traceback
        sys.exit(f"error: {error}")


def read_settings(words: Sequence[str]) -> Settings:
    """Parse the command line; ValueError with the key, its value and the remedy."""
    if len(words) < 2 or any("=" not in word for word in words[2:]):
        raise ValueError(f"usage:\n{__doc__}")
    fields: dict[str, Any] = {"checkpoint": words[0], "data": words[1], "columns": {}}
    for word in words[2:]:
        key, _, text = word.partition("=")
        section, _, name = key.partition(".")
        if section == "data" and name.partition(".")[0] in DataSettings.model_fields:
            key = name
            section, _, name = key.partition(".")
        if section == "columns" and name:
            fields["columns"][name] = text
        elif key in Settings.model_fields and key not in ("checkpoint", "data", "columns"):
            is_yaml = key in ("batch_size", "sequence_length", "stride", "limit", "label_names")
            is_text = key == "label_names"
            fields[key] = parsed_yaml(word, text, is_text=is_text) if is_yaml else text
        else:
            raise ValueError(f"{word}: unknown key\n{__doc__}")
    return checked(Settings, fields)


def measure(settings: Settings) -> dict[str, Any]:
    """A checkpoint's metrics, with its address, the data's and the number of examples."""
    on_gpu = torch.cuda.is_available()
    if settings.device not in (None, "cpu", "cuda") or (settings.device == "cuda" and not on_gpu):
        raise ValueError(
            f"device={settings.device}: must be cpu or cuda, and this machine has "
            f"{'a' if on_gpu else 'no'} CUDA device"
        )
    device = torch.device(settings.device or ("cuda" if on_gpu else "cpu"))
    with ModelFolder.open(settings.checkpoint, revision=settings.revision) as folder:
        config = GPTJConfig.from_folder(folder)
        tokenizer = GPTJTokenizer.from_folder(folder)
        training, record = folder.read_training_data(), folder.read_trained_labels()
    task = task_of(config, settings.checkpoint)
    data = make_data(settings, task, config, tokenizer, training, record)
    result: dict[str, Any] = {
        "checkpoint": settings.checkpoint,
        "data": settings.data,
        "examples": len(data),
    }
    if settings.unigram is not None:
        if task.name != "causal-lm":
            raise ValueError(
                f"unigram={settings.unigram} is for causal-lm models, not {task.head.__name__}"
            )
        options = DataSettings(sequence_length=data.sequence_length, packing=data.packing)
        train = read(settings, settings.unigram, task, tokenizer, options)
        result["unigram_perplexity"] = unigram_perplexity(train, data)
    model = task.head.from_pretrained(
        settings.checkpoint,
        dtype=parse_dtype(settings.dtype),
        device=device,
        revision=settings.revision,
    )
    model.check_trained(settings.checkpoint)
    report_progress(model, math.ceil(len(data) / settings.batch_size))
    started = time.monotonic()
    part = collect(task, model, data, batch_size=settings.batch_size, device=device)
    metrics = task.metrics(data, part)
    if bad := [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]:
        raise ValueError(
            f"{', '.join(bad)}: the weights are damaged, or too large for {model.dtype}; "
            f"remedy: dtype=float32"
        )
    result |= {**metrics, "seconds": round(time.monotonic() - started, 3)}
    if data.labels is not None:
        logits = np.array([part.outputs[index] for index in range(len(data))])
        result |= class_scores(logits, data.targets, data.labels)
    return result


def make_data(
    settings: Settings,
    task: AnyTask,
    config: GPTJConfig,
    tokenizer: GPTJTokenizer,
    training: dict[str, Any],
    record: dict[str, Any],
) -> Any:
    """The task's data set, cut and its labels read as in training unless the settings differ.

    Args:
        training: the settings of the training's data, if known.
        record: how that data wrote its labels, if known.
    """
    length = settings.sequence_length or training.get("sequence_length", config.n_positions)
    if length > config.n_positions:
        raise ValueError(
            f"sequence_length={length} exceeds the model's n_positions={config.n_positions}"
        )
    tokenizer.check_rows(config.vocab_size, settings.checkpoint)
    for other in TASKS.values():
        for key in set(other.own_settings) - set(task.own_settings):
            if (value := getattr(settings, key, None)) is not None:
                raise ValueError(
                    f"{key}={value} is for {other.name} models, not {task.head.__name__}"
                )
    logger.info("reading %s", settings.data)
    stride = settings.stride
    if stride is None:
        stride = training.get("stride", min(DEFAULT_STRIDE, length // 4))
    labels = task.labels_of(config, record)
    written: list[str] | dict[str, str] = settings.label_names or training.get("label_names") or []
    if labels is not None and isinstance(written, dict) and not _names_new(labels, written):
        labels = labels.translated(written)  # perhaps of a part of the labels
    elif labels is not None and (settings.label_names or isinstance(written, dict)):
        names = DataSettings(label_names=written)
        labels = task.known_labels(config, settings.checkpoint, names, record)
    packing = settings.packing or training.get("packing", "concatenate")
    options = DataSettings(sequence_length=length, stride=stride, packing=packing)
    data = read(settings, settings.data, task, tokenizer, options, labels, settings.limit)
    logger.info("%s", data.summary())
    return data


def _names_new(labels: LabelSet, written: dict[str, str]) -> bool:
    """Whether a mapping gives names to a model that has none."""
    return labels.is_nameless and not set(written.values()) <= set(labels.names)


def read(
    settings: Settings,
    address: str,
    task: AnyTask,
    tokenizer: GPTJTokenizer,
    options: DataSettings,
    labels: LabelSet | None = None,
    limit: int | None = None,
) -> Any:
    """The task's data set of prepared or raw data; raw data of any size is prepared on disk.

    Args:
        limit: most rows to read or, for a language model, sequences, since a row may be a book.
            Memory holds these and one shard's rows, and no more raw data is read.
    """
    prepared = Prepared.at(address)
    if limit is not None and task.name != "causal-lm":
        if prepared is not None:
            raise ValueError(f"limit={limit} is for raw data, and {address} is prepared")
        rows = islice(data_rows(settings, address, task), limit)
        return task.read(rows, tokenizer, options, labels)
    with scratch_folder() as scratch:
        if prepared is None:
            check_columns(settings, task)
            plan = Plan.of(
                address,
                tokenizer,
                names=settings.columns,
                delimiter=settings.delimiter,
                task=task.name,
            )
            if limit is not None:
                parts = range(len(plan.parts))
                rows_of = (chunk.rows for part in parts for chunk in chunks(plan, part))
                length, packing = options.sequence_length, options.packing
                data = CausalLMData.start_of(rows_of, tokenizer, length, packing, limit)
                if not len(data):
                    raise DataError(f"{address}: fewer than two tokens to learn from")
                return data
            prepare(plan, str(scratch / "raw"), tokenizer)
            prepared = Prepared.at(str(scratch / "raw"))
            assert prepared is not None
        task.write(scratch / "data", prepared, tokenizer, options, labels)
        data = task.load(scratch / "data")  # mapped: still readable once the folder is deleted
        return data if limit is None else data.first(limit)


def data_rows(settings: Settings, address: str, task: AnyTask) -> Iterator[Row]:
    """The rows at an address, with the columns of a task."""
    check_columns(settings, task)
    columns = find_columns(address, task.row_kinds, settings.columns, delimiter=settings.delimiter)
    return read_rows(address, columns, settings.columns, delimiter=settings.delimiter)


def check_columns(settings: Settings, task: AnyTask) -> None:
    """ValueError for names of columns that the task does not have."""
    if unknown := settings.columns.keys() - set(task.columns):
        raise ValueError(
            f"columns.{min(unknown)}: unknown column; a {task.name} model reads "
            f"{', '.join(task.columns)}"
        )


def report_progress(model: GPTJPreTrainedModel, batches: int) -> None:
    """Log the progress of an evaluation of `batches` batches every few seconds."""
    started = last = time.monotonic()
    done = 0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS or done == batches:
            last = now
            logger.info("batch %d of %d, %.0f s", done, batches, now - started)

    model.register_forward_hook(count)


if __name__ == "__main__":
    main()

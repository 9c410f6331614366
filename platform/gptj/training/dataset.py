"""The data of a run: settings and a tokenizer in, tokenized examples out, once for a whole node."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from gptj.config import GPTJConfig
from gptj.data.labels import LabelSet
from gptj.data.prepared import Prepared, template_digest
from gptj.data.rows import Row
from gptj.data.sources import find_columns, read_rows
from gptj.data.split import split_rows
from gptj.storage.file_lock import FileLock
from gptj.tokenizer import GPTJTokenizer
from gptj.training.failures import naming_full_disk
from gptj.training.fingerprint import CountedRows, Fingerprint
from gptj.training.settings import Settings, SettingsError
from gptj.training.tasks import Data

logger = logging.getLogger(__name__)

LOCK = "tokenizing.lock"
FINGERPRINTS = "fingerprints.json"  # written last


class TaskData(NamedTuple):
    """What a run learns from and is measured on."""

    train: Data
    evaluation: Data | None
    fingerprints: dict[str, Fingerprint]  # of "train" and "evaluation"


def node_data(settings: Settings, tokenizer: GPTJTokenizer, folder: Path) -> TaskData:
    """The data, memory-mapped from a folder that this node's processes share.

    The first to come reads and tokenizes; the others wait. If it is killed, the next one does.

    Raises:
        DataError, SettingsError: see make_data.
        DiskFullError: if the folder has no room for it.
    """
    with FileLock(folder / LOCK) as lock:
        lock.take()
        if not (folder / FINGERPRINTS).exists():
            with naming_full_disk(folder):
                _tokenize(settings, tokenizer, folder)
    task = settings.task_definition
    found = json.loads((folder / FINGERPRINTS).read_text())
    return TaskData(
        task.load(folder / found["train"]["folder"]),
        task.load(folder / found["evaluation"]["folder"]) if "evaluation" in found else None,
        {name: Fingerprint(**each["fingerprint"]) for name, each in found.items()},
    )


def make_data(settings: Settings, tokenizer: GPTJTokenizer) -> TaskData:
    """Read and tokenize the training and the evaluation data, into this process's memory.

    A classifier that is trained further keeps its labels.

    Raises:
        DataError: naming what cannot be read.
        SettingsError: if the settings contradict a classifier's labels.
    """
    labels = _checkpoint_labels(settings)
    train, fingerprint = _read(settings, settings.train_data, tokenizer, labels)
    fingerprints = {"train": fingerprint}
    if settings.evaluation_data is None:
        return TaskData(train, None, fingerprints)
    evaluation, fingerprint = _read(
        settings, settings.evaluation_data, tokenizer, train.labels, evaluation=True
    )
    fingerprints["evaluation"] = fingerprint
    return TaskData(train, evaluation, fingerprints)


def task_rows(settings: Settings, address: str, *, evaluation: bool = False) -> Iterator[Row]:
    """The rows at an address, with the task's columns: those to train on, or to measure with."""
    data, task = settings.data, settings.task_definition
    columns = find_columns(address, task.row_kinds, data.columns, delimiter=data.delimiter)
    rows = read_rows(address, columns, data.columns, delimiter=data.delimiter)
    if (share := data.evaluation_split) is None:
        return rows
    cut = "text" if task.name == "causal-lm" else None  # a book is one row
    return split_rows(rows, share, settings.seed, held_out=evaluation, cut=cut)


def _tokenize(settings: Settings, tokenizer: GPTJTokenizer, folder: Path) -> None:
    started = time.monotonic()
    data = make_data(settings, tokenizer)
    # A name of its own for each try: one that was killed may have left half a folder.
    suffix = f"{time.time_ns():x}"
    found = {}
    for name, each in (("train", data.train), ("evaluation", data.evaluation)):
        if each is not None:
            each.save(folder / f"{name}-{suffix}")
            fingerprint = asdict(data.fingerprints[name])
            found[name] = {"folder": f"{name}-{suffix}", "fingerprint": fingerprint}
    rows = sum(each.rows for each in data.fingerprints.values())
    logger.info("read and tokenized %d rows in %.1f s", rows, time.monotonic() - started)
    unfinished = folder / f"{FINGERPRINTS}.{suffix}"
    unfinished.write_text(json.dumps(found))
    unfinished.rename(folder / FINGERPRINTS)


def _checkpoint_labels(settings: Settings) -> LabelSet | None:
    checkpoint = settings.model.checkpoint
    if not checkpoint:
        return None
    config = GPTJConfig.from_pretrained(checkpoint, revision=settings.model.revision or None)
    return settings.task_definition.known_labels(config, checkpoint, settings.data)


def _read(
    settings: Settings,
    address: str,
    tokenizer: GPTJTokenizer,
    labels: LabelSet | None,
    *,
    evaluation: bool = False,
) -> tuple[Data, Fingerprint]:
    task = settings.task_definition
    if (prepared := Prepared.at(address)) is not None:
        check_prepared(settings, address)
        data = task.read_prepared(prepared, tokenizer, settings.data)
        return data, Fingerprint(prepared.index.rows, prepared.digest)
    rows = CountedRows(
        task_rows(settings, address, evaluation=evaluation), template_digest(tokenizer)
    )
    data = task.read(rows, tokenizer, settings.data, labels)
    return data, rows.fingerprint


def check_prepared(settings: Settings, address: str) -> None:
    """SettingsError for settings that say how raw data are read, where none are."""
    data = settings.data
    given: dict[str, object] = {"evaluation_split": data.evaluation_split}
    addresses = {settings.train_data, settings.evaluation_data} - {None, address}
    if all(Prepared.at(each) is not None for each in addresses if each is not None):
        given |= {"columns": data.columns, "delimiter": data.delimiter}
    if wrong := [f"data.{name}" for name, value in given.items() if value]:
        raise SettingsError(
            f"{address} is prepared, and {', '.join(wrong)} says how raw data are read: leave it "
            f"out" + (", and prepare data to measure with" if data.evaluation_split else "")
        )

"""A run's data: settings and a tokenizer in, tokenized examples out, once per node.

Raw data is prepared first (gptj.data.preparing); prepared data becomes memory-mapped files of
examples in a folder that the node's processes share. Neither step holds more than one shard.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from gptj import storage
from gptj.checkpoints.folder import ADAPTER_FILES, CONFIG, TRAINING, ModelFolder
from gptj.checkpoints.manifest import Manifest, describe
from gptj.config import GPTJConfig
from gptj.data.labels import REGRESSION, SINGLE_LABEL, LabelNames, LabelSet
from gptj.data.prepared import Index, Prepared
from gptj.data.preparing import (
    CHUNK_CHARACTERS,
    Plan,
    differences,
    is_current,
    part_rows,
    prepare,
)
from gptj.data.rows import DataError, Row, refuse_row
from gptj.data.split import Split
from gptj.data.unfinished import begun_plan
from gptj.errors import CheckpointError
from gptj.storage.file_lock import FileLock
from gptj.tokenizer import GPTJTokenizer
from gptj.training.failures import EXAMPLES_LIMIT_REMEDY, EXAMPLES_REMEDY, naming_full_disk
from gptj.training.fingerprint import Fingerprint
from gptj.training.room import check_room_for
from gptj.training.settings import Settings, SettingsError
from gptj.training.tasks import Data

logger = logging.getLogger(__name__)

TOKEN_BYTES = 4
LOCK = "tokenizing.lock"
FINGERPRINTS = "fingerprints.json"  # written last
EXAMPLES = "examples.json"  # a manifest of the examples' files
ABANDONED = "abandoned.json"  # fingerprints of killed processes' examples, until these are checked

Prepare = Callable[[Plan, str, GPTJTokenizer], object]  # like gptj.data.preparing.prepare


class TaskData(NamedTuple):
    """Training and evaluation data."""

    train: Data
    evaluation: Data | None
    fingerprints: dict[str, Fingerprint]  # by name: "train", "evaluation"
    commits: dict[str, str]  # of those that are on the hub, by name


def prepare_run_data(
    settings: Settings, tokenizer: GPTJTokenizer, checkpoint: str | None, prepare: Prepare
) -> dict[str, str]:
    """Prepare the run's raw data in its folder, unless already done.

    Args:
        checkpoint: the checkpoint to resume from, if any; its data must be the same. Of a data set
            on the hub, that is what the run has prepared, wherever its branch is now.
        prepare: prepares a plan's data in a folder, resuming if interrupted.

    Returns:
        Addresses of the prepared data by name: "train" and, if there is any, "evaluation".

    Raises:
        DataError: naming what cannot be read.
        SettingsError: if the run would resume with different data.
    """
    found = {}
    for name, address in _addresses(settings).items():
        if Prepared.at(address) is not None:
            check_prepared(settings, address)
            found[name] = address
            continue
        folder = found[name] = storage.join(settings.folder, "data", name)
        done = _finished(folder)
        if checkpoint is not None and done is not None and done.commit is not None:
            continue  # of that commit, which the hub need not have any more
        plan = raw_plan(settings, name, tokenizer)
        if done is not None and is_current(plan, done.index):
            continue
        if done is not None and checkpoint is not None:
            raise SettingsError(
                f"the run {settings.run!r} would resume from {checkpoint} with other data: "
                f"{folder} was not made from data.{name}={address}. Restore the original data, or "
                f"choose another run="
            )
        begun = begun_plan(folder)
        if done is not None or begun is None or differences(begun, plan):
            storage.delete_folder(folder)
        prepare(plan, folder, tokenizer)
    return found


def node_data(
    settings: Settings,
    tokenizer: GPTJTokenizer,
    folder: Path,
    prepared: Mapping[str, str] | None = None,
) -> TaskData:
    """The data, memory-mapped from a folder that this node's processes share.

    The first process creates it while the others wait; if it is killed, the next takes over.
    A classifier that is trained further keeps its labels.

    Args:
        prepared: the result of prepare_run_data; None: prepare raw data here.

    Raises:
        DataError: naming what cannot be read.
        SettingsError: if the settings contradict prepared data, or a classifier's labels.
        DiskFullError: if the folder has no room for it.
    """
    with FileLock(folder / LOCK) as lock:
        lock.take()
        if not (folder / FINGERPRINTS).exists() and not _recover(folder):
            with naming_full_disk(folder, remedy=EXAMPLES_REMEDY):
                _make(settings, tokenizer, folder, prepared or {})
    task = settings.task_definition
    found = _read_fingerprints(folder / FINGERPRINTS)
    return TaskData(
        task.load(folder / found["train"]["folder"]),
        task.load(folder / found["evaluation"]["folder"]) if "evaluation" in found else None,
        {name: Fingerprint(**each["fingerprint"]) for name, each in found.items()},
        {name: each["commit"] for name, each in found.items() if each["commit"] is not None},
    )


def set_aside(folder: Path) -> None:
    """Keep what killed processes have left in node_data's folder for it to check.

    Call before anyone else uses the folder. Examples that are not finished are deleted.
    """
    names: set[str] = set()
    # ABANDONED is there if a process was killed as it was checking.
    for fingerprints in (folder / FINGERPRINTS, folder / ABANDONED):
        if fingerprints.exists():
            try:
                found = _read_fingerprints(fingerprints)
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                logger.warning("making the examples again: %s is damaged: %s", fingerprints, error)
                break
            names = {EXAMPLES, ABANDONED, *(each["folder"] for each in found.values())}
            fingerprints.rename(folder / ABANDONED)
            break
    _delete_all(folder, but=names)


def _read_fingerprints(path: Path) -> dict[str, dict[str, Any]]:
    """Each data set's folder, fingerprint and commit.

    ValueError, TypeError, LookupError or AttributeError if the file is damaged: it is not synced,
    so it may be empty after a power loss.
    """
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())
    for each in (found["train"], *found.values()):
        Fingerprint(**each["fingerprint"])
        path.with_name(each["folder"])
        each["commit"]
    return found


def _recover(folder: Path) -> bool:
    """Whether killed processes have left their examples, complete and unaltered."""
    if not (folder / ABANDONED).exists():
        return False
    try:
        manifest = Manifest.read(str(folder), EXAMPLES)
        if manifest is None:
            raise CheckpointError(f"{folder} has no {EXAMPLES}")
        manifest.check_files(manifest.files)
    except (CheckpointError, storage.StorageError) as error:
        logger.warning("making the examples again: %s", error)
        _delete_all(folder, but={LOCK})
        return False
    (folder / ABANDONED).rename(folder / FINGERPRINTS)
    logger.info("reusing this node's examples, which are complete and unaltered")
    return True


def _delete_all(folder: Path, but: Set[str]) -> None:
    for path in folder.iterdir():
        if path.name in but:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def raw_plan(
    settings: Settings,
    name: str,
    tokenizer: GPTJTokenizer | None,
    *,
    chunk_characters: int = CHUNK_CHARACTERS,
) -> Plan:
    """How to read a run's raw "train" or "evaluation" data.

    Raises:
        DataError: like Plan.of.
        SettingsError, FileNotFoundError, CheckpointError: like checkpoint_labels.
    """
    data, split = settings.data, None
    names: LabelNames | None = data.label_names or None
    trained = checkpoint_labels(settings) if settings.task == "classification" else None
    allowed, problem_type = allowed_labels(settings, trained)
    # In a list they say nothing of how rows write them, and the model's training does.
    if isinstance(names, list) and trained is not None and trained.trained is not None:
        names = allowed if problem_type == SINGLE_LABEL else None
    if data.evaluation_split is not None:
        cut = "text" if settings.task == "causal-lm" else None  # a book is one row
        held_out = name == "evaluation"
        split = Split(data.evaluation_split, settings.seed, held_out=held_out, cut=cut)
    return Plan.of(
        _addresses(settings)[name],
        tokenizer,
        names=data.columns,
        delimiter=data.delimiter,
        bad_rows=data.bad_rows,
        chunk_characters=chunk_characters,
        task=settings.task,
        label_names=names if allowed is not None else None,
        split=split,
        problem_type=problem_type,
    )


def training_rows(settings: Settings) -> Iterator[Row]:
    """A run's raw training rows, with the task's columns; bad rows are handled per the settings."""
    plan = raw_plan(settings, "train", None)
    on_bad = refuse_row if plan.bad_rows == "refuse" else _skip
    for part in range(len(plan.parts)):
        yield from part_rows(plan, part, on_bad)


def _skip(error: DataError) -> None:
    """Skipped rows are counted when they are prepared."""


def _addresses(settings: Settings) -> dict[str, str]:
    addresses = {"train": settings.train_data, "evaluation": settings.evaluation_data}
    return {name: address for name, address in addresses.items() if address is not None}


def _finished(folder: str) -> Prepared | None:
    try:
        return Prepared.at(folder)
    except DataError:  # unfinished
        return None


def _make(
    settings: Settings, tokenizer: GPTJTokenizer, folder: Path, prepared: Mapping[str, str]
) -> None:
    started = time.monotonic()
    # Unique per attempt: a killed one may have left a partial folder.
    suffix = secrets.token_hex(8)
    task, labels = settings.task_definition, checkpoint_labels(settings)
    found, rows = {}, 0
    addresses, sources = _addresses(settings), {}
    for name, address in addresses.items():
        raw = folder / f"raw-{name}-{suffix}"
        source = Prepared.at(prepared.get(name, address))
        if source is None:
            prepare(raw_plan(settings, name, tokenizer), str(raw), tokenizer)
            source = Prepared.at(str(raw))
            assert source is not None
        elif source.address == address:
            check_prepared(settings, address)
        sources[name] = source
        columns, others = (sources[each].index.settings["columns"] for each in ("train", name))
        if settings.task == "classification" and others != columns:
            raise SettingsError(
                f"data.train has the columns {', '.join(columns)}, and {address} has "
                f"{', '.join(others)}: evaluate on the same kind of rows as in training"
            )
    if settings.data.evaluation_split is not None:
        # One data set: a rare label may be in the held-out part alone.
        labels = task.labels_in(list(sources.values()), settings.data, labels)
    for name, source in sources.items():
        address = addresses[name]
        target = folder / f"{name}-{suffix}"
        needed = _example_bytes(settings, source.index)
        remedies = EXAMPLES_REMEDY, EXAMPLES_LIMIT_REMEDY
        check_room_for(f"the examples of {address}", needed, folder, *remedies)
        with naming_full_disk(folder, remedy=EXAMPLES_REMEDY):
            task.write(target, source, tokenizer, settings.data, labels)
        labels = task.load(target).labels
        fingerprint = Fingerprint(source.index.rows, source.digest)
        found[name] = {
            "folder": target.name,
            "fingerprint": asdict(fingerprint),
            "commit": source.commit,
        }
        rows += source.index.rows
        if source.index.skipped:
            logger.warning(
                "%s data: %d bad rows were skipped, such as %s",
                name,
                source.index.skipped,
                source.index.bad[0],
            )
        shutil.rmtree(folder / f"raw-{name}-{suffix}", ignore_errors=True)
    files = [
        path.relative_to(folder).as_posix()
        for each in found.values()
        for path in (folder / str(each["folder"])).rglob("*")
        if path.is_file()
    ]
    manifest = describe(str(folder), files)
    (folder / EXAMPLES).unlink(missing_ok=True)  # of a process that failed below
    manifest.write(EXAMPLES)
    unfinished = folder / f"{FINGERPRINTS}.{suffix}"
    unfinished.write_text(json.dumps(found))
    unfinished.rename(folder / FINGERPRINTS)
    logger.info("made examples of %d rows in %.1f s", rows, time.monotonic() - started)


def _example_bytes(settings: Settings, index: Index) -> int:
    """At least the bytes of prepared data's examples: token ids, and masks of what is learned."""
    data, tokens = settings.data, index.tokens
    masked = settings.task == "causal-lm" and index.learned < tokens
    if settings.task == "classification" or (masked and data.packing != "concatenate"):
        tokens = min(tokens, index.rows * data.sequence_length)  # longer ones are truncated
    return tokens * (TOKEN_BYTES + masked)


def checkpoint_labels(settings: Settings) -> LabelSet | None:
    """The labels of the classifier that a run trains further, if it does.

    Raises:
        SettingsError: if the settings contradict them.
        FileNotFoundError: if the checkpoint does not exist.
        CheckpointError: if it is damaged.
    """
    checkpoint = settings.model.checkpoint
    if not checkpoint:
        return None
    task, files = settings.task_definition, [CONFIG, TRAINING, *ADAPTER_FILES]
    revision = settings.model.revision or None
    with ModelFolder.open(checkpoint, revision=revision, files=files) as folder:
        config = GPTJConfig.from_folder(folder)
        record = None if task.labels_of(config) is None else folder.read_trained_labels()
    return task.known_labels(config, checkpoint, settings.data, record)


def allowed_labels(
    settings: Settings, trained: LabelSet | None
) -> tuple[LabelNames | None, str | None]:
    """What rows may have as a label, and of which kind labels are, before any row is read.

    For check_label: names, or None if any are allowed or labels are values to predict; and one of
    gptj.config.PROBLEM_TYPES, or None if it is not yet known.

    Args:
        trained: the result of checkpoint_labels.
    """
    data = settings.data
    problem_type = data.problem_type if trained is None else trained.problem_type
    if problem_type == REGRESSION:
        return None, problem_type
    return (data.label_names or None) if trained is None else trained.expected, problem_type


def check_prepared(settings: Settings, address: str) -> None:
    """SettingsError for raw-data settings if all data is already prepared."""
    data = settings.data
    given: dict[str, object] = {"evaluation_split": data.evaluation_split}
    addresses = {settings.train_data, settings.evaluation_data} - {None, address}
    if all(Prepared.at(each) is not None for each in addresses if each is not None):
        given |= {
            "columns": data.columns,
            "delimiter": data.delimiter,
            "bad_rows": data.bad_rows == "skip",
        }
    if wrong := [f"data.{name}" for name, value in given.items() if value]:
        again = "; to leave out rows, prepare them again with bad_rows=skip"
        if settings.task == "classification":
            again += ", and problem_type=regression for values to predict"
        raise SettingsError(
            f"{address} is prepared, but {', '.join(wrong)} applies to raw data: leave it out"
            + (", and prepare evaluation data" if data.evaluation_split else "")
            + (again if data.bad_rows == "skip" else "")
        )

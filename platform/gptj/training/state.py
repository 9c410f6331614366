"""A training checkpoint: everything a run needs to resume as if it had never stopped.

Each rank writes its own files to a common folder: a shard of the fp32 masters and the optimizer's
moments (gptj.training.shards), the state of its random generators, and a manifest of both; rank 0
adds `progress.json` with the step, settings, data fingerprints and metrics so far. The position in
the data follows from the step, and the weights from the masters. Frozen weights are not included;
they are read from their source. Any number of ranks can resume.

Each attempt of a run, from its start or a resume to its end, writes folders of its own: a worker
that Ray has given up, but that still runs on a node cut off from the cluster, alters none of
another attempt's.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptj import storage
from gptj.adapters.base import Base
from gptj.checkpoints.folder import TRAINING
from gptj.checkpoints.manifest import Manifest, read_recorded, verify
from gptj.data.labels import LabelSet
from gptj.errors import CheckpointError
from gptj.training.fingerprint import Fingerprint
from gptj.training.settings import MAY_CHANGE, Settings, SettingsError, changed, extended

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)(?:-attempt-(\d+))?")
OLD = "zero/"  # where versions until 0.1 kept DeepSpeed's own files


@dataclass
class Progress:
    """Where a run is, and what was measured on the way."""

    step: int = 0  # optimizer steps done
    world_size: int = 1  # ranks that wrote the checkpoint
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)  # a Fingerprint of each data set
    commits: dict[str, str] = field(default_factory=dict)  # of data sets on the hub, by name
    # A classifier's, in the order of its outputs; None also in checkpoints of earlier versions.
    labels: list[str] | None = None
    base: dict[str, Any] | None = None  # an adapter's base model, as it was at the beginning
    start: dict[str, Any] | None = None  # the checkpoint that training began from, as a Base
    # Logged points, by step; non-finite values are stored as null.
    history: list[dict[str, float | None]] = field(default_factory=list)
    unlogged: list[float] = field(default_factory=list)  # losses of the steps since the last point
    # The best evaluation: step, score, metrics, and whether its checkpoint is kept.
    best: dict[str, Any] | None = None
    worse: int = 0  # evaluations since then
    unfinished: bool = False  # the run was stopped before this step's evaluation
    overflows: int = 0  # steps skipped because gradients overflowed in fp16
    overflows_in_a_row: int = 0  # the most recent consecutive ones
    spikes: int = 0  # steps skipped because of an outlying gradient norm
    norms: list[float] = field(default_factory=list)  # the last ones, if spikes are skipped
    counters: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's
    probe: dict[str, Any] | None = None  # a Probe; None in checkpoints of earlier versions

    @property
    def skipped_steps(self) -> int:
        return self.overflows + self.spikes


def upload_state(
    folder: Path,
    address: str,
    rank: int,
    world_size: int,
    fence: Callable[[], None] = lambda: None,
) -> None:
    """Upload this rank's files to the checkpoint's address, the manifest last.

    A rank that dies meanwhile leaves no manifest, and so no checkpoint.

    Args:
        fence: raises if another submission of the run has taken over, perhaps during an upload.
    """
    fence()
    manifest = manifest_name(rank, world_size)
    names = [file.name for file in storage.list_files(str(folder)) if file.name != manifest]
    try:
        storage.for_each(
            lambda name: storage.upload(folder / name, storage.join(address, name)), names
        )
    except storage.StorageError:
        fence()  # who has taken over deletes what this rank was writing
        raise
    fence()
    storage.upload(folder / manifest, storage.join(address, manifest))


def read_progress(address: str) -> Progress:
    """Read a checkpoint's progress, checking all ranks' manifests and all files' sizes.

    Raises:
        CheckpointError: naming what is missing, truncated or altered, and the remedy.
    """
    try:
        manifest = _first_manifest(address)
        if any(name.startswith(OLD) for name in manifest.files):
            raise CheckpointError(
                f"{address} was written by an older version; only that version can resume from it"
            )
        content = read_recorded(address, PROGRESS, manifest)  # with the whole history
        fields = json.loads(content)
        if "world" in fields:  # before it was renamed
            fields["world_size"] = fields.pop("world")
        progress = Progress(**fields)
        for rank in range(progress.world_size):
            rank_manifest(address, rank, progress.world_size).check_sizes()
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; remedy: delete the folder {address}, and the run resumes from the "
            f"checkpoint before it"
        ) from error
    return progress


def checkpoint_name(step: int, attempt: int = 1) -> str:
    """A checkpoint's folder; ordered by step, then attempt."""
    return f"checkpoint-{step:08}" + (f"-attempt-{attempt:04}" if attempt > 1 else "")


def checkpoint_step(address: str) -> int:
    """The step of a checkpoint, by its address or name."""
    found = _CHECKPOINT.fullmatch(address.rpartition("/")[2])
    assert found is not None, address
    return int(found[1])


def latest_checkpoint(folder: str, step: int | None = None) -> str | None:
    """The address of the newest training checkpoint that all ranks have finished, if any.

    Args:
        step: only that of this step.
    """
    finished = [name for name, complete in _checkpoints(folder).items() if complete]
    if step is not None:
        finished = [name for name in finished if checkpoint_step(name) == step]
    return storage.join(folder, max(finished)) if finished else None


def delete_old_checkpoints(folder: str, keep: int, best: int | None = None) -> None:
    """Delete old checkpoints, complete or not, except the `keep` newest complete ones and the best.

    Failure to delete is only logged: the run does not depend on it.

    Args:
        best: its step.
    """
    try:
        checkpoints = _checkpoints(folder)
        kept = sorted(name for name, complete in checkpoints.items() if complete)[-keep:]
        for name in checkpoints:
            old = bool(kept) and name not in kept and name < kept[-1]
            if old and checkpoint_step(name) != best:
                storage.delete_folder(storage.join(folder, name))
    except storage.StorageError as error:
        logger.warning("cannot delete an old checkpoint in %s: %s", folder, error)


def delete_unfinished_checkpoints(folder: str, attempt: int) -> None:
    """Delete what dead ranks left of incomplete checkpoints, and abort their uploads.

    Call when an attempt begins. Those of later attempts stay: this one may have been overtaken.
    """

    def is_ours(name: str) -> bool:
        found = _CHECKPOINT.fullmatch(name.partition("/")[0])
        return found is not None and int(found[2] or 1) <= attempt

    for name, complete in _checkpoints(folder).items():
        if not complete and is_ours(name):
            storage.delete_folder(storage.join(folder, name))
    storage.delete_unfinished(folder, is_ours)


def check_resumable(settings: Settings, address: str) -> Progress:
    """The progress of the checkpoint that a run is to resume from.

    Raises:
        SettingsError: if the settings would change what the run computes.
        CheckpointError: if the checkpoint is damaged, or its adapter's base model has changed.
    """
    progress = read_progress(address)
    if different := changed(progress.settings, settings.model_dump(mode="json")):
        raise SettingsError(
            f"the run {settings.run!r} would resume from {address} with other settings: "
            f"{'; '.join(different)}. {MAY_CHANGE}. Set them back; or, to train further with new "
            f"settings, finish this run with the old ones, then start another run= with "
            f"model.checkpoint={settings.model_folder}"
        )
    if progress.base is not None:
        before = Base(**progress.base)
        before.check(address, Base.at(before.address, before.pin))
    return progress


def check_same_data(
    settings: Settings, address: str, progress: Progress, found: Mapping[str, Fingerprint]
) -> None:
    """SettingsError, with both values, if the data is not what the checkpoint was trained on."""
    places = {"train": settings.train_data, "evaluation": settings.evaluation_data}
    for name, fields in progress.data.items():
        before, now = Fingerprint(**fields), found[name]
        if before != now:
            raise SettingsError(
                f"the run {settings.run!r} would resume from {address} with other data: "
                f"data.{name}={places[name]} had {before} and has {now}. Restore the original "
                f"data, or choose another run="
            )


def check_same_labels(
    settings: Settings, address: str, progress: Progress, labels: LabelSet
) -> None:
    """SettingsError if a classifier's outputs would stand for other labels than until now."""
    written = settings.data.label_names
    given = [*dict.fromkeys(written.values() if isinstance(written, dict) else written)]
    before, found = progress.labels, [*labels.names]
    if before is None and labels.is_nameless and {*given} == {*found}:
        before = given  # earlier versions took generic names in the order of the settings
    if before not in (None, found):
        raise SettingsError(
            f"the run {settings.run!r} would resume from {address} with other labels: its outputs "
            f"were {', '.join(before)}, and would be {', '.join(found)}. Choose another run="
        )


def is_complete(settings: Settings) -> bool:
    """Whether the run has already written its model, verifying each of its files.

    False if the run has since been extended, or given more patience than it ended with.

    Raises:
        SettingsError: if it was written with other settings.
        CheckpointError: if the model is damaged.
    """
    address = settings.model_folder
    if Manifest.read(address) is None:
        return False
    manifest = verify(address)
    training = json.loads(read_recorded(address, TRAINING, manifest))
    now = settings.model_dump(mode="json")
    if different := changed(training["settings"], now):
        raise SettingsError(
            f"the run {settings.run!r} is complete, with other settings: {'; '.join(different)}. "
            f"{MAY_CHANGE}. Choose another run= (with model.checkpoint={address} it starts from "
            f"this model), or delete {settings.folder}"
        )
    more = extended(training["settings"], now)
    stopped_early, worse = _end(training, settings.folder)
    patience = settings.early_stopping
    if patience is not None and worse >= patience:
        if more:  # also if it came to its last step just then
            raise SettingsError(
                f"the run {settings.run!r} ended after step {training['steps']}, and the last "
                f"{worse} evaluations were not better: with early_stopping={patience} it takes no "
                f"further step; raise that as well, or set it to null"
            )
        return True
    if not (stopped_early or more):
        return True
    if latest_checkpoint(settings.folder) is None:
        raise SettingsError(
            f"the run {settings.run!r} is complete and has no checkpoint left to extend it from: "
            f"choose another run= with model.checkpoint={address}"
        )
    return False


def _end(training: Mapping[str, Any], folder: str) -> tuple[bool, int]:
    """Whether a complete run stopped early, and how many evaluations in a row were not better."""
    if "stopped_early" in training:
        return training["stopped_early"], training["worse"]
    # A model of an earlier version: by its last checkpoint.
    patience, newest = training["settings"].get("early_stopping"), latest_checkpoint(folder)
    if patience is None or newest is None:
        return False, 0
    worse = read_progress(newest).worse
    return worse >= patience, worse


def _checkpoints(folder: str) -> dict[str, bool]:
    """The checkpoints in a run's folder, and whether all ranks have finished them."""
    files: dict[str, list[str]] = {}
    for file in storage.list_files(folder, _is_of_checkpoint):
        name, _, rest = file.name.partition("/")
        files.setdefault(name, []).append(rest)
    return {name: _writers(each) is not None for name, each in files.items()}


def _is_of_checkpoint(name: str) -> bool:
    return "/" in name and _CHECKPOINT.fullmatch(name.partition("/")[0]) is not None


def _writers(names: Iterable[str]) -> int | None:
    """The number of ranks that finished a checkpoint together; None if some have not.

    Ranks that died, of a run with another world size, may have left manifests too.
    """
    found = Counter(name[-10:-5] for name in names if name.startswith("manifest-"))
    return next((int(world) for world, ranks in found.items() if ranks == int(world)), None)


def _first_manifest(address: str) -> Manifest:
    """Rank 0's manifest, whatever the number of ranks."""
    names = [file.name for file in storage.list_files(address)]
    if (writers := _writers(names)) is None:
        found = sorted(name for name in names if name.startswith("manifest-"))
        if not found:
            raise CheckpointError(f"{address} is not a training checkpoint: it has no manifest")
        world_size = int(found[-1][-10:-5])
        wanted = [manifest_name(rank, world_size) for rank in range(world_size)]
        lacking = [name for name in wanted if name not in found]
        raise CheckpointError(f"{address} is incomplete: {', '.join(lacking)} is missing")
    return rank_manifest(address, 0, writers)


def rank_manifest(address: str, rank: int, world_size: int) -> Manifest:
    name = manifest_name(rank, world_size)
    manifest = Manifest.read(address, name)
    if manifest is None:
        raise CheckpointError(f"{address} is incomplete: {name} is missing")
    return manifest


def manifest_name(rank: int, world_size: int) -> str:
    return f"manifest-{rank:05}-of-{world_size:05}.json"


def shard_name(rank: int, world_size: int) -> str:
    return f"shard-{rank:05}-of-{world_size:05}.safetensors"


def random_name(rank: int) -> str:
    return f"random-{rank:05}.pt"

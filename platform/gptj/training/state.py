"""A training checkpoint: everything that a run needs to resume as if nothing had happened.

A folder that all ranks write together, each its own files: DeepSpeed's shard of weights and
optimizer (`zero/…`), the state of its random generators, and a manifest of these; rank 0 adds
`progress.json` with the step, the settings, the data's fingerprints and the measurements so far.
The position in the data follows from the step. Frozen weights are not in it: they are read from
where they came from.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptj import storage
from gptj.adapters.base import Base
from gptj.checkpoints.folder import TRAINING
from gptj.checkpoints.manifest import Manifest, describe, read_verified, verify
from gptj.errors import CheckpointError
from gptj.serialization.json_object import to_json
from gptj.training.fingerprint import Fingerprint
from gptj.training.settings import MAY_CHANGE, Settings, SettingsError, changed, extended

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"
TAG = "zero"  # DeepSpeed's folder within ours


@dataclass
class Progress:
    """Where a run is, and what was measured on the way."""

    step: int = 0  # optimizer steps done
    world_size: int = 1  # ranks that wrote the checkpoint
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)  # a Fingerprint of each data set
    base: dict[str, Any] | None = None  # the model under an adapter, as it was at the beginning
    # Logged points, by step; in a file a number that is not finite becomes None.
    history: list[dict[str, float | None]] = field(default_factory=list)
    unlogged: list[float] = field(default_factory=list)  # losses of the steps since the last point
    # The best evaluation: step, score, metrics, and whether its checkpoint is kept.
    best: dict[str, Any] | None = None
    worse: int = 0  # evaluations since then
    overflows: int = 0  # steps that were skipped, since gradients overflowed in fp16
    overflows_in_a_row: int = 0  # of these the last ones
    spikes: int = 0  # steps that were skipped, since the gradient norm was far above the usual
    norms: list[float] = field(default_factory=list)  # the last ones, if spikes are skipped

    @property
    def skipped_steps(self) -> int:
        return self.overflows + self.spikes


def save_state(engine: Any, folder: Path, progress: Progress, rank: int) -> None:
    """Write this rank's part into an empty local folder; all ranks call it together."""
    (folder / TAG).mkdir(parents=True)
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    random = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    torch.save(random, folder / _random_name(rank))
    if rank == 0:
        (folder / PROGRESS).write_text(to_json(asdict(progress)))
    # DeepSpeed leaves a copy of its conversion scripts, which are no state.
    for script in folder.glob("zero_to_*.py"):
        script.unlink()
    names = [file.name for file in storage.list_files(str(folder))]
    describe(str(folder), names).write(_manifest_name(rank, progress.world_size))


def upload_state(folder: Path, address: str, rank: int, world_size: int) -> None:
    """Copy what this rank saved to where the checkpoint is kept; its manifest comes last.

    A rank that dies in between leaves no manifest, and so no checkpoint; one that comes here again
    takes the manifest of its first try away before it changes a file.
    """
    manifest = _manifest_name(rank, world_size)
    storage.delete(storage.join(address, manifest))
    names = [file.name for file in storage.list_files(str(folder)) if file.name != manifest]
    storage.for_each(lambda name: storage.upload(folder / name, storage.join(address, name)), names)
    storage.upload(folder / manifest, storage.join(address, manifest))


def read_progress(address: str) -> Progress:
    """A checkpoint's progress, after a look at all ranks' manifests and all files' sizes.

    Raises:
        CheckpointError: naming what is missing, cut off or altered, and the remedy.
    """
    try:
        content = read_verified(address, PROGRESS, _first_manifest(address))
        fields = json.loads(content)
        if "world" in fields:  # before it was renamed
            fields["world_size"] = fields.pop("world")
        progress = Progress(**fields)
        for rank in range(progress.world_size):
            _manifest(address, rank, progress.world_size).check_sizes()
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; remedy: delete the folder {address}, and the run resumes from the "
            f"checkpoint before it"
        ) from error
    return progress


def latest_checkpoint(folder: str) -> str | None:
    """The address of the newest training checkpoint that all ranks have finished, if any."""
    finished = [name for name, complete in _checkpoints(folder).items() if complete]
    return storage.join(folder, max(finished)) if finished else None


def delete_old_checkpoints(folder: str, keep: int, best: str | None = None) -> None:
    """Delete all but the newest complete checkpoints and the best, and what dead ranks have left.

    What cannot be deleted is only a warning: the run does not depend on it.
    """
    try:
        checkpoints = _checkpoints(folder)
        kept = sorted(name for name, complete in checkpoints.items() if complete)[-keep:]
        for name in checkpoints:
            if kept and name not in kept and name < kept[-1] and name != best:
                storage.delete_folder(storage.join(folder, name))
    except storage.StorageError as error:
        logger.warning("an old checkpoint stays in %s: %s", folder, error)


def check_resumable(settings: Settings, address: str, world_size: int) -> Progress:
    """The progress of the checkpoint that a run is to resume from.

    Raises:
        SettingsError: if the settings would change what the run computes.
        CheckpointError: if the checkpoint is damaged, or the model under its adapter is another.
    """
    progress = read_progress(address)
    if progress.world_size != world_size:
        raise SettingsError(
            f"{address} was written by {progress.world_size} workers and only as many can resume "
            f"from it: set workers.count={progress.world_size}, or another run="
        )
    if different := changed(progress.settings, settings.model_dump(mode="json")):
        raise SettingsError(
            f"the run {settings.run!r} would resume from {address} with other settings: "
            f"{'; '.join(different)}. {MAY_CHANGE}. Set them back; or, to train further with new "
            f"settings, let it end with the old ones, and begin another run= with "
            f"model.checkpoint={settings.model_folder}"
        )
    if progress.base is not None:
        before = Base(**progress.base)
        before.check(address, Base.at(before.address, before.revision))
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
                f"data.{name}={places[name]} had {before} and has {now}. Bring the data back as it "
                f"was, or choose another run="
            )


def is_complete(settings: Settings) -> bool:
    """Whether the run has written its model already; each file of it is read and compared.

    A run that has more steps now is not.

    Raises:
        SettingsError: if it has, with other settings.
        CheckpointError: if the model is damaged.
    """
    address = settings.model_folder
    if Manifest.read(address) is None:
        return False
    manifest = verify(address)
    training = json.loads(read_verified(address, TRAINING, manifest))
    now = settings.model_dump(mode="json")
    if different := changed(training["settings"], now):
        raise SettingsError(
            f"the run {settings.run!r} is complete, with other settings: {'; '.join(different)}. "
            f"{MAY_CHANGE}. Choose another run= (one with model.checkpoint={address} begins with "
            f"this model), or delete {settings.folder}"
        )
    if not extended(training["settings"], now):
        return True
    if latest_checkpoint(settings.folder) is None:
        raise SettingsError(
            f"the run {settings.run!r} is complete and has no checkpoint left to extend it from: "
            f"choose another run= with model.checkpoint={address}"
        )
    return False


def load_state(engine: Any, address: str, folder: Path, rank: int, world_size: int) -> None:
    """Bring this rank back to where the checkpoint was written; all ranks call it together.

    Only the files that this rank needs are copied, into an empty local folder, and compared with
    the manifests.

    Raises:
        CheckpointError: naming the file that is missing, cut off or altered.
    """
    needed: dict[str, Manifest] = {}
    for writer in range(world_size):
        manifest = _manifest(address, writer, world_size)
        for name in manifest.files:
            if name == _random_name(rank) or _is_for(name, rank):
                needed[name] = manifest
    storage.download_folder(address, folder, needed)
    for name, record in describe(str(folder), needed).files.items():
        needed[name].check_content(name, record.size, record.sha256)
    whole = all(parameter.requires_grad for parameter in engine.module.parameters())
    loaded, _ = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=whole)
    if loaded is None:
        raise CheckpointError(f"DeepSpeed found no state in {address}/{TAG}")
    random = torch.load(folder / _random_name(rank), weights_only=True)
    torch.set_rng_state(random["torch"])
    if torch.cuda.is_available() and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])


def _checkpoints(folder: str) -> dict[str, bool]:
    """The checkpoints in a run's folder, and whether all ranks have finished them."""
    manifests: dict[str, set[str]] = {}
    for file in storage.list_files(folder):
        name, _, rest = file.name.partition("/")
        if name.startswith("checkpoint-"):
            manifests.setdefault(name, set())
            if rest.startswith("manifest-"):  # manifest-RANK-of-WORLD.json, a rank's last file
                manifests[name].add(rest)
    return {
        name: any(len(found) == int(each[-10:-5]) for each in found)
        for name, found in manifests.items()
    }


def _is_for(name: str, rank: int) -> bool:
    """Whether a rank reads a file of DeepSpeed's: its own shard, or weights that all share."""
    if not name.startswith(f"{TAG}/"):
        return False
    owner = re.search(r"zero_pp_rank_(\d+)_", name)
    return owner is None or int(owner[1]) == rank


def _first_manifest(address: str) -> Manifest:
    """Rank 0's manifest, whatever the number of ranks."""
    for file in storage.list_files(address):
        if file.name.startswith("manifest-00000-of-"):
            manifest = Manifest.read(address, file.name)
            assert manifest is not None
            return manifest
    raise CheckpointError(f"{address} is no training checkpoint: it has no manifest of rank 0")


def _manifest(address: str, rank: int, world_size: int) -> Manifest:
    name = _manifest_name(rank, world_size)
    manifest = Manifest.read(address, name)
    if manifest is None:
        raise CheckpointError(f"{address} is incomplete: {name} is missing")
    return manifest


def _manifest_name(rank: int, world_size: int) -> str:
    return f"manifest-{rank:05}-of-{world_size:05}.json"


def _random_name(rank: int) -> str:
    return f"random-{rank:05}.pt"

"""Save and load DeepSpeed's state; gptj.training.state describes the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptj import storage
from gptj.checkpoints.manifest import FileRecord, Manifest, describe, hash_file
from gptj.serialization.json_object import to_json
from gptj.training.room import check_room_for
from gptj.training.shards import Restoration, counters, write_shard
from gptj.training.state import (
    PROGRESS,
    Progress,
    manifest_name,
    random_name,
    rank_manifest,
    read_progress,
    shard_name,
)


def save_state(engine: Any, folder: Path, progress: Progress, rank: int) -> None:
    """Write this rank's part into an empty local folder; all ranks call it together.

    At stage 0 all ranks have the same state, and rank 0 writes it.
    """
    records: dict[str, FileRecord] = {}
    if rank == 0 or engine.zero_optimization():
        name = shard_name(rank, progress.world_size)
        records[name] = write_shard(engine, folder / name)
    random = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    torch.save(random, folder / random_name(rank))
    small = [random_name(rank)]
    if rank == 0:
        progress.counters = counters(engine)
        # Not asdict, which would copy each point of a long history while training waits.
        (folder / PROGRESS).write_text(to_json(vars(progress)))
        small.append(PROGRESS)
    records |= describe(str(folder), small).files
    Manifest(str(folder), records).write(manifest_name(rank, progress.world_size))


def load_state(
    engine: Any, address: str, folder: Path, rank: int, world_size: int, seed: int
) -> None:
    """Restore this rank's state from a checkpoint; all ranks must call it.

    Copies only the shards that this rank needs, one at a time, into an empty local folder, and
    verifies them against the manifests. Random generators are restored if the number of ranks is
    the same; otherwise they are reseeded from the seed, the step and the rank.

    Raises:
        CheckpointError: naming the file that is missing, truncated or altered.
    """
    progress = read_progress(address)
    writers = progress.world_size
    restoration = Restoration(engine, progress.counters)
    for writer in range(writers):
        manifest = rank_manifest(address, writer, writers)
        name = shard_name(writer, writers)
        if name in manifest.files and restoration.needs(storage.join(address, name)):
            _fetch(address, name, manifest, folder)
            restoration.read(folder / name)
            (folder / name).unlink()
    restoration.finish(address)
    if writers != world_size:
        fresh = np.random.SeedSequence([seed, progress.step, rank]).generate_state(1)
        torch.manual_seed(int(fresh[0]))
        return
    name = random_name(rank)
    _fetch(address, name, rank_manifest(address, rank, writers), folder)
    random = torch.load(folder / name, weights_only=True)
    torch.set_rng_state(random["torch"])
    if torch.cuda.is_available() and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])


def _fetch(address: str, name: str, manifest: Manifest, folder: Path) -> None:
    """Copy a file of the checkpoint and verify it against its manifest.

    Raises CheckpointError if they differ, DiskFullError if the folder has no room for it.
    """
    check_room_for(storage.join(address, name), manifest.record(name).size, folder)
    storage.download(storage.join(address, name), folder / name)
    found = hash_file(str(folder / name))
    manifest.check_content(name, found.size, found.sha256)

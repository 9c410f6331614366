"""Check, before the first step, that the workers' disks have room for checkpoints.

A rank writes its part of a checkpoint to its scratch folder, then copies it to the run's storage.
Ranks on one node share a disk, and what GPTJ_SCRATCH_GB allows (gptj.storage.scratch).
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from gptj import storage
from gptj.storage.scratch import LIMIT_VARIABLE, room_left
from gptj.training.failures import DISK_REMEDY, LIMIT_REMEDY, DiskFullError, gigabytes
from gptj.training.optimizer import STORED_MOMENT_BYTES
from gptj.training.settings import Settings

MASTER_BYTES = 4  # of a weight in fp32
_ALLOWED = -1  # in place of a disk: the node's GPTJ_SCRATCH_GB
SPARE_BYTES = 32 * 2**20  # for names, random states, TensorBoard's files, the curve


@dataclass(frozen=True)
class Need:
    """What one rank writes to one disk for a checkpoint."""

    node: str
    boot: str  # the kernel's boot id: several machines may share a hostname
    disk: int  # st_dev, or _ALLOWED
    folder: str
    bytes: int
    free: int


def checkpoint_bytes(settings: Settings, model: nn.Module, rank: int, world_size: int) -> int:
    """The size of a rank's part of a checkpoint, to within `SPARE_BYTES`.

    Frozen weights are not saved, so only trained ones count.
    """
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    size = trained * (MASTER_BYTES + STORED_MOMENT_BYTES[settings.optimizer.moments])
    if settings.deepspeed.stage == 0:  # rank 0 writes all
        return size if rank == 0 else 0
    return -(-size // world_size)


def check_room(scratch: Path, results: str, needed: int) -> None:
    """Check that the disks of all ranks have room for a checkpoint; all ranks call it together.

    Args:
        scratch: this rank's folder for temporary files.
        results: where the run is stored; if local, it also needs room for the parts.
        needed: bytes of this rank's part.

    Raises:
        DiskFullError: on all ranks, with the node, the folder, and the bytes needed and free.
    """
    mine = [_need(scratch, needed + SPARE_BYTES)]
    if (allowed := room_left()) is not None:
        mine.append(replace(mine[0], disk=_ALLOWED, free=allowed))
    if not storage.is_s3(results):
        mine.append(_need(Path(results), needed + SPARE_BYTES))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    disks: dict[tuple[str, str, int], list[Need]] = {}
    for need in [need for each in found for need in each]:
        disks.setdefault((need.node, need.boot, need.disk), []).append(need)
    for (node, _, disk), needs in disks.items():
        total, free = sum(each.bytes for each in needs), min(each.free for each in needs)
        if total > free:
            folders = " and ".join(dict.fromkeys(each.folder for each in needs))
            limit = disk == _ALLOWED
            place = f"{LIMIT_VARIABLE} for" if limit else "the disk of"
            raise DiskFullError(
                f"{place} {folders} on node {node} has no room for a checkpoint: "
                f"{gigabytes(total)} are needed there, for the parts of {len(found)} workers, and "
                f"{gigabytes(free)} are free; {LIMIT_REMEDY if limit else DISK_REMEDY}"
            )


def check_room_for(address: str, size: int, folder: Path, remedy: str = DISK_REMEDY) -> None:
    """DiskFullError if a local folder lacks the room for a file of so many bytes."""
    allowed = room_left()
    if allowed is not None and allowed < size and folder.is_relative_to(tempfile.gettempdir()):
        raise DiskFullError(
            f"{LIMIT_VARIABLE} for {folder} has no room for {address}: {gigabytes(size)} are "
            f"needed there, and {gigabytes(allowed)} are free; {LIMIT_REMEDY}"
        )
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < size:
        raise DiskFullError(
            f"the disk of {folder} has no room for {address}: {gigabytes(size)} are needed there, "
            f"and {gigabytes(usage.free)} are free; {remedy}"
        )


def _need(folder: Path, size: int) -> Need:
    """For a folder that may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    # File systems of unknown size, such as some mounted buckets, report 0.
    free = usage.free if usage.total else sys.maxsize
    return Need(socket.gethostname(), _boot(), os.stat(folder).st_dev, str(folder), size, free)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:  # not Linux
        return ""

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
from gptj.storage.scratch import LIMIT_VARIABLE, room_left, room_limit
from gptj.training.failures import DISK_REMEDY, LIMIT_REMEDY, DiskFullError, gigabytes
from gptj.training.optimizer import STORED_MOMENT_BYTES
from gptj.training.settings import Settings

MASTER_BYTES = 4  # of a weight in fp32
SPARE_BYTES = 32 * 2**20  # for names, random states, TensorBoard's files, the curve


@dataclass(frozen=True)
class Need:
    """What one rank writes to one disk, or of what GPTJ_SCRATCH_GB allows, for a checkpoint."""

    node: str
    boot: str  # the kernel's boot id: several machines may share a hostname
    disk: int  # st_dev
    folder: str
    bytes: int
    free: int
    limit: int | None = None  # bytes of GPTJ_SCRATCH_GB, if this is about them


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
    if (limit := room_limit()) is not None:
        mine.append(replace(mine[0], free=room_left(limit), limit=limit))
    if not storage.is_s3(results):
        mine.append(_need(Path(results), needed + SPARE_BYTES))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    disks: dict[tuple[str, str, int, bool], list[Need]] = {}
    for need in [need for each in found for need in each]:
        disk = (need.node, need.boot, need.disk, need.limit is not None)
        disks.setdefault(disk, []).append(need)
    for (node, *_), needs in disks.items():
        total, free = sum(each.bytes for each in needs), min(each.free for each in needs)
        if total > free:
            folders = " and ".join(dict.fromkeys(each.folder for each in needs))
            if (limit := needs[0].limit) is not None:
                raise DiskFullError(
                    f"{_leaves(limit, free)} in {folders} on node {node} for a checkpoint, of "
                    f"which its {len(needs)} workers write {gigabytes(total)}; {LIMIT_REMEDY}"
                )
            raise DiskFullError(
                f"the disk of {folders} on node {node} has no room for a checkpoint: "
                f"{gigabytes(total)} are needed there, for the parts of {len(found)} workers, and "
                f"{gigabytes(free)} are free; {DISK_REMEDY}"
            )


def check_room_for(
    address: str,
    size: int,
    folder: Path,
    remedy: str = DISK_REMEDY,
    limit_remedy: str = LIMIT_REMEDY,
) -> None:
    """DiskFullError if a local folder lacks the room for a file of so many bytes.

    What other processes are about to write there is not known.

    Args:
        remedy: for a full disk.
        limit_remedy: if GPTJ_SCRATCH_GB leaves too little.
    """
    limit = room_limit()
    if limit is not None and folder.is_relative_to(tempfile.gettempdir()):
        if (free := room_left(limit)) < size:
            raise DiskFullError(
                f"{_leaves(limit, free)} in {folder} for {address}, which needs "
                f"{gigabytes(size)}; {limit_remedy}"
            )
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < size:
        raise DiskFullError(
            f"the disk of {folder} has no room for {address}: {gigabytes(size)} are needed there, "
            f"and {gigabytes(usage.free)} are free; {remedy}"
        )


def _leaves(limit: int, free: int) -> str:
    return f"{LIMIT_VARIABLE}={limit / 1e9:g} leaves {gigabytes(free)}"


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

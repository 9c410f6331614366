"""Compile what training uses of DeepSpeed, in one process per node, robust against killed builds.

PyTorch marks a build by a file, `lock`, and waits forever for one left by a killed process. We
guard it with a kernel lock, which is released when its holder dies. Operators that training does
not use are not compiled, nor is DeepSpeed's optimizer Muon.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils import cpp_extension

from gptj.environment.extras import Extra, require
from gptj.storage.file_lock import FileLock

logger = logging.getLogger(__name__)
builders = Extra("deepspeed.ops.op_builder.builder", "training", "deepspeed")

POLL_SECONDS = 0.1


@contextmanager
def guarded_builds() -> Iterator[None]:
    """Guard all of DeepSpeed's builds within the block by our lock, and skip one.

    On CPUs, DeepSpeed's communication first compiles a shared-memory all-reduce, which takes a
    minute and is only used by `inference_all_reduce`.
    """
    jit_load = builders.OpBuilder.jit_load
    communication = require("deepspeed.comm.torch", "training", "deepspeed")
    _import_muon()

    def guarded(self: Any, verbose: bool = True) -> Any:
        with building(self.name):
            return jit_load(self, verbose)

    with (
        mock.patch.object(builders.OpBuilder, "jit_load", guarded),
        mock.patch.object(communication, "build_shm_op", return_value=None),
    ):
        yield


def _import_muon() -> None:
    """Import DeepSpeed's Muon without PyTorch's compiler, whose own import takes seconds.

    DeepSpeed asks of each optimizer whether it is Muon, which none of ours is.
    """

    def uncompiled(model: Any = None, **options: Any) -> Any:
        return uncompiled if model is None else model

    with mock.patch.object(torch, "compile", uncompiled):
        require("deepspeed.runtime.zero.muon.muon_optimizer", "training", "deepspeed")


@contextmanager
def building(name: str) -> Iterator[None]:
    """Hold the lock for building or loading an operator; waits for other processes."""
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    with FileLock(folder / "gptj.lock") as lock:
        if not lock.try_take():
            logger.info("waiting for another process that compiles DeepSpeed's %s", name)
            lock.take()
        _clear(folder, name)
        started = None if any(folder.glob("*.so")) else time.monotonic()
        if started is not None:
            logger.info("compiling DeepSpeed's %s in %s, about a minute", name, folder)
        yield
        if started is not None:
            logger.info("compiled %s in %.0f s", name, time.monotonic() - started)


def _clear(folder: Path, name: str) -> None:
    """Delete PyTorch's lock once no process on this node holds it.

    Holders have it open, or are compilers that outlived their parent. Our own processes, including
    those on other nodes with the same home folder, wait for our lock instead.
    """
    lock = folder / "lock"
    waiting = False
    while lock.exists() and (processes := _users(folder)):
        if not waiting:
            waiting = True
            logger.info("waiting for process %d, which is compiling %s", processes[0], name)
        time.sleep(POLL_SECONDS)
    if lock.exists():
        logger.warning("deleting %s, left by a build that was killed", lock)
        lock.unlink(missing_ok=True)


def _users(folder: Path) -> list[int]:
    """This user's processes that hold the folder's lock or compile in it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            compiling = (
                os.readlink(process / "cwd") == str(folder)
                and (process / "comm").read_text().strip() == "ninja"
            )
            held = any(
                os.readlink(each) == str(folder / "lock") for each in (process / "fd").iterdir()
            )
        except OSError:  # it has ended, or belongs to another user
            continue
        if compiling or held:
            found.append(int(process.name))
    return found

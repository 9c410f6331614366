"""A killed build of an operator delays the next one, but does not hang it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.distributed import HashStore
from torch.utils import cpp_extension

from gptj.environment.extras import Extra
from gptj.training import operators
from gptj.training.operators import builders, guarded_builds

pytestmark = pytest.mark.slow  # DeepSpeed is imported, and operators are built

FORK = multiprocessing.get_context("fork")
# As training imports it: without what nothing uses.
OpBuilder = builders.OpBuilder
communication = Extra("deepspeed.comm.torch", "training", "deepspeed")


class Small(OpBuilder):  # type: ignore[misc, valid-type]
    """One file; what compiles it, is replaced below."""

    def __init__(self, source: Path) -> None:
        super().__init__("small")
        self.source = source

    def sources(self) -> list[str]:
        return [str(self.source)]

    def absolute_name(self) -> str:
        return "small"

    def is_compatible(self, verbose: bool = False) -> bool:
        return True


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Small]:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "verify_ninja_availability", lambda: None)
    monkeypatch.setattr(
        cpp_extension, "_import_module_from_library", lambda name, *_: ModuleType(name)
    )
    (tmp_path / "small.cpp").write_text("int answer() { return 42; }")
    yield Small(tmp_path / "small.cpp")
    OpBuilder._loaded_ops.pop("small", None)


def compile_as(compiler: Any) -> None:
    cpp_extension._write_ninja_file_and_build_library = compiler


def build_slowly(small: Small, begun: Any) -> None:
    def compiler(**arguments: Any) -> None:
        begun.set()
        time.sleep(600)

    compile_as(compiler)
    with guarded_builds():
        small.load()


def kill_a_build(small: Small) -> None:
    begun = FORK.Event()
    process = FORK.Process(target=build_slowly, args=(small, begun))
    process.start()
    assert begun.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What this process has compiled, at no cost."""
    built: list[str] = []

    def compiler(**arguments: Any) -> None:
        built.append(arguments["name"])

    monkeypatch.setattr(cpp_extension, "_write_ninja_file_and_build_library", compiler)
    return built


def test_communication_on_cpus_compiles_nothing(
    small: Small, compiled: list[str], tmp_path: Path
) -> None:
    """DeepSpeed's all-reduce in shared memory takes a minute, and inference alone calls it."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        with guarded_builds():
            communication.TorchBackend("gloo", timedelta(seconds=60), None)
    finally:
        torch.distributed.destroy_process_group()
    assert compiled == []
    assert list(tmp_path.glob("*/gptj.lock")) == []


def test_a_killed_builds_lock_is_deleted(
    small: Small, compiled: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kill_a_build(small)
    assert (tmp_path / "small" / "lock").exists()
    caplog.set_level(logging.INFO)
    with guarded_builds():
        assert small.load().__name__.startswith("small")
    assert len(compiled) == 1
    assert not (tmp_path / "small" / "lock").exists()
    assert "small/lock, left by a build that was killed" in caplog.text
    assert "compiling DeepSpeed's small" in caplog.text
    assert "compiled small in" in caplog.text
    assert OpBuilder.jit_load is operators.builders.OpBuilder.jit_load


def test_a_live_build_is_waited_for(
    small: Small, compiled: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its lock, which a program that knows nothing of ours has; or what it left compiling."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "lock").touch()
    (tmp_path / "ninja").symlink_to("/bin/sleep")
    caplog.set_level(logging.INFO)
    with (
        subprocess.Popen([tmp_path / "ninja", "1"], cwd=folder) as compiler,
        guarded_builds(),
    ):
        small.load()
        assert compiler.poll() is not None
    assert f"waiting for process {compiler.pid}, which is compiling small" in caplog.text
    OpBuilder._loaded_ops.pop("small")
    caplog.clear()
    with (folder / "lock").open("w"):
        holder = f"waiting for process {os.getpid()}"
        with guarded_builds(), pytest.MonkeyPatch.context() as patch:
            users = operators._users(folder)
            assert users == [os.getpid()]
            patch.setattr(
                operators, "_users", lambda _, found=[users]: found.pop() if found else []
            )
            small.load()
    assert holder in caplog.text


def test_the_compiler_is_not_applied_to_what_training_does_not_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To DeepSpeed's Muon, as it is imported: that would import all of the compiler."""
    muon = [name for name in sys.modules if name.startswith("deepspeed.runtime.zero.muon.")]
    for name in muon:
        monkeypatch.delitem(sys.modules, name)
    applied: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda *given, **_: applied.append(given))
    with guarded_builds():
        pass
    assert "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules
    assert applied == []

"""Temporary folders, some of them left by killed processes."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gptj.storage import scratch
from gptj.storage.scratch import scratch_folder, shared_scratch_folder

# By its path: importing the package would take each process a second.
HOLD = f"""
import sys, time, types
sys.modules["gptj"] = package = types.ModuleType("gptj")
package.__path__ = [{str(Path(scratch.__file__).parent)!r}]
from gptj.storage.scratch import scratch_folder, shared_scratch_folder
with scratch_folder(sys.argv[1]) as folder:
    (folder / "half-written").write_bytes(bytes(1000))
    print(folder, flush=True)
    time.sleep(600)
"""


def hold(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(parent)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as output:
        return process, Path(output.readline().strip())


def test_a_scratch_folder_is_empty_and_removed_afterwards(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the block's own"), scratch_folder(tmp_path) as folder:
        assert list(folder.iterdir()) == []
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("something")
        with scratch_folder(tmp_path) as other:
            assert other != folder
            assert (folder / "inner" / "file").exists()
        raise RuntimeError("the block's own")
    assert not folder.exists()
    assert not folder.parent.exists()


def test_only_dead_processes_folders_are_removed(tmp_path: Path) -> None:
    running, kept = hold(tmp_path)
    killed, left = hold(tmp_path)
    try:
        killed.kill()
        killed.wait(timeout=10)
        assert (left / "half-written").exists()
        with scratch_folder(tmp_path) as folder:
            assert not left.exists()
            assert not left.parent.exists()
            assert (kept / "half-written").exists()
            assert folder.exists()
    finally:
        running.kill()
        running.wait(timeout=10)


def test_concurrent_users_do_not_interfere(tmp_path: Path) -> None:
    def one(number: int) -> bool:
        with scratch_folder(tmp_path) as folder:
            (folder / str(number)).touch()
            return [file.name for file in folder.iterdir()] == [str(number)]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(300)))
    (root,) = tmp_path.iterdir()
    assert [file.name for file in root.iterdir()] == ["lock"]


def test_another_users_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gptj-scratch-12345").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="belongs to user"), scratch_folder(tmp_path):
        pass


def test_a_shared_folder_ends_with_the_last_that_holds_it(tmp_path: Path) -> None:
    with shared_scratch_folder("data-1", tmp_path) as first:
        (first / "file").write_text("x")
        with shared_scratch_folder("data-1", tmp_path) as second:
            assert second == first
            assert (second / "file").read_text() == "x"
            with shared_scratch_folder("data-2", tmp_path) as other:
                assert list(other.iterdir()) == []
        assert (first / "file").exists()
        with scratch_folder(tmp_path):  # whoever makes another deletes only what nobody holds
            assert (first / "file").exists()
    assert not first.exists()
    with shared_scratch_folder("data-1", tmp_path) as again:
        assert list(again.iterdir()) == []

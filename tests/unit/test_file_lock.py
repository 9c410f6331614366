"""Slots that a node's processes share, held by real processes, some of which are killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from deployments.loading import Arguments
from gptj.storage import file_lock
from gptj.storage.file_lock import FileLock, turn

# By its path: importing the package would take each process a second.
IMPORT = f"""
import sys, time, pathlib
sys.path.insert(0, {str(Path(file_lock.__file__).parent)!r})
from file_lock import turn
folder, at_once = pathlib.Path(sys.argv[1]), int(sys.argv[2])
"""
HOLD = (
    IMPORT
    + """
with turn(folder, at_once):
    print("in", flush=True)
    time.sleep(600)
"""
)
COUNT = (
    IMPORT
    + """
for number in range(3):
    with turn(folder, at_once):
        mine = folder / f"present-{sys.argv[3]}-{number}"
        mine.touch()
        print(len(list(folder.glob("present-*"))), flush=True)
        time.sleep(0.05)
        mine.unlink()
"""
)


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_at_most_the_given_number_of_processes_hold_a_slot(tmp_path: Path) -> None:
    processes = [start(COUNT, tmp_path, 2, name) for name in range(5)]
    counts = [int(n) for each in processes for n in each.communicate(timeout=60)[0].split()]
    assert len(counts) == 15
    assert max(counts) <= 2


def test_a_killed_process_frees_its_slot_at_once(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path, 1)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "in\n"
    with FileLock(tmp_path / "place-0") as place:
        assert not place.try_take(), "it is held"
    waiting = start(COUNT, tmp_path, 1, "waiting")
    holder.kill()
    holder.communicate(timeout=60)
    assert waiting.communicate(timeout=60)[0] == "1\n1\n1\n"
    with turn(tmp_path, 1):
        pass


def test_a_lock_is_shared_or_exclusive(tmp_path: Path) -> None:
    with FileLock(tmp_path / "a") as one, FileLock(tmp_path / "a") as other:
        one.share()
        other.share()
        assert not one.try_take(), "the other shares it"
        assert other.try_take(), "one that failed to take it holds nothing"
        assert not one.try_take()
        other.close()
        assert one.try_take()


def test_a_slot_is_freed_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), turn(tmp_path, 1):
        raise KeyError("loading failed")
    with FileLock(tmp_path / "place-0") as place:
        assert place.try_take()


def test_zero_slots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at_once must be 1 or more, got 0"), turn(tmp_path, 0):
        pass
    with pytest.raises(ValidationError, match="loads_at_once"):
        Arguments(checkpoint="x", loads_at_once=0)

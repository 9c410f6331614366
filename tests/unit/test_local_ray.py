"""LocalRay's start of a node, without Ray; tests/cluster/ uses the real one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from gptj_local.ray import node_program

# The first time it ends as `ray start` does where the machine is busy.
BUSY = """
import pathlib, sys, time
attempts = pathlib.Path("attempts")
attempts.write_text((attempts.read_text() if attempts.exists() else "") + "x")
if attempts.read_text() == "x":
    sys.exit("Exception: The current node timed out during startup. This could happen because ...")
pathlib.Path("up").touch()
time.sleep(60)
"""
# And the second time for another reason.
TAKEN = BUSY.replace('pathlib.Path("up").touch()', 'sys.exit("port 6379 is in use")')
WRONG = 'import sys; sys.exit("Unable to connect to GCS")'


def test_a_node_that_came_up_too_late_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with node_program(
        [sys.executable, "-c", BUSY],
        environment=os.environ,
        log=tmp_path / "log",
        is_up=(tmp_path / "up").exists,
    ) as process:
        assert process.poll() is None
    assert process.poll() is not None
    assert (tmp_path / "attempts").read_text() == "xx"


def test_the_last_attempt_says_why_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(RuntimeError, match="port 6379 is in use") as error,
        node_program(
            [sys.executable, "-c", TAKEN],
            environment=os.environ,
            log=tmp_path / "log",
            is_up=lambda: False,
        ),
    ):
        pass
    assert "timed out" not in str(error.value)
    assert (tmp_path / "attempts").read_text() == "xx"


@pytest.mark.parametrize(
    ("program", "start_seconds", "reason"),
    [
        (WRONG, 60, "exit status 1.*Unable to connect to GCS"),
        ("import time; time.sleep(60)", 0.5, "did not come up"),
    ],
    ids=["ended", "too late"],
)
def test_a_node_that_does_not_come_up_is_an_error_with_its_log(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    start_seconds: float,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(RuntimeError, match=f"(?s){reason}"),
        node_program(
            [sys.executable, "-c", program],
            environment=os.environ,
            log=tmp_path / "log",
            is_up=lambda: False,
            start_seconds=start_seconds,
        ),
    ):
        pass

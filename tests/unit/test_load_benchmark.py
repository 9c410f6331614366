"""`python -m gptj_bench load` with a tiny model: readers agree, and summaries are correct."""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from gptj_bench import load_weights
from gptj_bench.__main__ import main

READERS = ("plain", "gptj", "transformers")


def measured_here(
    reader: str, address: str, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A measurement without a process of its own, whose start takes most of the time."""
    with (
        mock.patch.dict(os.environ, environment or {}),
        mock.patch.object(sys, "argv", ["load_weights", reader, address]),
        redirect_stdout(io.StringIO()) as printed,
    ):
        load_weights.main()
    gc.collect()  # a mapped file stays in the page cache
    found: dict[str, Any] = json.loads(printed.getvalue())
    return found


def write_back(folder: Path) -> None:
    """Pages that are not on the disk yet cannot leave the cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def printed_by(arguments: list[str], processes: bool, folder: Path) -> list[str]:
    if processes:
        command = [sys.executable, "platform/gptj_bench", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(load_weights, "measure", measured_here),
        mock.patch.object(os, "sync", partial(write_back, folder)),  # not all that others write
        redirect_stdout(io.StringIO()) as printed,
    ):
        main(arguments)
    return printed.getvalue().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["here", "processes"]
)
def test_readers_are_measured_from_disk_and_s3_and_nothing_is_left(
    processes: bool, tmp_path: Path
) -> None:
    arguments = ["load", "--folder", str(tmp_path), "--size", "tiny", "--readers", *READERS]
    lines = printed_by(arguments, processes, tmp_path)
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    machine, created, *measured = rows
    assert machine["settings"]["size"] == "tiny"
    assert "processor" in machine
    runs = [row for row in measured if "bytes" in row]
    assert {row["bytes"] for row in runs} == {created["bytes"]}
    kinds = {(row["from"], row["cache"], row["reader"]) for row in runs}
    assert kinds == {
        *(("disk", cache, reader) for cache in ("cold", "warm") for reader in READERS),
        ("s3", "cold", "plain"),
        ("s3", "cold", "gptj"),
        *(("s3, cached", cache, "gptj") for cache in ("empty", "cold", "warm")),
    }
    # The same weights and prompt: transformers and we say the same, from disk and from S3.
    assert len({row["token"] for row in runs if "token" in row}) == 1
    for row in runs:
        if row["from"] == "disk":
            share = row["cached_share"]
            if row["cache"] == "warm":
                assert share > 0.9
            elif processes:  # in one process, what a reader still maps stays cached
                assert share < 0.1
    assert list(tmp_path.iterdir()) == []
    assert lines[-1].startswith("| s3, cached | warm |")


def test_ratios_are_medians_relative_to_the_plain_read() -> None:
    state = {"from": "disk", "cache": "cold"}
    rows = [{**state, "reader": "plain", "seconds": s} for s in (1.0, 2.0, 9.0)]
    rows += [{**state, "reader": "gptj", "seconds": 3.0, "first_token_seconds": 2.0}] * 3
    plain, ours = load_weights.summarized(rows)
    assert plain["seconds"] == 2.0
    assert "times_plain" not in plain
    assert ours["times_plain"] == 1.5
    assert ours["with_token_times_plain"] == 2.5


def test_the_cache_is_compared_with_s3_until_the_first_token() -> None:
    ours = {"reader": "gptj", "first_token_seconds": 1.0}
    rows = [
        {"from": "s3", "cache": "cold", "seconds": 7.0, **ours},
        {"from": "s3, cached", "cache": "warm", "seconds": 1.0, **ours},
    ]
    direct, cached = load_weights.summarized(rows)
    assert cached["with_token_times_s3"] == 0.25
    assert "with_token_times_s3" not in direct

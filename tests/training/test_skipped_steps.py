"""Steps without an update: loss spikes and fp16's overflows, on real ranks (gloo) and DeepSpeed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import (
    MODEL,
    NoPicture,
    ended,
    logged,
    losses,
    run_ranks,
    settings_of,
    write_text,
)

from gptj import storage
from gptj.environment.extras import Extra
from gptj.training import loop, progress
from gptj.training.failures import UnrecoverableError
from gptj.training.loop import Worker, train
from gptj.training.settings import Settings, SettingsError, read_settings
from gptj.training.spikes import SpikeFilter, UpdateGate
from gptj.training.state import latest_checkpoint, upload_state

accelerator = Extra("deepspeed.accelerator", "training", "deepspeed")

STEPS = 6
SPIKE = 4  # the step whose gradients are a hundred times the usual
SKIPPING: dict[str, Any] = {
    "steps": STEPS,
    "checkpoint_every": 1,
    "keep_checkpoints": STEPS,
    "optimizer": {"skip_spikes": 5, "spike_window": 20, "schedule": "constant"},
    "model": {"config": {**MODEL, "resid_pdrop": 0.1}},
}
HALF: dict[str, Any] = {
    "steps": 4,
    "checkpoint_every": 1,
    "deepspeed": {"stage": 2, "precision": "fp16"},
}
# Runs by name, and what the loss is multiplied with at which steps.
RUNS: dict[str, tuple[dict[str, Any], dict[int, float]]] = {
    # Stage 3 first: it needs the ranks before DeepSpeed has been initialised by another run.
    **{
        f"spike-{stage}": ({**SKIPPING, "deepspeed": {"stage": stage}}, {SPIKE: 100.0})
        for stage in (3, 0, 2)
    },
    "spike-bf16": (
        {**SKIPPING, "deepspeed": {"stage": 0, "precision": "bf16"}},
        {SPIKE: 100.0},
    ),
    "no-room": ({}, {}),  # its scratch folder is on a small disk
    "overflow": (HALF, {2: 1e9}),
    "overflows": (
        {**HALF, "deepspeed": {"stage": 2, "precision": "fp16", "max_overflows": 2}},
        {3: 1e9, 4: 1e9},
    ),
}

DISKS = {"no-room": "48m"}


def rank_main(rank: int, world_size: int, port: int, runs: list[Settings]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world_size))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    progress.draw_curve = lambda history, run: NoPicture()
    # Slow on a CPU, and the same numbers.
    accelerator.get_accelerator().is_fp16_supported = lambda: True
    loss_of = loop._Run._loss

    def multiplied(self: Any, model: Any, data: Any, batch: Any) -> torch.Tensor:
        factors = RUNS[self.settings.run.removeprefix("again-")][1]
        training = torch.is_grad_enabled()
        factor = factors.get(self.progress.step + 1, 1.0) if training else 1.0
        return loss_of(self, model, data, batch) * factor

    loop._Run._loss = multiplied  # type: ignore[method-assign]
    usual_folder = tempfile.gettempdir()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    for settings in runs:
        disk = Path(settings.storage, f"disk-{settings.run}")
        tempfile.tempdir = str(disk if disk.exists() else usual_folder)

        def report(
            metrics: dict[str, float],
            folder: Path,
            name: str,
            fence: Callable[[], None],
            settings: Settings = settings,
        ) -> None:
            upload_state(folder, storage.join(settings.folder, name), rank, world_size, fence)

        try:
            train(settings, Worker(rank, world_size, torch.device("cpu"), report))
        except UnrecoverableError as error:  # of all ranks together
            ended(settings, rank).write_text(str(error))
    torch.distributed.destroy_process_group()


def checkpoint(settings: Settings, step: int) -> Path:
    return Path(settings.folder, f"checkpoint-{step:08}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Settings]]:
    """All runs; and those with a spike once more, from the checkpoint before it."""
    folder = tmp_path_factory.mktemp("skipped")
    write_text(folder)
    disks = [folder / f"disk-{run}" for run in DISKS if mounted(folder / f"disk-{run}", DISKS[run])]
    try:
        yield all_runs(folder)
    finally:
        for disk in disks:
            subprocess.run(["umount", str(disk)], check=True)


def mounted(folder: Path, size: str) -> bool:
    """A small disk, if this user may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True).returncode == 0
    if not done:
        folder.rmdir()
    return done


def all_runs(folder: Path) -> dict[str, Settings]:
    found = {
        name: settings_of(folder, name, workers={"count": 2}, **fields)
        for name, (fields, _) in RUNS.items()
    }
    run_ranks(2, list(found.values()), rank_main)
    again = {}
    for name in ("spike-3", "spike-2", "spike-0"):
        values = {**found[name].model_dump(exclude_unset=True), "run": f"again-{name}"}
        again[f"again-{name}"] = Settings(**values)
        target = checkpoint(again[f"again-{name}"], SPIKE - 1)
        shutil.copytree(checkpoint(found[name], SPIKE - 1), target)
    run_ranks(2, list(again.values()), rank_main)
    return found | again


def state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, masters and moments of all ranks, and Adam's updates so far."""
    counters = json.loads((folder / "progress.json").read_text())["counters"]
    found = {"updates": torch.tensor(counters["updates"])}
    for file in sorted(folder.glob("shard-*.safetensors")):
        found |= {f"{file.name}/{name}": tensor for name, tensor in load_file(file).items()}
    assert {name.split("/")[1] for name in found if "/" in name} == {
        "master",
        "exp_avg",
        "exp_avg_sq",
    }
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("spike")])
def test_a_spike_changes_no_weight_and_no_moment(name: str, runs: dict[str, Settings]) -> None:
    settings = runs[name]
    assert logged(settings, "skipped_steps") == [0.0] * (SPIKE - 1) + [1.0] * (STEPS - SPIKE + 1)
    before, after = (state(checkpoint(settings, step)) for step in (SPIKE - 1, SPIKE))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    later = state(checkpoint(settings, SPIKE + 1))
    assert any(not torch.equal(tensor, later[key]) for key, tensor in after.items())
    norms = logged(settings, "gradient_norm")
    assert norms[SPIKE - 1] > 20 * max(norms[: SPIKE - 1] + norms[SPIKE:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spike-3", "spike-2", "spike-0"])
def test_a_resumed_run_skips_the_same_steps(name: str, runs: dict[str, Settings]) -> None:
    """Bit for bit: the median's norms are part of the checkpoint."""
    whole, again = runs[name], runs[f"again-{name}"]
    assert losses(again) == losses(whole)
    assert logged(again, "skipped_steps") == logged(whole, "skipped_steps")
    one, other = (state(checkpoint(each, STEPS)) for each in (whole, again))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    kept = [
        json.loads((checkpoint(r, STEPS) / "progress.json").read_text()) for r in (whole, again)
    ]
    assert kept[0]["norms"] == kept[1]["norms"] == logged(whole, "gradient_norm")
    assert kept[0]["spikes"] == kept[1]["spikes"] == 1


@pytest.mark.slow
def test_an_fp16_overflow_is_counted_and_the_run_continues(runs: dict[str, Settings]) -> None:
    settings = runs["overflow"]
    counts = logged(settings, "skipped_steps")
    assert counts[1] == counts[0] + 1 == counts[3]
    fields = json.loads((checkpoint(settings, 4) / "progress.json").read_text())
    assert fields["overflows"] == counts[3]
    assert fields["overflows_in_a_row"] == 0
    assert Path(settings.model_folder, "manifest.json").exists()


@pytest.mark.slow
def test_too_many_overflows_in_a_row_end_the_run_and_name_the_checkpoint(
    runs: dict[str, Settings],
) -> None:
    settings = runs["overflows"]
    for rank in (0, 1):
        message = ended(settings, rank).read_text()
        assert re.search(
            r"gradients have overflowed in fp16 for deepspeed\.max_overflows=2 steps in a row, at "
            r"step 4\..*The last good checkpoint is .*checkpoint-00000003$",
            message,
        ), message
    assert latest_checkpoint(settings.folder) == str(checkpoint(settings, 3))
    assert not Path(settings.model_folder).exists()


@pytest.mark.slow
def test_a_small_disk_is_named_before_the_first_step(runs: dict[str, Settings]) -> None:
    settings = runs["no-room"]
    if not Path(settings.storage, "disk-no-room").exists():
        pytest.skip("this user may not mount a small disk")
    for rank in (0, 1):
        message = ended(settings, rank).read_text()
        assert re.search(
            r"the disk of \S*/disk-no-room/\S* and \S*/disk-no-room/\S* on node \S+ has no room "
            r"for a checkpoint: 0\.0\d+ GB are needed there, for the parts of 2 workers, and "
            r"0\.0\d+ GB are free; remedy: free space there, or set TMPDIR",
            message,
        ), message
    assert not Path(settings.folder, "history.jsonl").exists()


def test_a_spike_is_detected_by_the_median_of_the_last_norms() -> None:
    norms = [1.0, 2.0]
    spikes = SpikeFilter(norms, factor=3, window=30)
    assert not spikes.is_spike(100)  # there are fewer than three norms
    spikes.record(3.0)
    assert spikes.median == 2
    assert spikes.is_spike(6.1)
    assert not spikes.is_spike(6.0)
    spikes.record(float("inf"))
    spikes.record(float("nan"))
    assert norms == [1.0, 2.0, 3.0]


def test_a_lasting_change_of_level_is_a_spike_only_for_a_while() -> None:
    norms: list[float] = []
    spikes = SpikeFilter(norms, factor=3, window=10)
    skipped = 0
    for norm in [1.0] * 10 + [10.0] * 20:
        skipped += spikes.is_spike(norm)
        spikes.record(norm)
    assert skipped == 5
    assert norms == [10.0] * 10


def test_the_scheduler_allows_skipped_steps() -> None:
    """Or else it warns that the step was replaced."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    gate = UpdateGate(SimpleNamespace(basic_optimizer=optimizer), iter([True, False]).__next__)
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            weight.grad = torch.ones(1)
            gate.begin()
            optimizer.step()
            scheduler.step()
            seen.append((gate.closed, weight.detach().item()))
    assert seen[0][1] == seen[1][1] != 0
    assert [closed for closed, _ in seen] == [False, True]


def test_skipping_settings_without_effect_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"optimizer\.spike_window has no effect"):
        read_settings(["optimizer.spike_window=50"])
    with pytest.raises(SettingsError, match=r"deepspeed\.max_overflows has no effect in fp32"):
        read_settings(["deepspeed.max_overflows=5"])
    with pytest.raises(SettingsError, match=r"optimizer\.skip_spikes: .*greater than 1"):
        read_settings(["optimizer.skip_spikes=0.5"])
    read_settings(["optimizer.skip_spikes=4", "optimizer.spike_window=50"])

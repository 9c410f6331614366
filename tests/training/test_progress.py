"""A run's files beside its checkpoints: TensorBoard's files and the loss curve."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gptj import GPTJConfig, GPTJForCausalLM, storage
from gptj.checkpoints.folder import TRAINING, ModelFolder
from gptj.checkpoints.manifest import LIMIT_BYTES, FolderWriter, Manifest, describe
from gptj.errors import CheckpointError
from gptj.interop.source import open_source
from gptj.training.progress import TENSORBOARD, ProgressLog, draw_curve, thinned
from gptj.training.settings import Settings
from gptj.training.state import (
    PROGRESS,
    Progress,
    check_resumable,
    is_complete,
    manifest_name,
    read_progress,
)
from gptj_bench.training_cluster import STEP
from gptj_cli import models


def test_the_curve_shows_the_runs_name_and_the_tasks_metric() -> None:
    history: list[dict[str, float | None]] = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "evaluation_loss": 1.2, "evaluation_accuracy": 0.75, "evaluation_f1": 0.7},
    ]
    figure = draw_curve(history, "reviews")
    losses, metric = figure.axes
    assert losses.get_title() == "reviews: accuracy 0.75 after step 2"
    assert (losses.get_ylabel(), metric.get_ylabel()) == ("loss", "accuracy")
    labels = [text.get_text() for text in losses.get_legend().get_texts()]
    assert labels == ["training loss", "evaluation loss", "accuracy"]
    assert metric.lines[0].get_ydata() == [0.75]


def test_the_curve_of_a_run_without_numbers_is_empty() -> None:
    """A perplexity that a float cannot hold is None in a history."""
    empty: list[Any] = [[], [{"step": 1, "evaluation_perplexity": None}]]
    for history in empty:
        (axes,) = draw_curve(history, "new").axes
        assert axes.get_title() == "new" and not axes.lines


def test_new_points_do_not_change_files_during_their_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on meanwhile, and S3 refuses content that is longer than was said."""
    log = ProgressLog(Progress(step=1), tmp_path / "local", 9, 1, lambda point: None)
    upload = storage.upload
    sizes: list[tuple[int, int]] = []

    def uploading(path: str | Path, address: str) -> None:
        before = Path(path).stat().st_size
        log.evaluation({"loss": 1.0})
        log._board.flush()
        sizes.append((before, Path(path).stat().st_size))
        upload(path, address)

    monkeypatch.setattr(storage, "upload", uploading)
    log.evaluation({"loss": 2.0})
    log.publish(str(tmp_path / "run"), log.snapshot())
    log.close()
    assert sizes
    assert all(before == after for before, after in sizes)
    (file,) = (tmp_path / "run" / TENSORBOARD).iterdir()
    (own,) = (tmp_path / "local" / TENSORBOARD).iterdir()
    assert own.read_bytes().startswith(file.read_bytes())
    assert own.stat().st_size > file.stat().st_size > 0


@pytest.mark.parametrize("failing", ["upload_folder", "write_bytes", "upload"])
def test_a_curve_that_cannot_be_written_costs_a_warning(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not the checkpoint that was saved just before."""

    def refuse(*_: object) -> None:
        raise storage.UnreachableError("no answer from S3")

    log = ProgressLog(Progress(step=1), tmp_path / "local", 9, 1, lambda point: None)
    log.evaluation({"loss": 2.0})
    monkeypatch.setattr(storage, failing, refuse)
    log.publish(str(tmp_path / "run"), log.snapshot())
    log.close()
    assert f"the curve in {tmp_path}/run is not up to date: no answer from S3" in caplog.text


def test_the_line_of_a_step_is_what_the_program_of_faults_waits_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    progress = Progress(step=24)
    log = ProgressLog(progress, tmp_path, 99, 1, lambda point: None)
    progress.step = 25
    log.step(1.0, 1e-3, 0.5, 100, 120, 0.1)
    log.close()
    assert [found[1] for found in map(STEP.search, caplog.messages) if found] == ["25"]


@pytest.mark.slow
def test_a_checkpoint_with_a_long_history_is_read(tmp_path: Path) -> None:
    """Beyond the limit of small files, as after 300,000 steps with log_every=1."""
    folder = tmp_path / "checkpoint-00300000"
    folder.mkdir()
    settings = Settings()
    history: list[dict[str, float | None]] = [{"step": 300_000, "loss": 1.0}]
    progress = Progress(300_000, settings=settings.model_dump(mode="json"), history=history)
    content = json.dumps(vars(progress))[:-1] + " " * LIMIT_BYTES + "}"
    (folder / PROGRESS).write_text(content)
    Manifest(str(folder), describe(str(folder), [PROGRESS]).files).write(manifest_name(0, 1))
    assert read_progress(str(folder)).history == history
    assert check_resumable(settings, str(folder)).step == 300_000
    for damaged in (content[:-1], content + " ", content.replace("300000", "300001", 1)):
        (folder / PROGRESS).write_text(damaged)
        with pytest.raises(CheckpointError, match=r"truncated|altered"):
            read_progress(str(folder))
    (folder / PROGRESS).unlink()
    with pytest.raises(CheckpointError, match=f"incomplete: {PROGRESS} is missing"):
        read_progress(str(folder))


@pytest.mark.slow
def test_a_model_with_a_long_history_is_read(tmp_path: Path) -> None:
    """As earlier versions exported it, wherever training.json is read."""
    config = GPTJConfig(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, rotary_dim=2, pad_token_id=0
    )
    training = {"settings": {"run": "long"}, "steps": 3, "history": "x" * LIMIT_BYTES}
    GPTJForCausalLM(config).save_pretrained(str(tmp_path / "model"), training=training)
    with ModelFolder.open(str(tmp_path / "model")) as folder:
        assert folder.read_object(TRAINING) == training
        assert folder.read_training_data() == {}
    assert models.describe(str(tmp_path / "model"))["run"] == "long"
    with open_source(str(tmp_path / "model")) as source:
        assert source.training == training


def test_a_model_folder_has_a_long_history_in_fewer_points() -> None:
    """Of a run with log_every=1 and evaluate_every=2."""
    numbers = "learning_rate gradient_norm tokens_per_second useful_tokens mfu memory_bytes".split()
    common = dict.fromkeys(numbers, 1.2345678901234568e-05)
    history: list[dict[str, float | None]] = []
    for step in range(1, 60_001):
        history.append({"step": step, "loss": 1 / step, **common})
        if step % 2 == 0:
            history.append({"step": step, "evaluation_loss": 2.0})
    kept = thinned(history)
    indented = len(json.dumps(kept[-1000:], indent=2)) / 1000
    assert indented * len(kept) < LIMIT_BYTES / 2
    for key in ("loss", "evaluation_loss"):
        steps = [point["step"] for point in kept if key in point]
        assert 10_000 < len(steps) <= 20_000
        assert steps[-1] == 60_000
        assert len({later - step for step, later in pairwise(steps)}) == 1
    assert thinned(history[:20_000]) == history[:20_000]


@pytest.mark.slow
def test_a_run_with_a_long_history_in_its_model_is_complete(tmp_path: Path) -> None:
    """As earlier versions exported it: all points, beyond the limit of small files."""
    settings = Settings(storage=str(tmp_path))
    with FolderWriter(settings.model_folder) as writer:
        training = {"settings": settings.model_dump(mode="json"), "history": "x" * LIMIT_BYTES}
        writer.write(TRAINING, json.dumps(training).encode())
    assert is_complete(settings)

"""A run's files beside its checkpoints: TensorBoard's files and the loss curve."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from gptj import storage
from gptj.training.progress import TENSORBOARD, ProgressLog, draw_curve
from gptj.training.state import Progress
from gptj_bench.training_cluster import STEP


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

"""A run's progress: log lines, points for TensorBoard, a plot of the loss curve."""

from __future__ import annotations

import logging
import math
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gptj import storage
from gptj.environment.extras import Extra
from gptj.serialization.json_object import to_json
from gptj.storage.lease import LeaseLostError
from gptj.training.state import Progress

logger = logging.getLogger(__name__)
matplotlib = Extra("matplotlib", "plotting a training run's loss")
tensorboard = Extra("torch.utils.tensorboard", "a training run's files for TensorBoard")

HISTORY = "history.jsonl"
CURVE = "loss.png"
TENSORBOARD = "tensorboard"
SHARES = ("exact_match", "accuracy")  # from 0 to 1
MAX_POINTS = 20_000  # of each kind in a model folder, whose readers limit the size of files
METRICS = (*SHARES, "mse", "perplexity")  # the curve shows the first that a task has


class ProgressLog:
    """Rank 0's record of a run; its history is part of the checkpoint.

    Args:
        progress: the run's progress; points are appended to its history.
        folder: a local folder for TensorBoard's files.
        total: steps of the whole run.
        watch: also receives each point.
    """

    def __init__(
        self,
        progress: Progress,
        folder: Path,
        total: int,
        log_every: int,
        watch: Callable[[dict[str, float]], None],
    ) -> None:
        self.progress = progress
        self._folder = folder
        self._total = total
        self._log_every = log_every
        self._watch = watch
        self._started = time.monotonic()
        self._first_step = progress.step
        self._tokens = self._room = 0  # of the steps since the last line
        self._seconds = self._waited = self._flops = 0.0
        # purge_step hides points beyond the checkpoint, left by a run that died.
        self._board = tensorboard.SummaryWriter(
            str(folder / TENSORBOARD), purge_step=progress.step + 1
        )

    def begin(self) -> None:
        """Start the clock for estimating the time left; call just before the first step."""
        self._started = time.monotonic()

    def step(
        self,
        loss: float,
        learning_rate: float,
        norm: float,
        tokens: int,
        room: int,
        seconds: float,
        waited: float = 0.0,
        *,
        flops: float = 0.0,
        peak: float = 0.0,
        memory: int = 0,
    ) -> None:
        """Record an optimizer step; every `log_every` steps, log a line and add a point.

        Args:
            tokens: of the global batch, without padding.
            room: of the global batch, with padding.
            waited: seconds, of `seconds`, spent waiting for the batches of the slowest rank.
            flops: model FLOPs of the step.
            peak: FLOP/s of all workers' matrix products; 0: unknown.
            memory: this worker's peak so far, in bytes.
        """
        progress = self.progress
        self._tokens += tokens
        self._room += room
        self._seconds += seconds
        self._waited += waited
        self._flops += flops
        progress.unlogged.append(loss)
        if progress.step % self._log_every and progress.step != self._total:
            return
        mean = sum(progress.unlogged) / len(progress.unlogged)
        rate = self._tokens / self._seconds
        useful, waiting = self._tokens / self._room, self._waited / self._seconds
        mfu = self._flops / self._seconds / peak if peak else 0.0
        progress.unlogged.clear()
        self._tokens, self._room = 0, 0
        self._seconds = self._waited = self._flops = 0.0
        self._add(
            {
                "step": progress.step,
                "loss": mean,
                "learning_rate": learning_rate,
                "gradient_norm": norm,
                "tokens_per_second": rate,
                "useful_tokens": useful,
                "skipped_steps": progress.skipped_steps,
                "waiting_for_data": waiting,
                "mfu": mfu,
                "memory_bytes": memory,
            }
        )
        elapsed = time.monotonic() - self._started
        done = progress.step - self._first_step
        skipped = f" | {progress.skipped_steps} steps skipped" if progress.skipped_steps else ""
        logger.info(
            "step %d of %d | loss %.4f | gradient norm %.2f | learning rate %.2e | %s tokens/s, "
            "%.0f%% useful | MFU %.1f%% | %.1f GB | waiting for data %.1f%%%s | %s left",
            progress.step,
            self._total,
            mean,
            norm,
            learning_rate,
            f"{rate:,.0f}",
            100 * useful,
            100 * mfu,
            memory / 1e9,
            100 * waiting,
            skipped,
            duration(elapsed / done * (self._total - progress.step)),
        )

    def evaluation(self, metrics: dict[str, float]) -> None:
        self._add(
            {"step": self.progress.step, **{f"evaluation_{k}": v for k, v in metrics.items()}}
        )
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        logger.info("evaluation after step %d: %s", self.progress.step, shown)

    def snapshot(self) -> list[dict[str, float | None]]:
        """The history so far, for another thread to publish."""
        return list(self.progress.history)

    def publish(
        self,
        address: str,
        history: Sequence[Mapping[str, float | None]],
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        """Update the history, TensorBoard's files and the curve in the run's folder.

        Errors are only logged: the checkpoint has the history, and so has the model at the end.

        Args:
            fence: raises LeaseLostError, which is passed on: see storage.fenced.
        """
        try:
            fence()
            with storage.fenced(address, fence):
                self._publish(address, history)
        except LeaseLostError:
            raise
        except Exception as error:  # whatever storage, TensorBoard or matplotlib raise
            logger.warning("the curve in %s is not up to date: %s", address, error)

    def _publish(self, address: str, history: Sequence[Mapping[str, float | None]]) -> None:
        self._board.flush()
        with tempfile.TemporaryDirectory(dir=self._folder) as still:
            # A snapshot, since TensorBoard's file may grow during the upload.
            shutil.copytree(self._folder / TENSORBOARD, still, dirs_exist_ok=True)
            storage.upload_folder(still, storage.join(address, TENSORBOARD))
        lines = "".join(to_json(point) + "\n" for point in history)
        storage.write_bytes(storage.join(address, HISTORY), lines.encode())
        picture = self._folder / CURVE
        run = address.rstrip("/").rpartition("/")[2]
        draw_curve(history, run).savefig(picture, dpi=100)
        storage.upload(picture, storage.join(address, CURVE))

    def close(self) -> None:
        self._board.close()

    def _add(self, point: dict[str, float]) -> None:
        self.progress.history.append({**point})
        self._watch(point)
        for name, value in point.items():
            if name != "step" and math.isfinite(value):
                self._board.add_scalar(
                    name.replace("evaluation_", "evaluation/"), value, int(point["step"])
                )


def thinned(
    history: Sequence[Mapping[str, float | None]], most: int = MAX_POINTS
) -> list[Mapping[str, float | None]]:
    """At most so many points of the loss and of evaluations, evenly spaced, each with its last."""
    kept: set[int] = set()
    for key in ("loss", "evaluation_loss"):
        found = [number for number, point in enumerate(history) if key in point]
        kept |= {*found[:: -max(1, -(-len(found) // most))]}
    return [history[number] for number in sorted(kept)]


def draw_curve(history: Sequence[Mapping[str, float | None]], run: str) -> Any:
    """A matplotlib figure of training loss, evaluation loss and a metric over the steps.

    The metric, on its own axis, is the first of METRICS that the evaluations have.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = []
    for key, label, style in (("loss", "training", "-"), ("evaluation_loss", "evaluation", "o-")):
        if points := _points(history, key):
            lines += axes.plot(*zip(*points, strict=True), style, label=f"{label} loss")
    axes.set(xlabel="optimizer steps", ylabel="loss", title=run)
    axes.grid(alpha=0.3)
    if metric := next((name for name in METRICS if _points(history, f"evaluation_{name}")), None):
        beside = axes.twinx()
        points = _points(history, f"evaluation_{metric}")
        name = metric.replace("_", " ")
        lines += beside.plot(*zip(*points, strict=True), "s--", color="tab:green", label=name)
        beside.set(ylabel=name, ylim=(0, 1.02) if metric in SHARES else None)
        step, value = points[-1]
        axes.set(title=f"{run}: {name} {value:.4g} after step {step:g}")
    if lines:
        axes.legend(handles=lines)
    return figure


def _points(history: Sequence[Mapping[str, float | None]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the points with a finite value."""
    return [
        (float(point["step"] or 0), float(value))
        for point in history
        if (value := point.get(key)) is not None and math.isfinite(value)
    ]


def peak_memory(device: torch.device) -> int:
    """Peak bytes: PyTorch's allocations on a GPU, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def duration(seconds: float) -> str:
    """Format as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"

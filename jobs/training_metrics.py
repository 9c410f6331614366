"""A training's numbers among Ray's, for Prometheus: exported as `ray_gptj_training_…`, by run."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from types import TracebackType

from ray.util.metrics import Counter, Gauge

# The names of the points that gptj.training.progress logs.
NUMBERS = {
    "step": "Optimizer steps that are done.",
    "loss": "The training loss, on average since the point before.",
    "learning_rate": "The learning rate of the last step.",
    "gradient_norm": "The gradient's norm at the last step, before it is clipped.",
    "tokens_per_second": "Tokens that are trained on, of all workers, since the point before.",
    "useful_tokens": "Tokens as a share of what was computed with padding, since the point before.",
    "skipped_steps": "Steps without an update so far: fp16 overflows and loss spikes.",
    "waiting_for_data": "The share of the steps' time that was spent waiting for batches.",
    "mfu": "Model FLOP/s as a share of what the workers' matrix products reach.",
    "memory_bytes": "The first worker's peak of memory: its GPU's, or else the process's.",
    "evaluation_loss": "The loss on the evaluation data.",
}
REPEAT_SECONDS = 5.0  # Ray forgets numbers that are not set again


class TrainingMetrics:
    """How a run goes, for the length of a `with`; in the process that has the numbers."""

    def __init__(self, run: str) -> None:
        self._gauges = {
            name: Gauge(f"gptj_training_{name}", text, tag_keys=("run",))
            for name, text in NUMBERS.items()
        }
        self._tags = {"run": run}
        self._last: dict[str, float] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="training-metrics", daemon=True)

    def __enter__(self) -> TrainingMetrics:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def point(self, point: Mapping[str, float]) -> None:
        """A point of the run's history; what is no number, or not among NUMBERS, is left out."""
        with self._lock:
            self._last |= {
                name: value
                for name, value in point.items()
                if name in NUMBERS and math.isfinite(value)
            }
        self._set()

    def _repeat(self) -> None:
        while not self._ended.wait(REPEAT_SECONDS):
            self._set()

    def _set(self) -> None:
        with self._lock:
            for name, value in self._last.items():
                self._gauges[name].set(value, self._tags)


def count_failure(run: str) -> None:
    """A run has failed for good. The count stays while the cluster does, unlike a gauge."""
    Counter("gptj_training_failures", "Trainings that failed for good.", ("run",)).inc(
        1, {"run": run}
    )

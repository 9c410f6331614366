"""A training's metrics, exported by Ray to Prometheus as `ray_gptj_training_…`, by run."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from types import TracebackType

from ray.util.metrics import Counter, Gauge

# Named as in the points that gptj.training.progress logs.
NUMBERS = {
    "step": "Optimizer steps completed.",
    "loss": "The mean training loss since the previous point.",
    "learning_rate": "The learning rate of the last step.",
    "gradient_norm": "The gradient's norm at the last step, before clipping.",
    "tokens_per_second": "Tokens trained on by all workers since the previous point.",
    "useful_tokens": "The share of computed tokens that are not padding, since the previous point.",
    "skipped_steps": "Steps without an update so far: fp16 overflows and loss spikes.",
    "waiting_for_data": "The share of the steps' time that the slowest worker waited for batches.",
    "mfu": "Model FLOP/s as a share of the workers' peak matrix-multiply throughput.",
    "memory_bytes": "The first worker's peak memory: its GPU's, or else the process's.",
    "evaluation_loss": "The loss on the evaluation data.",
}
REPEAT_SECONDS = 5.0  # Ray forgets numbers that are not set again


class TrainingMetrics:
    """Exports a run's metrics during a `with` block, in the process that records them."""

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
        """Record a point of the run's history, ignoring non-numbers and names not in NUMBERS."""
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

"""Loss spikes: batches that would throw a training off, found by their gradient norm; skipped."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any


class SpikeFilter:
    """Detects gradient norms far above the usual.

    Norms of skipped batches count too: a lasting change of level costs half a window of batches,
    and not all that follow.

    Args:
        norms: of the last batches, oldest first; kept up to date.
        factor: a norm above this many times the median is a spike.
        window: how many norms the median covers; nothing is a spike before there is a tenth.
    """

    def __init__(self, norms: list[float], factor: float, window: int) -> None:
        self._norms = norms
        self._factor = factor
        self._window = window

    @property
    def median(self) -> float:
        return statistics.median(self._norms)

    def is_spike(self, norm: float) -> bool:
        enough = len(self._norms) >= self._window // 10
        return enough and norm > self._factor * self.median

    def record(self, norm: float) -> None:
        """Add a norm, unless it is not finite: such a norm ends the run."""
        if math.isfinite(norm):
            self._norms.append(norm)
            del self._norms[: -self._window]


class UpdateGate:
    """Lets DeepSpeed take a step without an update: weights, masters and moments stay as they are.

    DeepSpeed computes the norm within its step, and then calls the optimizer that it wraps (at
    stage 3 several times); the gate leaves out that call.

    Args:
        engine: DeepSpeed's, initialised.
        is_open: whether to update; asked once a step.
    """

    def __init__(self, engine: Any, is_open: Callable[[], bool]) -> None:
        optimizer = engine.basic_optimizer
        update = optimizer.step
        self._open: bool | None = None

        @functools.wraps(update)  # with the mark by which a scheduler knows it
        def step(*arguments: Any, **options: Any) -> Any:
            if self._open is None:
                self._open = is_open()
            return update(*arguments, **options) if self._open else None

        optimizer.step = step

    @property
    def closed(self) -> bool:
        """Whether the last update was left out."""
        return self._open is False

    def begin(self) -> None:
        """Begin another step."""
        self._open = None

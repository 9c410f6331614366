"""Skip loss spikes: batches that would derail training, detected by their gradient norm."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any


class SpikeFilter:
    """Detects outlying gradient norms.

    Norms of skipped batches count too, so a lasting change of level costs half a window of batches
    rather than all that follow.

    Args:
        norms: of the last batches, oldest first; updated in place.
        factor: a norm above this many times the median is a spike.
        window: number of norms in the median; no spikes before a tenth of it is filled.
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
    """Lets DeepSpeed take a step without updating weights, masters and moments.

    DeepSpeed computes the norm within its step, then calls the optimizer that it wraps (several
    times at stage 3); a closed gate skips that call.

    Args:
        engine: an initialised DeepSpeed engine.
        is_open: whether to update; called once per step.
    """

    def __init__(self, engine: Any, is_open: Callable[[], bool]) -> None:
        optimizer = engine.basic_optimizer
        update = optimizer.step
        self._open: bool | None = None

        @functools.wraps(update)  # keeps the attribute by which schedulers recognize it
        def step(*arguments: Any, **options: Any) -> Any:
            if self._open is None:
                self._open = is_open()
            return update(*arguments, **options) if self._open else None

        optimizer.step = step

    @property
    def closed(self) -> bool:
        """Whether the last update was skipped."""
        return self._open is False

    def begin(self) -> None:
        """Begin another step."""
        self._open = None

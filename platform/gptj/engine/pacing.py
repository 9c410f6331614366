"""Bounds the time between tokens of running streams while new prompts are prefilled beside them."""

from __future__ import annotations

import math

AIM = 0.9  # of the target: steps vary
MAX_CHANGE = 2.0  # of the limit, from one step to the next: one slow step says little


class PrefillPacer:
    """Limits the prompts' tokens of steps that also decode, so that these take `target` seconds.

    A step of base seconds and c seconds for each of n prompt tokens takes base + c n. Multiplying n
    by target / (base + c n) converges to n = (target - base) / c, monotonically since the slope
    there, base / target, is between 0 and 1; neither base nor c need be known, and both may change.
    The limit starts at one token, and grows more slowly than it falls.

    Args:
        target: seconds. If steps take longer even without prompts, these get one token per step.
        most: tokens.
    """

    def __init__(self, target: float, most: int) -> None:
        if not target > 0:
            raise ValueError(f"itl_target_seconds must be above 0, got {target}")
        self._aim = AIM * target
        self._most = most
        self._limit = 1.0

    @property
    def limit(self) -> int:
        """Most prompt tokens of the next step that also decodes."""
        return int(self._limit)

    def note(self, tokens: int, seconds: float) -> None:
        """Learn from a step that decoded and had this many prompt tokens, at least one."""
        ratio = self._aim / max(seconds, 1e-9)
        ratio = max(ratio, 1 / MAX_CHANGE) if ratio < 1 else min(math.sqrt(ratio), MAX_CHANGE)
        if tokens == self.limit:
            # Its fraction counts: otherwise a limit of 1 could not grow by less than half of it.
            self._limit *= ratio
        elif ratio < 1:
            # A prompt's end, or a step launched before the limit fell: both may be too many.
            self._limit = min(self._limit, max(tokens * ratio, self._limit / MAX_CHANGE))
        self._limit = min(max(self._limit, 1.0), float(self._most))

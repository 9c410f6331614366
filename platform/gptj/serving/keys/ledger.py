"""Counts the keys' use: requests and tokens in the last minute, and running requests.

The window slides: no key exceeds its limit within any 60 seconds.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

WINDOW_SECONDS = 60.0
# A request of no holder that runs longer than this has ended unnoticed.
MAX_SECONDS = 660.0
LEASE_SECONDS = 30.0  # a holder of requests that was silent for so long has died with them


@dataclass(frozen=True)
class Limits:
    """One key's limits; None: no limit."""

    requests: int | None = None  # per minute
    tokens: int | None = None  # per minute
    concurrent: int | None = None


@dataclass(frozen=True)
class Standing:
    """A key's remaining quota, and the limit that rejected the request, if any."""

    refused: Literal["requests", "tokens", "concurrent"] | None = None
    retry_seconds: float = 0.0  # until a rejected request would be accepted
    remaining_requests: int | None = None
    remaining_tokens: int | None = None
    reset_requests: float = 0.0  # seconds until the whole limit is free again
    reset_tokens: float = 0.0
    remaining_concurrent: int | None = None


class Ledger(Protocol):
    """Counts for all replicas, or for one.

    All tries of a request share the same `request` id and count once.
    """

    async def begin(self, key: str, limits: Limits, request: str) -> Standing: ...

    async def reserve(self, key: str, limits: Limits, request: str, tokens: int) -> Standing: ...

    async def end(self, key: str, request: str, tokens: int) -> None:
        """The request ended; it used `tokens` of those it reserved."""


@dataclass
class Window:
    """The last minute's amounts, by request."""

    total: int = 0
    _amounts: OrderedDict[str, tuple[float, int]] = field(default_factory=OrderedDict)

    def __contains__(self, request: str) -> bool:
        return request in self._amounts

    def expire(self, now: float) -> None:
        while self._amounts:
            request, (since, amount) = next(iter(self._amounts.items()))
            if now - since < WINDOW_SECONDS:
                break
            del self._amounts[request]
            self.total -= amount

    def add(self, request: str, amount: int, now: float) -> None:
        self._amounts[request] = now, amount
        self.total += amount

    def change(self, request: str, amount: int) -> None:
        if request in self._amounts:
            since, before = self._amounts[request]
            self._amounts[request] = since, amount
            self.total += amount - before

    def seconds_until(self, room: int, limit: int, now: float) -> float:
        """Seconds until there is room for `room` more."""
        left, wait = self.total, 0.0
        for since, amount in self._amounts.values():
            if left + room <= limit:
                break
            left, wait = left - amount, max(0.0, since + WINDOW_SECONDS - now)
        return wait

    def reset_seconds(self, now: float) -> float:
        if not self._amounts:
            return 0.0
        newest, _ = next(reversed(self._amounts.values()))
        return max(0.0, newest + WINDOW_SECONDS - now)


@dataclass(frozen=True)
class _Running:
    """A running request: since when, and in which process, if that reports its requests."""

    since: float
    holder: str | None


@dataclass
class _Use:
    """One key's use."""

    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    running: OrderedDict[str, _Running] = field(default_factory=OrderedDict)  # oldest first
    reserved: set[str] = field(default_factory=set)  # running requests with reserved tokens


class Counts:
    """The synchronous counting; the clock is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: defaultdict[str, _Use] = defaultdict(_Use)
        self._heard: dict[str, float] = {}  # when from each holder

    def begin(self, key: str, limits: Limits, request: str, holder: str | None = None) -> Standing:
        if holder is not None:
            self._heard[holder] = self._clock()
        use, now = self._use(key)
        again = request in use.running or request in use.requests
        if not again and limits.requests is not None and use.requests.total >= limits.requests:
            wait = use.requests.seconds_until(1, limits.requests, now)
            return self._standing(use, limits, now, "requests", wait)
        full = limits.concurrent is not None and len(use.running) >= limits.concurrent
        if full and request not in use.running:
            return self._standing(use, limits, now, "concurrent", 1.0)
        if request not in use.requests:
            use.requests.add(request, 1, now)
        use.running[request] = _Running(now, holder)
        use.running.move_to_end(request)  # the oldest is first
        return self._standing(use, limits, now)

    def reserve(self, key: str, limits: Limits, request: str, tokens: int) -> Standing:
        use, now = self._use(key)
        if request in use.tokens or request in use.reserved:  # a retry, perhaps a minute later
            return self._standing(use, limits, now)
        if limits.tokens is not None and use.tokens.total + tokens > limits.tokens:
            wait = use.tokens.seconds_until(tokens, limits.tokens, now)
            return self._standing(use, limits, now, "tokens", wait)
        use.tokens.add(request, tokens, now)
        if request in use.running:
            use.reserved.add(request)
        return self._standing(use, limits, now)

    def end(self, key: str, request: str, tokens: int) -> None:
        use, _ = self._use(key)
        use.running.pop(request, None)
        use.reserved.discard(request)
        use.tokens.change(request, tokens)

    def renew(self, holder: str, running: Sequence[tuple[str, str]]) -> None:
        """A holder lives, and has these requests, as (key, request).

        One that could not be heard for a while gets its requests back. Requests that it does not
        have are dropped, unless it may just have begun them.
        """
        now = self._heard[holder] = self._clock()
        held = set(running)
        for key, use in self._uses.items():
            for request, each in list(use.running.items()):
                begun = now - each.since < LEASE_SECONDS
                if each.holder == holder and not begun and (key, request) not in held:
                    del use.running[request]
                    use.reserved.discard(request)
        for key, request in running:
            use = self._uses[key]
            if request not in use.running:
                use.running[request] = _Running(now, holder)

    def _use(self, key: str) -> tuple[_Use, float]:
        self._end_leases()
        use, now = self._uses[key], self._clock()
        use.requests.expire(now)
        use.tokens.expire(now)
        while use.running:
            request, oldest = next(iter(use.running.items()))
            if oldest.holder is not None or now - oldest.since < MAX_SECONDS:
                break
            del use.running[request]
            use.reserved.discard(request)
        return use, now

    def _end_leases(self) -> None:
        """Drop the requests of silent holders."""
        now = self._clock()
        silent = {each for each, heard in self._heard.items() if now - heard >= LEASE_SECONDS}
        if not silent:
            return
        for use in self._uses.values():
            for request in [name for name, each in use.running.items() if each.holder in silent]:
                del use.running[request]
                use.reserved.discard(request)
        for holder in silent:
            del self._heard[holder]

    @staticmethod
    def _standing(
        use: _Use,
        limits: Limits,
        now: float,
        refused: Literal["requests", "tokens", "concurrent"] | None = None,
        retry_seconds: float = 0.0,
    ) -> Standing:
        return Standing(
            refused,
            retry_seconds,
            _left(limits.requests, use.requests.total),
            _left(limits.tokens, use.tokens.total),
            use.requests.reset_seconds(now),
            use.tokens.reset_seconds(now),
            _left(limits.concurrent, len(use.running)),
        )


class LocalLedger:
    """A Ledger for this process only."""

    def __init__(self, counts: Counts | None = None) -> None:
        self._counts = counts or Counts()

    async def begin(self, key: str, limits: Limits, request: str) -> Standing:
        return self._counts.begin(key, limits, request)

    async def reserve(self, key: str, limits: Limits, request: str, tokens: int) -> Standing:
        return self._counts.reserve(key, limits, request, tokens)

    async def end(self, key: str, request: str, tokens: int) -> None:
        self._counts.end(key, request, tokens)


def headers(limits: Limits, standing: Standing) -> dict[str, str]:
    """OpenAI's x-ratelimit headers for the key's limits; for concurrency similar ones."""
    found: dict[str, str] = {}
    if limits.concurrent is not None and standing.remaining_concurrent is not None:
        # No reset: nobody knows when a running request will finish.
        found["x-ratelimit-limit-concurrent-requests"] = str(limits.concurrent)
        found["x-ratelimit-remaining-concurrent-requests"] = str(standing.remaining_concurrent)
    for kind, limit, remaining, reset in (
        ("requests", limits.requests, standing.remaining_requests, standing.reset_requests),
        ("tokens", limits.tokens, standing.remaining_tokens, standing.reset_tokens),
    ):
        if limit is not None:
            found[f"x-ratelimit-limit-{kind}"] = str(limit)
            found[f"x-ratelimit-remaining-{kind}"] = str(remaining)
            found[f"x-ratelimit-reset-{kind}"] = f"{reset:.3f}s"
    if standing.refused is not None:
        found["retry-after"] = str(max(1, math.ceil(standing.retry_seconds)))
    return found


def _left(limit: int | None, used: int) -> int | None:
    return None if limit is None else max(0, limit - used)

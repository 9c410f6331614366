"""Refuses requests that a full service would refuse, before they cost a way to a replica.

A refusal by a replica passes Serve's router and costs a proxy about as much as an answer: clients
that ask again at once would leave the proxy no time for answers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj.serving.errors import OverloadedError, error_response
from gptj.serving.middleware.limits import is_health

PER_KEY = b"x-ratelimit-scope"  # of a 429 that is about the key: see RateLimitError
MAX_IN_FLIGHT = 2000  # requests in one proxy; below Serve's max_ongoing_requests, see serve.yaml
GROWTH = 1.1  # of a route's bound, for each second without a refusal
FULL = OverloadedError("the service is full: try again later")


@dataclass
class Bound:
    """How many requests of a route were in flight when a replica last refused one."""

    in_flight: int
    since: float

    def now(self, now: float) -> float:
        return max(1, self.in_flight) * float(GROWTH ** (now - self.since))


class Admission:
    """Middleware: 429 while a route has as many requests as when a replica was last full.

    Health is always let through.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_in_flight: int = MAX_IN_FLIGHT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._max_in_flight = max_in_flight
        self._clock = clock
        self._in_flight: Counter[str] = Counter()  # by path; only what is in flight
        self._bounds: dict[str, Bound] = {}  # by path; a replica has answered there

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_health(scope):
            await self._app(scope, receive, send)
            return
        path = scope["path"].rstrip("/")
        if not self._has_room(path):
            await error_response(FULL)(scope, receive, send)
            return
        refused = False

        async def watch(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] == 429:
                refused = not any(name.lower() == PER_KEY for name, _ in message["headers"])
            await send(message)

        self._in_flight[path] += 1
        try:
            await self._app(scope, receive, watch)
        finally:
            self._in_flight[path] -= 1
            if refused:
                self._note_refusal(path)
            if not self._in_flight[path]:
                del self._in_flight[path]

    def _has_room(self, path: str) -> bool:
        if self._in_flight.total() >= self._max_in_flight:
            return False
        bound = self._bounds.get(path)
        if bound is None:
            return True
        most = bound.now(self._clock())
        if most > self._max_in_flight:
            del self._bounds[path]
            return True
        return self._in_flight[path] < most

    def _note_refusal(self, path: str) -> None:
        """So many were too many: those that are in flight now, without the refused one."""
        now, in_flight = self._clock(), self._in_flight[path]
        bound = self._bounds.get(path)
        # Several refusals of one moment come back one by one, while fewer and fewer are in flight.
        if bound is None or now - bound.since > 1 or in_flight > bound.in_flight:
            self._bounds[path] = Bound(in_flight, now)

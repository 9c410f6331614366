"""Rejects, in the proxy, requests that a full service would reject anyway.

A rejection by a replica passes Serve's router and costs the proxy about as much as an answer, so
clients that retry immediately would leave the proxy no time for answers.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj.serving.access_log import current_entry
from gptj.serving.errors import SCOPE, OverloadedError, error_response
from gptj.serving.middleware.limits import is_health

logger = logging.getLogger(__name__)

REPORT_SECONDS = 1.0  # between lines of the log that count refusals
MAX_IN_FLIGHT = 2000  # requests in one proxy; below Serve's max_ongoing_requests, see serve.yaml
FIRST_BOUND = 512  # of a route, until more is known
GROWTH = 0.5  # of a route's bound, per answer while the bound is reached
MAX_KNOWN = 1024  # paths with a bound; clients can make up any number of them
FULL = OverloadedError("the service is full: try again later")


@dataclass
class Bound:
    """A route's limit of requests in flight, learned from its replicas' rejections.

    Like TCP's congestion window: it grows slowly while reached without rejections, and drops to the
    number in flight on a rejection.
    """

    value: float
    refused_at: float = float("-inf")

    def note_answer(self, in_flight: int) -> None:
        if in_flight + 1 >= self.value:
            self.value += GROWTH

    def note_refusal(self, in_flight: int, now: float) -> None:
        # Simultaneous rejections arrive one by one, with ever fewer in flight: count the first.
        if now - self.refused_at > 1:
            self.value = max(1, in_flight)
            self.refused_at = now


class Gate:
    """Counts a proxy's requests in flight, by path, and tells whether there is room for more.

    Args:
        on_refusals: told of the latest rejections' number, at most once in REPORT_SECONDS.
    """

    def __init__(
        self,
        max_in_flight: int = MAX_IN_FLIGHT,
        first_bound: int = FIRST_BOUND,
        clock: Callable[[], float] = time.monotonic,
        on_refusals: Callable[[int], None] = lambda number: None,
    ) -> None:
        self._on_refusals = on_refusals
        self._max_in_flight = max_in_flight
        self._first_bound = first_bound
        self._clock = clock
        self._in_flight: Counter[str] = Counter()  # without zeros
        self._bounds: OrderedDict[str, Bound] = OrderedDict()  # least recently used first
        self._refused = 0  # since the last report
        self._reported_at = float("-inf")

    def full(self, path: str) -> bool:
        bound = self._bounds.get(path)
        most = self._first_bound if bound is None else bound.value
        return self._in_flight[path] >= most or self._in_flight.total() >= self._max_in_flight

    def enter(self, path: str) -> None:
        self._in_flight[path] += 1

    def leave(self, path: str, status: int, *, refused: bool) -> None:
        """A request ended with this status; `refused`: because its replica is full."""
        self._in_flight[path] -= 1
        left = self._in_flight[path]
        if refused:
            self._bound(path).note_refusal(left, self._clock())
        elif status == 200:
            self._bound(path).note_answer(left)
        if not left:
            del self._in_flight[path]
        self._report()

    def note_refusal(self) -> None:
        """Count a rejection; together they are logged and reported."""
        self._refused += 1
        self._report()

    def _report(self) -> None:
        if self._refused and (now := self._clock()) - self._reported_at >= REPORT_SECONDS:
            logger.warning("the service is full: %d requests refused", self._refused)
            self._on_refusals(self._refused)
            self._refused, self._reported_at = 0, now

    def _bound(self, path: str) -> Bound:
        bound = self._bounds.setdefault(path, Bound(self._first_bound))
        self._bounds.move_to_end(path)
        if len(self._bounds) > MAX_KNOWN:
            self._bounds.popitem(last=False)
        return bound


class Admission:
    """Middleware: 429 while a route has as many requests in flight as its bound allows.

    Health checks always pass. A route's preflights are counted separately: they need no model, and
    browsers report a rejected one as a network error.
    """

    def __init__(self, app: ASGIApp, gate: Gate | None = None) -> None:
        self._app = app
        self._gate = gate or Gate()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_health(scope):
            await self._app(scope, receive, send)
            return
        path = scope["path"].rstrip("/")
        if scope["method"] == "OPTIONS":
            path = f"OPTIONS {path}"
        if self._gate.full(path):
            current_entry().logged = True
            self._gate.note_refusal()
            await error_response(FULL)(scope, receive, send)
            return
        status, refused, inside = 0, False, True

        def leave() -> None:
            nonlocal inside
            if inside:
                inside = False
                self._gate.leave(path, status, refused=refused)

        async def watch(message: Message) -> None:
            nonlocal status, refused
            if message["type"] == "http.response.start":
                status = message["status"]
                names = {name.lower() for name, _ in message.get("headers", ())}
                refused = status == 429 and SCOPE.encode() not in names
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                leave()  # now: its client may send the next before Serve has cleaned up after it
            await send(message)

        self._gate.enter(path)
        try:
            await self._app(scope, receive, watch)
        finally:
            leave()

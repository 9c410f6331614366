"""Around every request: its id for the reply, and its route, status and time for the metrics."""

from __future__ import annotations

import re
import time
import uuid
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj.serving.metrics import Recorder

HEADER = b"x-request-id"
SANE = re.compile(rb"[A-Za-z0-9._-]{1,128}")
CLIENT_GONE = 499
UNKNOWN_ROUTE = "unknown"  # not the path itself: clients can make up any number of them

_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def request_id() -> str:
    """The id of the request that this code works for; a new one outside of any."""
    return _request_id.get() or uuid.uuid4().hex


class Observing:
    """Middleware, the outermost that looks at requests.

    Serve's proxy has put an X-Request-Id on the request, the client's own if it sent one, and
    puts it on the reply: what is made here has the same id, unless it would be a strange one.
    """

    def __init__(self, app: ASGIApp, recorder: Recorder) -> None:
        self._app = app
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        own = next((value for name, value in scope["headers"] if name == HEADER), b"")
        status, complete = CLIENT_GONE, False

        async def observe(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                complete = True
            await send(message)

        token = _request_id.set(own.decode() if SANE.fullmatch(own) else None)
        try:
            await self._app(scope, receive, observe)
        finally:
            _request_id.reset(token)
            seconds = time.perf_counter() - start
            route = _route(scope)
            self._recorder.request(route, status if complete else CLIENT_GONE, seconds)


def _route(scope: Scope) -> str:
    """The route's own pattern behind the application's prefix, such as `/v1/models/{model_id}`.

    What was refused before a route was looked for, by its key or its size, has none.
    """
    pattern = getattr(scope.get("route"), "path_format", None)
    if pattern is None:
        return UNKNOWN_ROUTE
    return (scope.get("root_path", "").rstrip("/") + pattern).rstrip("/") or "/"

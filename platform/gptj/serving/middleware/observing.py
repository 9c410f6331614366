"""Request ids; metrics and a log line with each request's route, status and latency."""

from __future__ import annotations

import re
import time
import uuid
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj.serving import access_log
from gptj.serving.metrics import Recorder
from gptj.serving.middleware.paths import route_path
from gptj.serving.tracing import continued

HEADER = b"x-request-id"
SEED = b"x-gptj-seed"  # the same for all tries of a request: see gptj.serving.entry.failover
SANE = re.compile(rb"[A-Za-z0-9._-]{1,128}")
CLIENT_GONE = 499
UNKNOWN_ROUTE = "unknown"  # not the path: clients can make up any number

_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_seed: ContextVar[int | None] = ContextVar("seed", default=None)


def request_id() -> str:
    """The current request's id; outside of requests, a new one."""
    return _request_id.get() or uuid.uuid4().hex


def request_seed() -> int | None:
    """Seed for a request that sets none; None outside of requests or without our proxy.

    Retries of a request have the same seed, and so the same answer.
    """
    return _seed.get()


class Observing:
    """The outermost middleware that inspects requests.

    Serve's proxy sets X-Request-Id, the client's if sent, on the request and on the reply;
    completions get the same id if it is well-formed.
    """

    def __init__(self, app: ASGIApp, recorder: Recorder) -> None:
        self._app = app
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        headers = dict(scope["headers"])
        own, seed = headers.get(HEADER, b""), headers.get(SEED, b"")
        status, complete = CLIENT_GONE, False

        async def observe(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                complete = True
            await send(message)

        token = _request_id.set(own.decode() if SANE.fullmatch(own) else None)
        seed_token = _seed.set(int(seed[:20]) if seed.isdigit() else None)
        with access_log.request_entry() as entry:
            try:
                with continued(scope):
                    await self._app(scope, receive, observe)
            finally:
                _request_id.reset(token)
                _seed.reset(seed_token)
                seconds = time.perf_counter() - start
                route = _route(scope)
                answer = status if complete else CLIENT_GONE
                self._recorder.request(route, answer, seconds)
                if answer != 200 or route_path(scope) != "/health":  # do not log every probe
                    id_ = own[:128].decode("latin-1")
                    access_log.write(entry, scope["method"], route, answer, seconds, id_)


def _route(scope: Scope) -> str:
    """The route's pattern after the application's prefix, such as `/v1/models/{model_id}`.

    Requests rejected before routing, by key or size, have none.
    """
    pattern = getattr(scope.get("route"), "path_format", None)
    if pattern is None:
        return UNKNOWN_ROUTE
    return (scope.get("root_path", "").rstrip("/") + pattern).rstrip("/") or "/"

"""Assigns each request an id, returns it in every reply, and logs the proxy's own replies."""

from __future__ import annotations

import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj.serving import access_log
from gptj.serving.middleware.observing import CLIENT_GONE, HEADER


class RequestIds:
    """Middleware: sets X-Request-Id on the request, unless the client did, and on the reply."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = scope["headers"]
        given = next((value for name, value in headers if name == HEADER), None)
        request_id = given or str(uuid.uuid4()).encode()
        if given is None:
            scope = {**scope, "headers": [*headers, (HEADER, request_id)]}

        start, status = time.perf_counter(), CLIENT_GONE

        async def identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            if message["type"] == "http.response.start" and request_id.isascii():
                own = list(message.get("headers", []))
                if not any(name.lower() == HEADER for name, _ in own):
                    message = {**message, "headers": [*own, (HEADER, request_id)]}
            await send(message)

        with access_log.request_entry() as entry:
            await self._app(scope, receive, identified)
            if not entry.logged:
                seconds, path = time.perf_counter() - start, scope["path"][:200]
                id_ = request_id[:128].decode("latin-1")
                access_log.write(entry, scope["method"], path, status, seconds, id_)

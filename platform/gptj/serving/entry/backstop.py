"""The last resort: an error of our own code is answered like every other error."""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj.serving.entry.event_stream import error_events
from gptj.serving.errors import UNEXPECTED, error_response

logger = logging.getLogger(__name__)


class Backstop:
    """Middleware: logs an unexpected exception; the client gets a 500, or its stream's last events.

    A reply that has begun and is not an event stream is cut, so that nobody takes it for whole.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = is_stream = False

        async def noting(message: Message) -> None:
            nonlocal started, is_stream
            if message["type"] == "http.response.start":
                started = True
                headers = {name.lower(): value for name, value in message.get("headers", [])}
                is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            if scope["type"] != "http" or (started and not is_stream):
                raise
            logger.exception("an unexpected error in front of the replicas")
            if started:
                await send({"type": "http.response.body", "body": error_events(UNEXPECTED)})
            else:
                await error_response(UNEXPECTED)(scope, receive, send)

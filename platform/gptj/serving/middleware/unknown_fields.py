"""What is done with fields that no body has: refused, or ignored with a warning in the log."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from gptj.serving.requests import ignoring_unknown_fields


class IgnoreUnknownFields:
    """Middleware: bodies of its application may have any fields."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ignoring_unknown_fields():
            await self._app(scope, receive, send)

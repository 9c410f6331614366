"""Ignore unknown fields of bodies, with a warning in the log, instead of rejecting them."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from gptj.serving.requests import ignoring_unknown_fields


class IgnoreUnknownFields:
    """Middleware: accept bodies with unknown fields."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ignoring_unknown_fields():
            await self._app(scope, receive, send)

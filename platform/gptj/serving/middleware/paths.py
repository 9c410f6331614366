"""A request's path within its application, whatever its prefix."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send


def route_path(scope: Scope) -> str:
    """The path without the prefix; the prefix itself is `/`."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "").rstrip("/")
    if prefix and (path == prefix or path.startswith(prefix + "/")):
        path = path[len(prefix) :]
    return path or "/"


class Routing:
    """Middleware: routes accept a trailing slash, and answer HEAD like GET.

    `POST /prefix` reaches the route `/`. Redirecting, as Starlette does, needs an absolute URL,
    whose scheme is unknown behind a proxy that terminates TLS.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            prefix = scope.get("root_path", "").rstrip("/")
            path = route_path(scope)
            scope = {**scope, "path": prefix + (path.rstrip("/") or "/")}
            if scope["method"] == "HEAD":
                scope["method"] = "GET"
                send = _without_body(send)
        await self._app(scope, receive, send)


def _without_body(send: Send) -> Send:
    async def headers_only(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return headers_only

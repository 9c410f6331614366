"""Where a request goes within its application, whatever prefix the application is served under."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


def route_path(scope: Scope) -> str:
    """The path without the prefix; the prefix itself is `/`."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "").rstrip("/")
    if prefix and (path == prefix or path.startswith(prefix + "/")):
        path = path[len(prefix) :]
    return path or "/"


class PrefixAsRoot:
    """Middleware: `POST /prefix` reaches the route `/`, which is else at `/prefix/` only."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        prefix = scope.get("root_path", "").rstrip("/")
        if scope["type"] == "http" and prefix and scope["path"] == prefix:
            scope = {**scope, "path": prefix + "/"}
        await self._app(scope, receive, send)

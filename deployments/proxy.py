"""What Serve's HTTP proxies do before they look for an application.

Set RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.proxy:middlewares where Ray starts (the
manifests and `make serve` do): a proxy reads some headers itself, and answers a plain 500 where
they are not UTF-8.
"""

from __future__ import annotations

import uvicorn.protocols.websockets.auto as websockets
from starlette.middleware import Middleware

from gptj.serving.middleware.edge import Edge


def middlewares() -> list[Middleware]:
    """Called in each proxy's process, before its server starts."""
    # As uvicorn's --ws none, for which Serve has no setting: a POST that offers WebSocket would
    # never be answered.
    websockets.AutoWebSocketsProtocol = None
    return [Middleware(Edge)]

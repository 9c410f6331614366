"""Answers requests that no route can: WebSocket, unreadable headers, protocol upgrades.

Used in every application, and in Serve's proxy, which reads some headers itself and would answer
unreadable ones with a plain 500 (see deployments.proxy).
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj.serving.errors import InvalidRequestError, error_response

# Read by Serve's proxy as UTF-8; other headers may have any bytes.
PROXY_HEADERS = frozenset(
    {
        b"x-request-id",
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"x-session-id",
        b"serve-multiplexed-model-id",
        b"serve_multiplexed_model_id",
    }
)
TIMEOUT = b"x-request-timeout-seconds"
MAX_TIMEOUT = 1e6  # seconds; event loops cannot wait arbitrarily long
NO_WEBSOCKET = InvalidRequestError(
    "WebSocket is not supported: send POST requests, with stream=true for a stream",
    code="websocket_not_supported",
)


class Edge:
    """Middleware: refuses WebSocket and unreadable headers, and never switches protocols.

    A client may offer to upgrade (`Upgrade: h2c`), and the server may decline by just answering.
    uvicorn reads nothing after such an offer, neither the body nor the connection's next request:
    BodyLimit detects the missing body, and the connection is closed here. WebSocket is such an
    offer if disabled in the server, as in Serve's proxy; otherwise it has its own scope type.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await _refuse_websocket(scope, receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if offers_upgrade(scope):
            send = _closing(send)
        problem = _problem(scope)
        if problem is not None:
            await error_response(problem)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def offers_upgrade(scope: Scope) -> bool:
    """Whether the client offers to switch protocols."""
    return any(name == b"upgrade" for name, _ in scope["headers"])


def _problem(scope: Scope) -> InvalidRequestError | None:
    """The error of the headers, if any."""
    for name, value in scope["headers"]:
        if name == b"upgrade" and value.strip().lower() == b"websocket":
            return NO_WEBSOCKET
        if name not in PROXY_HEADERS:
            continue
        shown = name.decode()
        try:
            value.decode()
        except UnicodeDecodeError:
            return InvalidRequestError(
                f"the header {shown} is not valid UTF-8: send ASCII", code="invalid_header"
            )
        if name == TIMEOUT and not _seconds(value) <= MAX_TIMEOUT:
            return InvalidRequestError(
                f"the header {shown} must be at most {MAX_TIMEOUT:.0f}, got {value.decode():.40}",
                code="invalid_header",
            )
    return None


def _seconds(value: bytes) -> float:
    """Parsed like Serve does: not a number means no limit, here 0."""
    try:
        return float(value)
    except ValueError:
        return 0.0


def _closing(send: Send) -> Send:
    """Close the connection after the reply."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", []), (b"connection", b"close")]
            message = {**message, "headers": headers}
        await send(message)

    return closing


async def _refuse_websocket(scope: Scope, receive: Receive, send: Send) -> None:
    """Send an error reply if the server supports it, otherwise its own 403."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008, "reason": NO_WEBSOCKET.message})
        return

    async def as_denial(message: Message) -> None:
        await send({**message, "type": f"websocket.{message['type']}"})

    await error_response(NO_WEBSOCKET)({**scope, "type": "http"}, receive, as_denial)

"""Limits the size of bodies, including chunked ones, while they are received."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj.serving.errors import BodyTooLargeError, InvalidRequestError, error_response
from gptj.serving.middleware.edge import offers_upgrade

MAX_BODY_BYTES = 2**20  # tokenizing takes a hundred times the memory of the text


class BodyLimit:
    """Middleware: 413 for a body above `max_bytes`; smaller ones are read, then passed on."""

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except (BodyTooLargeError, InvalidRequestError) as error:
            await error_response(error)(scope, receive, send)
            return
        if body is None:
            return  # the client has left
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        declared = dict(scope["headers"]).get(b"content-length")
        if declared is not None:
            if not declared.isdigit():
                raise InvalidRequestError(f"Content-Length must be a number, got {declared!r}")
            self._check(int(declared[:20]))
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._check(size)
            if not message.get("more_body", False):
                self._check_complete(scope, declared, size)
                return b"".join(parts)

    def _check_complete(self, scope: Scope, declared: bytes | None, size: int) -> None:
        """uvicorn does not read the body of a request that offers an upgrade."""
        announced = declared not in (None, b"0") or b"transfer-encoding" in dict(scope["headers"])
        if size == 0 and announced and offers_upgrade(scope):
            raise InvalidRequestError(
                "the body was not read, since the request offers to switch protocols: send it "
                "without the header Upgrade (curl --http1.1, or HTTP_1_1 in Java's client)",
                code="upgrade_not_supported",
            )

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise BodyTooLargeError(
                f"the request's body is larger than {self._max_bytes} bytes: send less at a time"
            )

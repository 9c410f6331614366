"""Limits the size of bodies, including chunked ones, while they are received."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj.serving.errors import (
    APIError,
    BodyTooLargeError,
    InvalidRequestError,
    UnavailableError,
    error_response,
)
from gptj.serving.middleware.edge import offers_upgrade

MAX_BODY_BYTES = 2**20  # default; tokenizing takes a hundred times the memory of the text
LARGEST_BODY_BYTES = 2**24  # most that an application may allow: Serve's proxy holds them all
MAX_WAITING_BYTES = 2**28  # total of bodies being received
MAX_HELD_BYTES = 2**30  # total of running requests' bodies


class BodyLimit:
    """Middleware: 413 for a body above `max_bytes`; smaller ones are read, then passed on.

    503 beyond `max_waiting_bytes` in all incomplete bodies, or beyond `max_held_bytes` in all
    running requests' bodies. The body of a health check is not read.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int = MAX_BODY_BYTES,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        max_held_bytes: int = MAX_HELD_BYTES,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_waiting_bytes = max_waiting_bytes
        self._max_held_bytes = max_held_bytes
        self._waiting_bytes = 0
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            body = b"" if is_health(scope) else await self._read(scope, receive)
            if body and self._held_bytes + len(body) > self._max_held_bytes:
                raise UnavailableError("the bodies of running requests fill the memory: try later")
        except APIError as error:
            await error_response(error)(scope, receive, send)
            return
        if body is None:
            return  # the client has left
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        size = len(body)
        self._held_bytes += size
        try:
            await self._app(scope, replay, send)
        finally:
            self._held_bytes -= size

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        declared = dict(scope["headers"]).get(b"content-length")
        if declared is not None:
            if not declared.isdigit():
                raise InvalidRequestError(f"Content-Length must be a number, got {declared!r}")
            self._check(int(declared[:20]))
        parts: list[bytes] = []
        size = 0
        try:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                self._waiting_bytes += len(parts[-1])
                self._check(size)
                if not message.get("more_body", False):
                    self._check_complete(scope, declared, size)
                    return b"".join(parts)
                if self._waiting_bytes > self._max_waiting_bytes:
                    raise UnavailableError("too many bodies are half sent: try again later")
        finally:
            self._waiting_bytes -= size

    def _check_complete(self, scope: Scope, declared: bytes | None, size: int) -> None:
        """uvicorn does not read the body of a request that offers an upgrade."""
        announced = declared not in (None, b"0") or b"transfer-encoding" in dict(scope["headers"])
        if size == 0 and announced and offers_upgrade(scope):
            raise InvalidRequestError(
                "the body was not read because the request offers to switch protocols: send it "
                "without the header Upgrade (curl --http1.1, or HTTP_1_1 in Java's client)",
                code="upgrade_not_supported",
            )

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise BodyTooLargeError(
                f"the request's body is larger than {self._max_bytes} bytes: send less at a time"
            )


def is_health(scope: Scope) -> bool:
    """Whether the request is for an application's health, or Serve's own."""
    path: str = scope["path"].rstrip("/")
    return path.endswith("/health") or path.startswith("/-/")

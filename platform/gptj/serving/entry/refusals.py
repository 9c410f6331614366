"""Lets cross-origin pages read the proxy's own errors if they may read the replies."""

from __future__ import annotations

from collections import OrderedDict

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_KNOWN = 4096  # (origin, path) pairs; clients can make up any number
ALLOW = b"access-control-allow-origin"


class ReadableRefusals:
    """Outermost middleware: adds to the proxy's errors the CORS headers of earlier replies.

    The applications decide which origins may read replies (see middleware.cors); their replies to
    preflights and requests tell. Until an origin's first reply the proxy's errors are unreadable
    for it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        # The origin allowed by the last reply, by (origin, path); least recent first.
        self._known: OrderedDict[tuple[bytes, str], bytes] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = dict(scope.get("headers", ())).get(b"origin")
        if scope["type"] != "http" or origin is None:
            await self._app(scope, receive, send)
            return
        key = (origin, scope["path"].rstrip("/"))

        async def readable(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                given = next((value for name, value in headers if name.lower() == ALLOW), None)
                if given is not None:
                    self._note(key, given)
                elif message["status"] < 400:
                    self._known.pop(key, None)  # no longer allowed
                elif key in self._known:
                    message = {**message, "headers": headers + self._headers(key)}
            await send(message)

        await self._app(scope, receive, readable)

    def _note(self, key: tuple[bytes, str], allowed: bytes) -> None:
        self._known[key] = allowed
        self._known.move_to_end(key)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def _headers(self, key: tuple[bytes, str]) -> list[tuple[bytes, bytes]]:
        allowed = self._known[key]
        vary = [] if allowed == b"*" else [(b"vary", b"Origin")]
        return [(ALLOW, allowed), (b"access-control-expose-headers", b"*"), *vary]

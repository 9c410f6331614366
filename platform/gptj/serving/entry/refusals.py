"""Lets pages of other origins read the proxy's own refusals, where they may read the replies."""

from __future__ import annotations

from collections import OrderedDict

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_KNOWN = 4096  # origins times paths, of which clients can make up any number
ALLOW = b"access-control-allow-origin"


class ReadableRefusals:
    """Middleware, the outermost: errors made here get the CORS headers that replies have.

    The applications decide whose pages may read them (see middleware.cors), and their replies to an
    origin's preflights and requests say so. Without a reply since this proxy started, nothing is
    known, and the refusal stays unreadable.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        # By origin and path, what the last reply allowed; the least recent first.
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
                    self._known.pop(key, None)  # no longer
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

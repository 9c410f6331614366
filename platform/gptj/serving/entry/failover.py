"""Retries a request on another replica when its replica has died.

The services have no side effects, so every request can be repeated. All tries have the same request
id and seed, and so the same answer. A stream continues where it stopped.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj.serving.access_log import current_entry, printable
from gptj.serving.entry.event_stream import DivergedError, EventStream, error_events
from gptj.serving.entry.prefix_keys import without_routing
from gptj.serving.errors import (
    APIError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    RequestTimeoutError,
    UnavailableError,
    error_response,
)
from gptj.serving.middleware.edge import TIMEOUT
from gptj.serving.middleware.observing import HEADER as REQUEST_ID
from gptj.serving.middleware.observing import SEED
from gptj.serving.tracing import note

logger = logging.getLogger(__name__)

MAX_TRIES = 3  # a request that kills replicas must not kill them all
PAUSE_SECONDS = 0.1  # before the second try; doubled before each later one
DISCONNECT = b"x-request-disconnect-disabled"  # would keep Serve working after the client left


class Failover:
    """Middleware before Serve's routing, inside RequestIds and BodyLimit.

    Expects the whole body in one message.

    Args:
        limit_seconds: returns Serve's request timeout, or None; it covers all tries.
    """

    def __init__(
        self, app: ASGIApp, limit_seconds: Callable[[ASGIApp], float | None] = lambda app: None
    ) -> None:
        self._app = app
        self._limit_seconds = limit_seconds(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = b""
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has left
            body = message.get("body", b"")
        exchange = Exchange(self._app, scope, body, receive, send, self._limit_seconds)
        await exchange.run()


class Exchange:
    """A client's request, and the tries to answer it."""

    def __init__(
        self,
        app: ASGIApp,
        scope: Scope,
        body: bytes,
        receive: Receive,
        send: Send,
        limit_seconds: float | None,
    ) -> None:
        self._app = app
        self._body = body
        self._receive = receive
        self._send = send
        self._start = time.monotonic()
        given = dict(scope["headers"])
        self.id = printable(given.get(REQUEST_ID, b"").decode("latin-1")[:128])  # for the log
        self._limit_seconds, shorter = _limit(given.get(TIMEOUT), limit_seconds)
        ours = {SEED, DISCONNECT} | (set() if shorter else {TIMEOUT})
        self._headers = [
            *(each for each in scope["headers"] if each[0] not in ours),
            (SEED, str(secrets.randbits(63)).encode()),
        ]
        self._scope = scope
        self._left = False  # the client left
        self._ended = asyncio.Event()  # abandon this try
        self.stream: EventStream | None = None  # once begun

    async def run(self) -> None:
        pause = PAUSE_SECONDS
        for number in range(1, MAX_TRIES + 1):
            reply = Reply(self)
            await self._app(self._scope_of_try(number), self._input(), reply.take)
            if self._left or reply.sent:
                return
            if self.stream is not None and self.stream.done:
                await self._send({"type": "http.response.body"})
                return
            if reply.diverged or self._expired():
                break
            if number == MAX_TRIES and reply.complete:  # refused, after a stream had begun
                await self._end_stream(await reply.error())
                return
            if number < MAX_TRIES:
                reason = "refused it" if reply.complete else "died"
                logger.warning(
                    "retrying request %s: its replica %s",
                    self.id,
                    reason,
                    extra={"request_id": self.id},
                )
                note("retry", reason=reason, tries=number)
                await asyncio.sleep(pause)
                pause *= 2
        await self._fail()

    async def _fail(self) -> None:
        current_entry().logged = False
        if self._expired():
            error: APIError = self.timeout()
        elif self.stream is not None:
            error = UnavailableError(
                "the replica that wrote this died, and no other could continue it: send the "
                "request again",
                code="stream_interrupted",
            )
        else:
            error = UnavailableError(
                f"{MAX_TRIES} replicas died while they worked on this request",
                code="replica_died",
            )
        if self.stream is not None:
            await self._end_stream(error)
        else:
            await self.send_error(error)

    async def _end_stream(self, error: APIError) -> None:
        await self._send({"type": "http.response.body", "body": error_events(error)})

    async def send_error(self, error: APIError) -> None:
        await error_response(error)(self._scope, self._receive, self._send)

    async def start_stream(self, start: Message) -> EventStream:
        """The client's stream: begun, or continued."""
        current_entry().logged = True
        if self.stream is None:
            self.stream = EventStream()
            await self._send(start)
        else:
            self.stream.restart()
        return self.stream

    async def send(self, message: Message) -> None:
        await self._send(message)

    async def routed(self) -> bool:
        """Whether Serve routes to any application, by its own `/-/routes`."""
        path = "/-/routes"
        scope = {**self._scope, "method": "GET", "path": path, "raw_path": path.encode()}
        status, body = 0, b""

        async def take(message: Message) -> None:
            nonlocal status, body
            status = message.get("status", status)
            body += message.get("body", b"")

        await self._app(scope, self._input(), take)
        return status == HTTPStatus.OK and bool(json.loads(body))

    def timeout(self) -> APIError:
        limit = "its limit" if self._limit_seconds is None else f"{self._limit_seconds:g} seconds"
        return RequestTimeoutError(f"the request took more than {limit}")

    def end_try(self) -> None:
        """Abandon this try by signalling a disconnect to the replica."""
        self._ended.set()

    @property
    def path(self) -> str:
        return str(self._scope["path"])

    def _expired(self) -> bool:
        # Slightly less, since Serve measures separately.
        return self._limit_seconds is not None and self._elapsed() > 0.99 * self._limit_seconds

    def _elapsed(self) -> float:
        return time.monotonic() - self._start

    def _scope_of_try(self, number: int) -> Scope:
        """A copy of the scope, since Serve modifies it."""
        headers = list(self._headers)
        if number > 1:
            headers = without_routing(headers)  # which would choose the same replica again
        if number > 1 and self._limit_seconds is not None:
            left = f"{max(0.001, self._limit_seconds - self._elapsed()):.3f}".encode()
            headers = [each for each in headers if each[0] != TIMEOUT] + [(TIMEOUT, left)]
        return {**self._scope, "headers": headers}

    def _input(self) -> Receive:
        """A receive function: the body, then only the client's disconnect."""
        pending: list[Message] = [{"type": "http.request", "body": self._body, "more_body": False}]

        async def receive() -> Message:
            if pending:
                return pending.pop()
            if self.stream is not None:  # continuing it may fail
                return await self._left_or_ended()
            return await self._until_left()

        return receive

    async def _until_left(self) -> Message:
        while (message := await self._receive())["type"] != "http.disconnect":
            pass
        self._left = True
        return message

    async def _left_or_ended(self) -> Message:
        left = asyncio.ensure_future(self._until_left())
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait((left, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            ended.cancel()
        return {"type": "http.disconnect"}


class Reply:
    """A replica's reply to one try: held back until complete, unless it is a stream."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._start: Message | None = None
        self._parts: list[bytes] = []
        self._stream: EventStream | None = None
        self.complete = False
        self.sent = False  # completely
        self.diverged = False  # from the stream that the client has

    @property
    def status(self) -> int | None:
        return None if self._start is None else int(self._start["status"])

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            if self.status == 200 and self._type().startswith(b"text/event-stream"):
                self._stream = await self._exchange.start_stream(message)
        elif message["type"] == "http.response.body":
            more = message.get("more_body", False)
            self.complete = not more
            if self._stream is not None:
                await self._stream_on(message.get("body", b""), more)
            else:
                self._parts.append(message.get("body", b""))
                if not more:
                    await self._send_whole()

    async def _stream_on(self, data: bytes, more: bool) -> None:
        assert self._stream is not None
        if self.diverged:
            return
        try:
            events = self._stream.feed(data)
            if not more:
                events += self._stream.finish()
        except DivergedError:
            self.diverged = True
            self._exchange.end_try()
            return
        if events or not more:
            await self._exchange.send(
                {"type": "http.response.body", "body": events, "more_body": more}
            )
        self.sent = not more

    async def _send_whole(self) -> None:
        if self._exchange.stream is not None:
            return  # refused, after a stream had begun
        assert self._start is not None
        self.sent = True
        if self._from_serve():
            await self._exchange.send_error(await self.error())
            return
        current_entry().logged = True
        await self._exchange.send(self._start)
        await self._exchange.send({"type": "http.response.body", "body": b"".join(self._parts)})

    def _type(self) -> bytes:
        return self._header(b"content-type") or b""

    def _header(self, wanted: bytes) -> bytes | None:
        assert self._start is not None
        found = (value for name, value in self._start["headers"] if name.lower() == wanted)
        return next(found, None)

    def _from_serve(self) -> bool:
        """Whether Serve itself answered: our services send no errors in plain text."""
        return (self.status or 0) >= 400 and self._type().startswith(b"text/plain")

    async def error(self) -> APIError:
        """Our error for one of Serve's own replies."""
        retry = self._header(b"retry-after")
        headers = {} if retry is None else {"Retry-After": retry.decode("latin-1")}
        status = self.status
        if status == HTTPStatus.NOT_FOUND:
            if not await self._exchange.routed():
                # After the head's restart, until Serve has deployed the applications again.
                return UnavailableError("no application is deployed yet: try again later")
            message = f"no application serves {self._exchange.path:.200}: see /-/routes"
            return NotFoundError(message, code="unknown_url")
        if status == HTTPStatus.REQUEST_TIMEOUT:
            return self._exchange.timeout()
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            return OverloadedError("the service is full: try again later", headers=headers)
        if status is not None and status < 500:
            return InvalidRequestError(f"the request was refused with status {status}")
        return UnavailableError(
            "the service has no replica for this request at the moment", headers=headers
        )


def _limit(header: bytes | None, configured: float | None) -> tuple[float | None, bool]:
    """The request's limit in seconds, and whether the client's header shortened it."""
    try:
        seconds = float(header or b"0")
    except ValueError:
        seconds = 0.0
    if seconds > 0 and (configured is None or seconds < configured):
        return seconds, True
    return configured, False

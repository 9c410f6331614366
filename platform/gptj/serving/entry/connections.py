"""uvicorn's HTTP connection with timeouts, bounds on slow clients, and fast rejections.

uvicorn itself waits forever for the rest of a head or body, and for a client to read.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import uuid
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from gptj.serialization.json_object import to_json
from gptj.serving.entry.admission import FULL, Gate
from gptj.serving.errors import (
    APIError,
    HeadTooLargeError,
    InvalidRequestError,
    RequestTimeoutError,
)
from gptj.serving.middleware.observing import HEADER as REQUEST_ID

# Requests with these headers are left to the middleware, which interprets them.
NOT_REFUSED_HERE = frozenset((b"expect", b"origin", b"upgrade", b"x-request-timeout-seconds"))
READ_SECONDS = 0.01  # enough for the loop to poll its sockets again
WAIT_SECONDS = 1.0  # what Retry-After tells a refused client, see OverloadedError
# Unsent bytes that the system holds for a connection, and then this process, before it counts as
# unread. The system's default is megabytes: whole streams, which nobody may ever read.
UNSENT_BYTES = 8192


def error_bytes(error: APIError) -> bytes:
    """The rest of a reply after its status and other headers."""
    content = to_json(error.body(), ensure_ascii=True).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(content)),
        **error.headers,
    }
    lines = b"".join(f"{name.lower()}: {value}\r\n".encode() for name, value in headers.items())
    return b"%b\r\n%b" % (lines, content)


REFUSAL = error_bytes(FULL)


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of one server process."""

    # Of a request's head, the first line and trailers included: as much as other servers take.
    head_bytes: int = 65_536
    head_fields: int = 128
    head_seconds: float = 20.0  # to send a request's head; the first counts from connecting
    body_seconds: float = 60.0  # to send its body
    unread_seconds: float = 30.0  # for a client to read some of its reply, again and again
    close_seconds: float = 5.0  # to read the rest of it before the connection is cut
    # Half-sent requests. Beyond either bound the oldest are dropped, except those younger than
    # `grace_seconds`, which may be part of a burst of whole requests.
    unfinished: int = 4096
    unfinished_per_address: int = 512
    grace_seconds: float = 2.0
    # Connections whose client does not read its reply; likewise.
    unread: int = 512
    unread_per_address: int = 64
    # Before a connection's next refusal, if its client did not wait as Retry-After says: to refuse
    # at once, again and again, takes time from answers. 0: none.
    impatient_seconds: float = 0.25


class Timer:
    """Calls a function after some seconds, once all data that arrived by then has been read.

    A lagging loop may run timers before polling its sockets (uvloop does), and must not time out
    requests that arrived long ago.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        seconds: float,
        function: Callable[..., None],
        *arguments: Any,
    ) -> None:
        self._loop = loop
        self._call = partial(function, *arguments)
        self._handle = loop.call_later(seconds, self._due)

    def cancel(self) -> None:
        self._handle.cancel()

    def _due(self) -> None:
        self._handle = self._loop.call_later(READ_SECONDS, self._call)


@dataclass
class Waiting:
    """Connections that wait for their client, oldest first; too old ones of too many are ended."""

    most: int
    most_per_address: int
    grace_seconds: float
    end: Callable[[LimitedProtocol], None]
    _all: OrderedDict[LimitedProtocol, float] = field(default_factory=OrderedDict)
    _by_address: defaultdict[str, OrderedDict[LimitedProtocol, float]] = field(
        default_factory=lambda: defaultdict(OrderedDict)
    )
    _sweeping: bool = False  # a sweep is scheduled

    def __len__(self) -> int:
        return len(self._all)

    def add(self, connection: LimitedProtocol, loop: asyncio.AbstractEventLoop) -> None:
        if connection in self._all:
            return
        address = self._by_address[connection.address]
        self._all[connection] = address[connection] = loop.time()
        if len(address) > self.most_per_address or len(self._all) > self.most:
            self._sweep_later(loop)

    def discard(self, connection: LimitedProtocol) -> None:
        if self._all.pop(connection, None) is None:
            return
        address = self._by_address[connection.address]
        del address[connection]
        if not address:
            del self._by_address[connection.address]

    def _sweep_later(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._sweeping:
            self._sweeping = True
            Timer(loop, self.grace_seconds, self._sweep, loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._sweeping = False
        excess = [
            *((list(each.items()), self.most_per_address) for each in self._by_address.values()),
            (list(self._all.items()), self.most),
        ]
        for connections, most in excess:
            if len(connections) > most:
                self._end(connections[: len(connections) - most], loop.time())
                self._sweep_later(loop)  # for those that were too young

    def _end(self, oldest: Iterable[tuple[LimitedProtocol, float]], now: float) -> None:
        for connection, since in oldest:
            if connection in self._all and now - since >= self.grace_seconds:
                self.end(connection)


def half_sent(limits: ConnectionLimits) -> Waiting:
    """For connections with a half-sent request."""
    reason = "too many requests are half sent, and this is the oldest"
    return Waiting(
        limits.unfinished,
        limits.unfinished_per_address,
        limits.grace_seconds,
        lambda connection: connection.give_up(reason),
    )


def not_read(limits: ConnectionLimits) -> Waiting:
    """For connections with a reply that is not read."""
    return Waiting(
        limits.unread,
        limits.unread_per_address,
        limits.grace_seconds,
        lambda connection: connection.check_reading(),
    )


class LimitedProtocol(HttpToolsProtocol):
    """One connection. Errors that uvicorn would answer in plain text have our body.

    While a route is full, its POST requests are rejected here, cheaper than by Admission, so that
    clients that retry immediately do not slow down those being served.
    """

    gate: Gate | None = None
    limits = ConnectionLimits()
    unfinished = half_sent(limits)  # of the process, as is the next
    unread = not_read(limits)

    @classmethod
    def limited(cls, limits: ConnectionLimits) -> type[LimitedProtocol]:
        """A subclass with its own limits and count."""
        own = {"limits": limits, "unfinished": half_sent(limits), "unread": not_read(limits)}
        return type(cls.__name__, (cls,), own)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: Timer | None = None  # of the arriving head or body
        self._reading: Timer | None = None  # while the client does not read
        self._pending_bytes = 0  # of the reply, when that began
        self._phase = "head"
        self._head_bytes = self._head_fields = 0  # parsed
        # Received since the parser last reported something (a lower bound).
        self._unparsed_bytes = 0
        self._running: RequestResponseCycle | None = None  # `cycle` may be one that waits for it
        self._failure: APIError | None = None  # to send after the replies to earlier requests
        self._refusing = False  # reject the current request once its body has arrived
        self._refused_at = float("-inf")
        self._pending: tuple[bytes, bool, asyncio.TimerHandle] | None = None  # a refusal

    @property
    def address(self) -> str:
        """The client's, or the load balancer's."""
        return self.client[0] if self.client else ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=UNSENT_BYTES)
        connected = transport.get_extra_info("socket")
        if connected is not None and connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self._await_rest("head", self.limits.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self._request_arrived()
        self._reads_on()
        if self._pending is not None:
            self._pending[-1].cancel()
            self._pending = None
        super().connection_lost(exc)

    def shutdown(self) -> None:
        self._refuse_now()
        super().shutdown()

    def eof_received(self) -> None:
        self._refuse_now()

    def data_received(self, data: bytes) -> None:
        if self._failure is not None:
            return
        self._unparsed_bytes += len(data)
        super().data_received(data)
        if self._deadline is not None:
            if self._unparsed_bytes > self.limits.head_bytes:
                self._fail(self._head_too_large())  # a line without an end
        elif self._is_idle():  # after blank lines, which end the time that it may stay open
            self.url = b""
            self._await_rest("head", self.limits.head_seconds)

    def _is_idle(self) -> bool:
        return not (
            self._answering()
            or self._pending is not None
            or self.pipeline
            or self.timeout_keep_alive_task is not None
            or self.transport.is_closing()
        )

    def _answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        if self._failure is None or self.pipeline or self.transport.is_closing():
            super().on_response_complete()
        else:
            self._refuse(self._failure)

    def on_message_begin(self) -> None:
        self._refuse_now()
        self._unset_keepalive_if_required()  # which the refusal may have begun
        super().on_message_begin()
        self._head_bytes = self._head_fields = self._unparsed_bytes = 0
        self._await_rest("head", self.limits.head_seconds)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._head_fields += 1
        self._count(len(name) + len(value))

    def on_chunk_header(self) -> None:
        self._unparsed_bytes = 0

    def _count(self, size: int) -> None:
        """Raises HeadTooLargeError, upon which the parser stops: see send_400_response."""
        self._unparsed_bytes = 0
        self._head_bytes += size
        if self._head_bytes > self.limits.head_bytes or self._head_fields > self.limits.head_fields:
            raise self._head_too_large()

    def _head_too_large(self) -> HeadTooLargeError:
        return HeadTooLargeError(
            f"the request's first line and headers are larger than {self.limits.head_bytes} bytes "
            f"or have more than {self.limits.head_fields} fields"
        )

    def on_headers_complete(self) -> None:
        self._unparsed_bytes = 0
        self._await_rest("body", self.limits.body_seconds)
        self._refusing = self._is_refused()
        if not self._refusing:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        if not self._refusing:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._request_arrived()
        if not self._refusing:
            super().on_message_complete()
            return
        self._refusing = False
        keeps = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        own = [(REQUEST_ID, self._request_id()), *([] if keeps else [(b"connection", b"close")])]
        lines = [*self.server_state.default_headers, *own]
        head = b"".join(b"%b: %b\r\n" % line for line in lines)
        reply = b"".join([STATUS_LINE[429], head, REFUSAL])
        now = self.loop.time()
        impatient = now - self._refused_at < WAIT_SECONDS
        self._refused_at = now
        seconds = self.limits.impatient_seconds if impatient else 0.0
        self._pending = reply, keeps, self.loop.call_later(seconds, self._refuse_now)
        if not seconds:
            self._refuse_now()

    def _refuse_now(self) -> None:
        """Send the pending refusal, if any: replies have the order of their requests."""
        if self._pending is None:
            return
        reply, keeps, timer = self._pending
        timer.cancel()
        self._pending = None
        self.transport.write(reply)
        if keeps:
            self.on_response_complete()
        else:
            self._close()

    def _is_refused(self) -> bool:
        """Whether the head suffices to reject the request; otherwise Admission decides."""
        if self.gate is None or self.parser.get_method() != b"POST":
            return False
        if self.cycle is not None and not self.cycle.response_complete:
            return False  # pipelined behind an unfinished request
        if self.flow.write_paused:
            return False  # the client is not reading: uvicorn stops reading from it
        if any(name in NOT_REFUSED_HERE for name, _ in self.headers):
            return False
        path = self.url.partition(b"?")[0].rstrip(b"/")
        if b"%" in path or not path.startswith(b"/") or path.endswith(b"/health"):
            return False
        if not self.gate.full(path.decode("latin-1")):
            return False
        self.gate.note_refusal()
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reading is None:
            self._await_reading()

    def resume_writing(self) -> None:
        self._reads_on()
        super().resume_writing()

    def check_reading(self) -> None:
        """Cut the connection, unless its client has read some of the reply since the last check."""
        self._reads_on()
        if self.transport.get_write_buffer_size() < self._pending_bytes:
            self._await_reading()
        else:
            self._cut()

    def _await_reading(self) -> None:
        self._pending_bytes = self.transport.get_write_buffer_size()
        self._reading = Timer(self.loop, self.limits.unread_seconds, self.check_reading)
        self.unread.add(self, self.loop)

    def _reads_on(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        self.unread.discard(self)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._cut_later()

    def send_400_response(self, msg: str) -> None:
        raised = sys.exception()
        if raised is not None and isinstance(raised.__context__, HeadTooLargeError):
            self._fail(raised.__context__)
            return
        error = InvalidRequestError(
            "this is not a valid HTTP/1.1 request: check its first line, headers and framing",
            code="invalid_http",
        )
        self._fail(error)

    def _fail(self, error: APIError) -> None:
        """Answer what cannot be read in its turn, and close: where the next begins is unknown."""
        self._request_arrived()
        self._refuse_now()
        if not self._answering():
            self._refuse(error)
        elif self._running is self.cycle and self.cycle.more_body:  # it is this request's body
            if self.cycle.response_started:
                self._cut()
            else:
                self._refuse(error)
        else:
            if self.pipeline and self.cycle.more_body:
                self.pipeline.popleft()  # this request, whose body never arrives
            self._failure = error
            self.flow.pause_reading()

    def give_up(self, reason: str) -> None:
        """End a half-sent request."""
        self._request_arrived()
        if self.transport.is_closing():
            return
        answered = self.cycle is not None and self.cycle.response_complete
        if self._phase == "body" and answered and self.cycle.more_body:
            self._close()  # already answered
        elif self._phase == "head" and not getattr(self, "url", b""):
            self._close()  # nothing was sent, so there is nothing to answer
        else:
            self._fail(RequestTimeoutError(f"the request was not sent to its end: {reason}"))

    def _await_rest(self, phase: str, seconds: float) -> None:
        self._phase = phase
        if self._deadline is not None:
            self._deadline.cancel()
        reason = f"its {phase} took more than {seconds:g} seconds"
        self._deadline = Timer(self.loop, seconds, self.give_up, reason)
        self.unfinished.add(self, self.loop)

    def _request_arrived(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self.unfinished.discard(self)

    def _refuse(self, error: APIError) -> None:
        id_ = b"%b: %b\r\n" % (REQUEST_ID, self._request_id())
        head = [STATUS_LINE[error.status], id_, b"connection: close\r\n"]
        self.transport.write(b"".join([*head, error_bytes(error)]))
        self._close()

    def _request_id(self) -> bytes:
        """The client's, if its head came so far; otherwise a new one."""
        headers = self.headers or []  # None before the first request
        given = next((value for name, value in headers if name == REQUEST_ID), b"")
        return given if given and given.isascii() else str(uuid.uuid4()).encode()

    def _close(self) -> None:
        """Close once the client has read the pending reply, or after close_seconds."""
        self._request_arrived()
        self.transport.close()
        self._cut_later()

    def _cut_later(self) -> None:
        self.loop.call_later(self.limits.close_seconds, self._cut)

    def _cut(self) -> None:
        """Close now; the request's work is cancelled."""
        self.transport.abort()

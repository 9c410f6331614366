"""The layer before the replicas: retries, resumed streams, limits of slow clients, admission."""

from __future__ import annotations

import asyncio
import json
import re
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from http_server import listening
from serving_client import assert_error, complete, streamed
from serving_models import Models, applications, mounted
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from test_serving_edge import BODY, Reply, request

from gptj.serving.entry import connections, event_stream
from gptj.serving.entry.admission import MAX_KNOWN, Admission, Gate
from gptj.serving.entry.backstop import Backstop
from gptj.serving.entry.connections import UNSENT_BYTES, ConnectionLimits, LimitedProtocol
from gptj.serving.entry.event_stream import DivergedError, EventStream
from gptj.serving.entry.failover import MAX_TRIES, Failover
from gptj.serving.entry.request_ids import RequestIds
from gptj.serving.errors import OverloadedError, error_response
from gptj.serving.middleware.edge import Edge
from gptj.serving.middleware.limits import BodyLimit
from gptj_bench import slow_clients

pytest_plugins = ["serving_fixtures"]

Dies = Callable[[int], int | None]  # by the number of a try: after how many messages it dies


class Replicas:
    """Stands for Serve: replicas that die, or a refusal of Serve's own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.dies: Dies = lambda number: None
        self.answers: Callable[[int], tuple[int, bytes] | None] = lambda number: None
        self.request_timeout_s: float | None = None
        self.routes = (200, b'{"/v1": "text_generation"}')
        self.tries = 0
        self.replies: list[bytes] = []  # what each try wrote, sent on or not

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/-/routes":
            await _plain(self.routes, send)
            return
        number, self.tries = self.tries, self.tries + 1
        if (answer := self.answers(number)) is not None:
            await _plain(answer, send)
            return
        left = self.dies(number)
        self.replies.append(b"")

        async def until_death(message: Message) -> None:
            nonlocal left
            self.replies[-1] += message.get("body", b"")
            if left is not None:
                left -= 1
                if left < 0:
                    return
            await send(message)

        await self._app(scope, receive, until_death)


async def _plain(answer: tuple[int, bytes], send: Send) -> None:
    """As Serve answers itself."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"retry-after", b"7")]
    await send({"type": "http.response.start", "status": answer[0], "headers": headers})
    await send({"type": "http.response.body", "body": answer[1]})


@pytest.fixture(scope="module")
def replicas(models: Models) -> Iterator[Replicas]:
    with ExitStack() as stack:
        apps: dict[str, ASGIApp] = {**stack.enter_context(applications(models))}
        yield Replicas(mounted(apps))


@pytest.fixture(scope="module")
def address(replicas: Replicas) -> Iterator[str]:
    entry = Edge(BodyLimit(Admission(Failover(replicas, lambda app: 30.0))))
    with listening(RequestIds(entry), LimitedProtocol) as address:
        yield address


@pytest.fixture
def calm(replicas: Replicas, address: str) -> Iterator[str]:
    """The address; each test's dead replicas are reset after it."""
    replicas.tries, replicas.replies = 0, []
    yield address
    replicas.dies = lambda number: None
    replicas.answers = lambda number: None


def test_a_request_whose_replica_died_is_retried_on_another(replicas: Replicas, calm: str) -> None:
    undisturbed = complete(calm, prompt="The tower", max_tokens=8)
    for messages in (0, 1):  # before the reply, and in it
        replicas.tries = 0
        replicas.dies = lambda number, messages=messages: None if number else messages  # type: ignore[misc]
        reply = complete(calm, prompt="The tower", max_tokens=8)
        assert replicas.tries == 2
        assert reply["choices"] == undisturbed["choices"]


@pytest.mark.parametrize("fields", [{"n": 2}, {"prompt": ["The tower", "The tower"]}])
def test_a_retry_has_the_same_seed(replicas: Replicas, calm: str, fields: dict[str, Any]) -> None:
    """Even if the client gave none; a request's samples differ from each other."""
    replicas.dies = lambda number: None if number else 0
    reply = complete(calm, **{"prompt": "x", "temperature": 1, "max_tokens": 16, **fields})
    first, second = (json.loads(each) for each in replicas.replies)
    assert first["choices"] == second["choices"] == reply["choices"]
    assert first["id"] == second["id"]
    texts = [choice["text"] for choice in reply["choices"]]
    assert texts[0] != texts[1]
    replicas.dies = lambda number: None
    again = complete(calm, **{"prompt": "x", "temperature": 1, "max_tokens": 16, **fields})
    assert again["choices"] != reply["choices"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 1, "n": 2, "seed": 5},
        {"temperature": 0, "logprobs": 2, "echo": True},
        {"temperature": 0, "return_token_ids": True},
        {"temperature": 0, "stream_options": {"include_usage": True}, "prompt": "東京 is far 😀"},
    ],
)
def test_a_stream_resumes_where_its_replica_died(
    replicas: Replicas, calm: str, fields: dict[str, Any]
) -> None:
    fields = {"prompt": "The tower", "max_tokens": 12, "ignore_eos": True, **fields}
    undisturbed = streamed(calm, **fields)
    for messages in (1, 2, 4, 9):  # the first is the reply's head
        replicas.tries = 0
        replicas.dies = lambda number, messages=messages: None if number else messages  # type: ignore[misc]
        assert streamed(calm, **fields) == undisturbed
        assert replicas.tries == 2 or messages > 2  # on a slow machine there are fewer chunks


def test_a_sampled_stream_without_a_seed_resumes(replicas: Replicas, calm: str) -> None:
    replicas.dies = lambda number: 2 + number if number < 2 else None
    (choice,) = streamed(calm, prompt="x", temperature=1, max_tokens=12, ignore_eos=True)
    written = [json.loads(line[6:]) for line in replicas.replies[-1].decode().split("\n\n")[:-2]]
    assert choice["text"] == "".join(chunk["choices"][0]["text"] for chunk in written)
    assert choice["finish_reason"] == "length"


@pytest.mark.slow
def test_a_stream_that_cannot_resume_ends_with_an_error(replicas: Replicas, calm: str) -> None:
    replicas.dies = lambda number: 2
    # More tokens than a message has, even on a busy machine, which sends several together.
    body = {"prompt": "x", "max_tokens": 200, "stream": True, "ignore_eos": True}
    reply = httpx.post(f"{calm}/v1/completions", json=body, timeout=30)
    *_, error, done, end = reply.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert json.loads(error[6:])["error"]["code"] == "stream_interrupted"
    assert replicas.tries == MAX_TRIES
    # One that is refused by the others, for lack of room.
    replicas.tries = 0
    replicas.answers = lambda number: (429, b"full") if number else None
    reply = httpx.post(f"{calm}/v1/completions", json=body, timeout=30)
    *_, error, done, end = reply.text.split("\n\n")
    assert json.loads(error[6:])["error"]["type"] == "rate_limit_error"


def test_a_stream_that_only_lacks_its_end_is_ended_without_a_retry() -> None:
    """Its replica died between the last event and the end of the reply."""

    async def dies_at_the_end(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in (b'data: {"choices": []}\n\n', b"data: [DONE]\n\n"):
            await send({"type": "http.response.body", "body": event, "more_body": True})

    with listening(RequestIds(Failover(dies_at_the_end))) as service:
        reply = httpx.get(service, timeout=20)
    assert reply.text == 'data: {"choices": []}\n\ndata: [DONE]\n\n'


def test_a_retried_stream_that_differs_is_not_mixed_into_the_first() -> None:
    def event(text: str, **fields: Any) -> bytes:
        choice = {"index": 0, "text": text, "finish_reason": None, **fields}
        return f"data: {json.dumps({'id': 'a', 'choices': [choice]})}\n\n".encode()

    stream = EventStream()
    assert stream.feed(event("one ") + event("two ")[:9]) == event("one ")
    stream.restart()
    assert stream.feed(event("on")) == b""
    rest = stream.feed(event("e and"))
    assert json.loads(rest[6:])["choices"][0]["text"] == "and"
    for other in (event("two"), event("o", finish_reason="stop")):
        stream.restart()
        with pytest.raises(DivergedError):
            stream.feed(other)


@pytest.mark.parametrize(
    "parts",
    [
        [b"data: {not JSON}\n\n", b"data: 1\n\n"],
        [b'data: {"choices": [{"no": "index"}]}\n\n', b'data: {"choices": [1]}\n\n'],
        [b'data: {"choices": 1}\r\n\r\n', b"data: the end"],
    ],
)
def test_other_applications_streams_pass_unchanged(parts: list[bytes]) -> None:
    """Serve's proxies have one entry for all applications."""
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    asyncio.run(Failover(app)(scope, receive, send))
    assert b"".join(message.get("body", b"") for message in sent) == b"".join(parts)
    assert not sent[-1].get("more_body", False)


@pytest.mark.parametrize(
    ("first", "second"),
    [("\n", "\n"), ("\r\n", "\r\n"), ("\r", "\r"), ("\r\n", "\n"), ("\n", "\r")],
)
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_an_event_is_sent_on_as_soon_as_it_is_complete(first: str, second: str, size: int) -> None:
    """Whatever ends its lines, and wherever the stream is cut."""
    end = first + second
    text = "".join(f"event: x{first}data: {number}{end}" for number in range(3)).encode()
    stream = EventStream()
    received = sent = b""
    for start in range(0, len(text), size):
        part = text[start : start + size]
        received += part
        sent += stream.feed(part)
        assert received.startswith(sent)
        whole = received.rpartition(end.encode())
        assert len(sent) >= len(whole[0] + whole[1])
    assert sent == text
    assert stream.finish() == b""


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
def test_the_end_of_a_stream_is_recognized_by_any_end_of_line(end: bytes) -> None:
    stream = EventStream()
    assert stream.feed(b"data: [DONE]" + end) == b"data: [DONE]" + end
    assert stream.done


def test_an_event_without_an_end_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MAX_EVENT_BYTES", 1000)
    stream = EventStream()
    parts = [b"data: " + b"x" * 500, b"x" * 700, b"\r", b"\n\r\n", b"data: the next\n\n"]
    held = 0
    sent = b""
    for part in parts:
        sent += stream.feed(part)
        held = max(held, len(stream._partial))
    assert sent == b"".join(parts)
    assert held <= 1000
    stream.restart()
    with pytest.raises(DivergedError):
        stream.feed(b"x" * 1001)


def test_another_applications_events_are_not_repeated_by_a_retry() -> None:
    for event in (b"data: a text\n\n", b"event: x\r\ndata: {}\r\n\r\n", b'data: "error"\n\n'):
        stream = EventStream()
        assert stream.feed(event) == event
        stream.restart()
        assert stream.feed(b": a comment\n\n") == b": a comment\n\n"
        with pytest.raises(DivergedError):
            stream.feed(event)


def test_chat_streams_resume_too() -> None:
    def event(**delta: Any) -> bytes:
        chunk = {"id": "a", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        return f"data: {json.dumps(chunk)}\n\n".encode()

    stream = EventStream()
    stream.feed(event(role="assistant", content="") + event(content="Hel"))
    stream.restart()
    assert stream.feed(event(role="assistant", content="")) == b""
    rest = stream.feed(event(content="Hello"))
    assert json.loads(rest[6:])["choices"][0]["delta"] == {"content": "lo"}
    ids = {"index": 0, "text": "", "finish_reason": None, "token_ids": [4, 5]}
    chunk = f"data: {json.dumps({'id': 'a', 'choices': [ids]})}\n\n".encode()
    longer = chunk.replace(b"[4, 5]", b"[4, 5, 6]")
    stream = EventStream()
    stream.feed(chunk)
    stream.restart()
    assert json.loads(stream.feed(longer)[6:])["choices"][0]["token_ids"] == [6]
    stream = EventStream()
    stream.feed(event(tool_calls=[{"index": 0}]))
    stream.restart()
    with pytest.raises(DivergedError):
        stream.feed(event(tool_calls=[{"index": 0}]))


def test_if_every_replica_dies_the_client_is_told_to_retry(replicas: Replicas, calm: str) -> None:
    replicas.dies = lambda number: 0
    for path in ("/v1/completions", "/classification"):
        replicas.tries = 0
        reply = httpx.post(calm + path, json={"prompt": "x", "max_tokens": 2}, timeout=30)
        assert_error(reply, 503, "replicas died")
        assert reply.headers["retry-after"]
        assert replicas.tries == MAX_TRIES


@pytest.mark.parametrize(
    ("status", "ours", "reason"),
    [
        (404, 404, "no application serves /v1/completions: see /-/routes"),
        (408, 408, "more than 30 seconds"),
        (429, 429, "full"),
        (500, 503, "no replica"),
        (503, 503, "no replica"),
    ],
)
def test_serves_own_errors_have_our_body(
    replicas: Replicas, calm: str, status: int, ours: int, reason: str
) -> None:
    replicas.answers = lambda number: (status, b"Serve's own words")
    headers = {"X-Request-Id": "an-id"}
    reply = httpx.post(f"{calm}/v1/completions", content=BODY, headers=headers, timeout=30)
    assert_error(reply, ours, reason)
    assert reply.headers["x-request-id"] == "an-id"
    if ours in (429, 503):
        assert reply.headers["retry-after"] == "7"
    assert replicas.tries == 1


@pytest.mark.parametrize("routes", [(503, b"Route table is not populated yet."), (200, b"{}")])
def test_until_an_application_is_deployed_a_client_is_told_to_retry(
    replicas: Replicas, calm: str, monkeypatch: pytest.MonkeyPatch, routes: tuple[int, bytes]
) -> None:
    monkeypatch.setattr(replicas, "routes", routes)
    replicas.answers = lambda number: (404, b"Path '/v1/completions' not found.")
    reply = httpx.post(f"{calm}/v1/completions", content=BODY, timeout=30)
    assert_error(reply, 503, "no application is deployed yet")
    assert reply.headers["retry-after"]
    # A stream that has begun.
    replicas.dies, replicas.tries = (lambda number: 4), 0
    replicas.answers = lambda number: (
        (404, b"Path '/v1/completions' not found.") if number else None
    )
    body = {"prompt": "x", "max_tokens": 12, "stream": True, "ignore_eos": True}
    reply = httpx.post(f"{calm}/v1/completions", json=body, timeout=30)
    *_, error, _, _ = reply.text.split("\n\n")
    assert "no application is deployed yet" in json.loads(error[6:])["error"]["message"]


def test_a_time_limit_covers_all_tries_together(replicas: Replicas, calm: str) -> None:
    replicas.dies = lambda number: 0
    headers = {"X-Request-Timeout-Seconds": "0.05"}
    reply = httpx.post(f"{calm}/v1/completions", content=BODY, headers=headers, timeout=30)
    assert_error(reply, 408, "more than 0.05 seconds")


# Slow and hostile clients

QUICK = ConnectionLimits(
    head_seconds=0.6,
    body_seconds=0.6,
    unread_seconds=0.6,
    close_seconds=0.2,
    unfinished_per_address=20,
    grace_seconds=0.2,
    unread_per_address=3,
)


@pytest.fixture(scope="module")
def hasty(replicas: Replicas) -> Iterator[str]:
    """The same, with little patience."""
    entry = Edge(BodyLimit(Admission(Failover(replicas))))
    with listening(RequestIds(entry), LimitedProtocol.limited(QUICK)) as address:
        yield address


def connect(service: str) -> socket.socket:
    address = urlsplit(service)
    assert address.hostname
    return socket.create_connection((address.hostname, address.port), timeout=20)


def exchange(service: str, *parts: bytes) -> Reply:
    """Send bytes as they are; the server must answer and end the connection."""
    with connect(service) as connection:
        for part in parts:
            connection.sendall(part)
        content = b""
        while received := connection.recv(65536):
            content += received
    return Reply(content)


HALF_SENT = {
    "line": b"POST /v1/comp",
    "head": request(b"POST", b"/v1/completions")[:-2],
    "body": request(b"POST", b"/v1/completions", b"", BODY) + BODY[:5],
    "no body": request(b"POST", b"/classification", b"", BODY),
    "chunk": request(b"POST", b"/v1/completions", b"Transfer-Encoding: chunked\r\n") + b"5\r\nab",
}


@pytest.mark.parametrize("part", HALF_SENT.values(), ids=HALF_SENT)
def test_half_sent_requests_time_out(hasty: str, part: bytes) -> None:
    reply = exchange(hasty, part)
    assert_error(reply, 408, "was not sent to its end: its ")  # type: ignore[arg-type]
    assert reply.headers["connection"] == "close"
    assert reply.headers["x-request-id"]


def test_a_request_whose_body_is_late_gets_its_id_back(hasty: str) -> None:
    head = request(b"POST", b"/v1/completions", b"X-Request-Id: an-id\r\n", BODY)
    assert exchange(hasty, head).headers["x-request-id"] == "an-id"


def test_an_idle_connection_is_closed(hasty: str) -> None:
    with connect(hasty) as connection:
        assert connection.recv(1) == b""


@pytest.mark.parametrize("path", [b"/health", b"/classification/health/", b"/-/healthz"])
def test_health_never_waits_for_a_body(hasty: str, path: bytes) -> None:
    reply = exchange(hasty, request(b"POST", path, b"Content-Length: 1000\r\n"))
    assert reply.status_code in (404, 405)
    reply = exchange(hasty, request(b"GET", path, b"Content-Length: 1000\r\n"))
    assert reply.status_code in (200, 404)


@pytest.mark.parametrize(
    "content",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nH\xc3\xb6st: x\r\n\r\n",
        request(b"POST", b"/v1/completions", b"Content-Length: x\r\n"),
        request(b"POST", b"/v1/completions", b"Content-Length: 5\r\nContent-Length: 6\r\n"),
        request(
            b"POST", b"/v1/completions", b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"
        ),
        request(b"POST", b"/v1/completions", b"Transfer-Encoding: chunked\r\n") + b"xyz\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_invalid_http_gets_a_declared_error_at_once(address: str, content: bytes) -> None:
    """From a server whose patience is as long as in production."""
    started = time.monotonic()
    reply = exchange(address, content)
    assert_error(reply, 400, "not a valid HTTP/1.1 request")  # type: ignore[arg-type]
    assert reply.headers["x-request-id"]
    assert time.monotonic() - started < LimitedProtocol.limits.head_seconds / 2


LARGE = b"x" * 70_000
MANY = b"".join(b"x-%d: 1\r\n" % number for number in range(200))
CHUNKED = request(b"POST", b"/v1/completions", b"Transfer-Encoding: chunked\r\n")[:-2]


@pytest.mark.parametrize(
    "content",
    [
        request(b"GET", b"/health?" + LARGE),
        request(b"GET", b"/health", b"X: " + LARGE + b"\r\n"),
        request(b"GET", b"/health", MANY),
        CHUNKED + b"\r\n0\r\n" + MANY + b"\r\n",
        b"\r\n" * 35_000,
    ],
    ids=["target", "field", "fields", "trailers", "blank lines"],
)
def test_a_large_head_is_refused(address: str, content: bytes) -> None:
    reply = exchange(address, content)
    assert_error(reply, 431, "65536 bytes")  # type: ignore[arg-type]
    assert reply.headers["x-request-id"] and reply.headers["connection"] == "close"


@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        b"GET /health HTTP/1.1\r\n",
        b"GET /health HTTP/1.1\r\nX: ",
        CHUNKED + b"\r\n0\r\nX: ",
        CHUNKED + b"\r\n1;",
    ],
    ids=["target", "name", "field", "trailer", "chunk extension"],
)
def test_a_line_without_an_end_takes_no_memory(address: str, start: bytes) -> None:
    with connect(address) as connection:
        connection.sendall(start)
        with pytest.raises(ConnectionError):  # the server is gone, with what it has not read
            for _ in range(1000):
                connection.sendall(LARGE)


def test_a_head_below_the_limits_is_served_whatever_its_pieces(address: str) -> None:
    fields = b"".join(b"x-%d: %b\r\n" % (number, b"y" * 490) for number in range(120))
    content = request(b"GET", b"/health", fields + b"Connection: close\r\n")
    pieces = [content[at : at + 1000] for at in range(0, len(content), 1000)]
    assert exchange(address, *pieces).status_code == 200
    chunks = b"1\r\nx\r\n" * 20_000  # far more framing than body
    reply = exchange(
        address,
        request(
            b"POST",
            b"/v1/completions",
            b"Transfer-Encoding: chunked\r\nConnection: close\r\n",
        ),
        chunks + b"0\r\n\r\n",
    )
    assert_error(reply, 400, "JSON")  # type: ignore[arg-type]


@pytest.mark.parametrize("after", ["nothing", "a stream's beginning", "another beginning"])
def test_an_error_of_ours_is_never_plain_text(after: str) -> None:
    async def breaks(scope: Scope, receive: Receive, send: Send) -> None:
        if after != "nothing":
            kind = b"text/event-stream" if "stream" in after else b"application/json"
            headers = [(b"Content-Type", kind)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        raise ZeroDivisionError("ours")

    with listening(RequestIds(Backstop(breaks)), LimitedProtocol) as service:
        if after == "another beginning":
            with pytest.raises(httpx.RemoteProtocolError):
                httpx.get(service)
            return
        reply = httpx.get(service)
        assert reply.headers["x-request-id"]
        if after == "nothing":
            assert_error(reply, 500, "see its log")
        else:
            first, error, done, _ = reply.text.split("\n\n")
            assert (first, done) == ("data: 1", "data: [DONE]")
            assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"


async def slow_stream(scope: Scope, receive: Receive, send: Send) -> None:
    headers = [(b"content-length", b"8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"part", "more_body": True})
    await asyncio.sleep(0.5 if scope["path"] == "/stream" else 0)
    await send({"type": "http.response.body", "body": b"part"})


STREAM, NEXT = request(b"GET", b"/stream"), request(b"GET", b"/next")


@pytest.mark.slow
@pytest.mark.parametrize("between", [b"", NEXT, NEXT + NEXT], ids=["alone", "next", "two"])
@pytest.mark.parametrize(
    ("bad", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (request(b"GET", b"/", MANY), b"431"),
        (b"GET /half", b"408"),
        (request(b"POST", b"/half", b"", BODY), b"408"),
        (request(b"POST", b"/x", b"Transfer-Encoding: chunked\r\n") + b"xyz\r\n", b"400"),
    ],
    ids=["nonsense", "large", "half a head", "half a body", "bad chunk"],
)
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_errors_wait_for_the_replies_to_earlier_requests(
    between: bytes, bad: bytes, status: bytes, apart: bool
) -> None:
    """Within another reply an error would look like a part of it."""
    limits = ConnectionLimits(head_seconds=0.2, body_seconds=0.2)
    protocol = LimitedProtocol.limited(limits)
    with listening(slow_stream, protocol) as service, connect(service) as connection:
        content = b""
        if apart:
            connection.sendall(STREAM)
            while b"part" not in content:
                content += connection.recv(65536)
            connection.sendall(between + bad)
        else:
            connection.sendall(STREAM + between + bad)
        content += b"".join(iter(lambda: connection.recv(65536), b""))
    whole = 1 + between.count(b"/next")
    statuses = re.findall(rb"HTTP/1\.1 (\d+)", content)
    assert statuses == [b"200"] * whole + [status], content
    assert content.count(b"\r\n\r\npartpart") == whole


def test_a_client_that_leaves_is_noticed_behind_a_pipelined_request() -> None:
    left: list[str] = []

    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left.append(scope["path"])

    with listening(waits, LimitedProtocol) as service:
        with connect(service) as connection:
            connection.sendall(STREAM + NEXT)
            time.sleep(0.2)
        until(lambda: left == ["/stream"])


def test_blank_lines_do_not_keep_a_connection_open() -> None:
    protocol = LimitedProtocol.limited(ConnectionLimits(head_seconds=0.3))
    with (
        listening(slow_stream, protocol, keep_alive_seconds=60) as service,
        connect(service) as connection,
    ):
        connection.sendall(NEXT)
        content = b""
        while not content.endswith(b"partpart"):
            content += connection.recv(65536)
        connection.sendall(b"\r\n")
        assert connection.recv(65536) == b""


def test_half_sent_requests_do_not_block_others(replicas: Replicas) -> None:
    """And the oldest connection of an address with too many is dropped first."""
    limits = ConnectionLimits(unfinished_per_address=100, grace_seconds=0.1)
    protocol = LimitedProtocol.limited(limits)
    entry = Edge(BodyLimit(Admission(Failover(replicas), Gate(max_in_flight=4))))
    with listening(RequestIds(entry), protocol) as service, ExitStack() as stack:
        held = []
        for number in range(200):
            held.append(stack.enter_context(connect(service)))
            held[-1].sendall(list(HALF_SENT.values())[number % len(HALF_SENT)])
            if number == 100:
                time.sleep(0.3)
        assert complete(service, prompt="x", max_tokens=2)["choices"]
        assert httpx.get(f"{service}/health", timeout=20).status_code == 200
        assert b"408 Request Timeout" in held[0].recv(65536)
        assert b"too many requests are half sent" in held[1].recv(65536)
        held[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            held[-1].recv(1)


@pytest.mark.slow
def test_slow_clients_do_not_cost_others_requests(hasty: str) -> None:
    """The script that shows it with 2,000 of each kind, run with a few."""
    outcomes = asyncio.run(slow_clients.measure(hasty, ["heads", "bodies"], 20, 3.0))
    for outcome in outcomes:
        assert outcome.others.requests > 0 and outcome.others.lost == 0, outcome
    quiet, heads, bodies = (outcome.slow for outcome in outcomes)
    assert quiet == {} and heads == bodies == {"408": 20}


@pytest.fixture
def full(replicas: Replicas) -> Iterator[tuple[str, Gate]]:
    """A service whose route for completions is full, and whose connections know it."""
    gate = Gate(first_bound=1)
    gate.enter("/v1/completions")
    protocol = LimitedProtocol.limited(QUICK)
    protocol.gate = gate
    entry = Edge(BodyLimit(Admission(Failover(replicas), gate)))
    with listening(RequestIds(entry), protocol) as service:
        yield service, gate


def test_refusals_on_the_connection_equal_admissions(
    full: tuple[str, Gate], replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, gate = full
    body = {"prompt": "x", "max_tokens": 1}
    replicas.tries = 0
    with httpx.Client(base_url=service, timeout=20) as client:
        quick = client.post("/v1/completions", json=body, headers={"X-Request-Id": "mine"})
        # Chunked, by a path with a slash and a query.
        parts = client.post("/v1/completions/?a=b", content=iter([b"{", b"}"]))
        slow = client.post("/v1/completions", json=body, headers={"Origin": "https://a.example"})
        assert [each.status_code for each in (quick, parts, slow)] == [429] * 3
        assert quick.content == parts.content == slow.content
        assert quick.headers["x-request-id"] == "mine" and parts.headers["x-request-id"]
        assert {*quick.headers} == {*slow.headers} and quick.headers["retry-after"] == "1"
        assert replicas.tries == 0
        assert client.get("/health").status_code == 200
        assert client.post("/v1/nothing", json=body).status_code == 404
        gate.leave("/v1/completions", 499, refused=False)
        assert client.post("/v1/completions", json=body).status_code == 200  # as before


def test_refusals_on_the_connection_follow_http(full: tuple[str, Gate]) -> None:
    """Pipelined requests are answered in order, and a connection that is to end does."""
    service, _ = full
    one = request(b"POST", b"/v1/completions", b"", BODY) + BODY
    health = request(b"GET", b"/health", b"Connection: close\r\n")
    with connect(service) as connection:
        connection.sendall(one + one + health)
        content = b""
        while received := connection.recv(65536):
            content += received
    assert re.findall(rb"HTTP/1\.1 (\d+)", content) == [b"429", b"429", b"200"]
    closing = request(b"POST", b"/v1/completions", b"Connection: close\r\n", BODY)
    reply = exchange(service, closing, BODY)
    assert reply.status_code == 429 and reply.headers["connection"] == "close"
    # What is half sent is no more refused than answered: it waits for its end.
    assert exchange(service, one[:-3]).status_code == 408


async def two_seconds(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.sleep(2)
    await _plain((200, b"answer"), send)


@contextmanager
def strict() -> Iterator[str]:
    """A full service that refuses those who retry at once after a minute."""
    gate = Gate(first_bound=1)
    gate.enter("/v1/completions")
    protocol = LimitedProtocol.limited(ConnectionLimits(impatient_seconds=60))
    protocol.gate = gate
    with listening(RequestIds(two_seconds), protocol, keep_alive_seconds=1) as service:
        yield service


REFUSED = request(b"POST", b"/v1/completions", b"", BODY) + BODY


@contextmanager
def impatient(service: str) -> Iterator[socket.socket]:
    """A connection that has been refused, and has sent its request again."""
    with connect(service) as connection:
        connection.sendall(REFUSED)
        assert connection.recv(65536).startswith(b"HTTP/1.1 429")
        connection.sendall(REFUSED)
        yield connection


def rest(connection: socket.socket) -> list[bytes]:
    """The statuses of all that comes until the connection ends."""
    content = b"".join(iter(lambda: connection.recv(65536), b""))
    return re.findall(rb"HTTP/1\.1 (\d+)", content)


def test_a_connection_that_retries_at_once_waits_for_its_next_refusal() -> None:
    with strict() as service, impatient(service) as connection:
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(65536)
        other = request(b"POST", b"/v1/completions", b"Connection: close\r\n", BODY)
        assert exchange(service, other, BODY).status_code == 429


@pytest.mark.slow
def test_a_connection_that_waits_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "WAIT_SECONDS", 0.2)
    with strict() as service, connect(service) as connection:
        for _ in range(3):
            connection.sendall(REFUSED)
            assert connection.recv(65536).startswith(b"HTTP/1.1 429")
            time.sleep(0.3)


def test_a_pending_refusal_precedes_what_comes_after_it() -> None:
    with strict() as service:
        with impatient(service) as connection:
            connection.sendall(b"nonsense\r\n\r\n")
            assert rest(connection) == [b"429", b"400"]
        with impatient(service) as connection:  # which says that nothing more comes
            connection.shutdown(socket.SHUT_WR)
            assert rest(connection) == [b"429"]
        with impatient(service):
            pass  # the client leaves


def test_a_pending_refusal_is_sent_when_the_server_ends() -> None:
    with ExitStack() as stack:
        with strict() as service:
            connection = stack.enter_context(impatient(service))
        assert rest(connection) == [b"429"]


@pytest.mark.slow
def test_a_request_after_a_pending_refusal_has_its_time() -> None:
    """Not only as long as an idle connection may stay open."""
    with strict() as service, impatient(service) as connection:
        connection.sendall(request(b"GET", b"/slow", b"Connection: close\r\n"))
        assert rest(connection) == [b"429", b"200"]


def test_unread_refusals_do_not_pile_up(replicas: Replicas) -> None:
    """A client that only sends fills no memory with its replies."""
    gate = Gate(first_bound=1)
    gate.enter("/v1/completions")
    protocol = LimitedProtocol.limited(ConnectionLimits())
    protocol.gate = gate
    served: list[LimitedProtocol] = []

    class Seen(protocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            sending = transport.get_extra_info("socket")
            sending.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            served.append(self)

    entry = Edge(BodyLimit(Admission(Failover(replicas), gate)))
    one = request(b"POST", b"/v1/completions", b"", BODY) + BODY
    with listening(RequestIds(entry), Seen) as service, connect(service) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(2)
        with suppress(TimeoutError):  # the server stops reading
            connection.sendall(one * 40_000)
        assert served[-1].transport.get_write_buffer_size() < 2**18


def test_a_slow_server_does_not_time_out_complete_requests() -> None:
    """Many connections of one address at once, while the loop does something else."""

    async def busy(scope: Scope, receive: Receive, send: Send) -> None:
        time.sleep(0.01)
        await _plain((200, b"answer"), send)

    limits = ConnectionLimits(unfinished=20, unfinished_per_address=10, grace_seconds=0.3)
    with listening(busy, LimitedProtocol.limited(limits)) as service, ExitStack() as stack:
        connections = []
        for _ in range(100):
            connections.append(stack.enter_context(connect(service)))
            connections[-1].sendall(request(b"GET", b"/"))
        for connection in connections:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")


class Streams:
    """Endless streams of some events a second, and how each ended: sent bytes, by its path."""

    def __init__(self, event_bytes: int, pause_seconds: float = 0.0) -> None:
        self._event = b"data: " + b"x" * event_bytes + b"\n\n"
        self._pause_seconds = pause_seconds
        self.running: set[str] = set()
        self.cancelled: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, sent = scope["path"], 0
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        assert (await receive())["type"] == "http.request"
        left = asyncio.ensure_future(receive())
        self.running.add(path)
        while not left.done():
            await send({"type": "http.response.body", "body": self._event, "more_body": True})
            sent += len(self._event)
            await asyncio.sleep(self._pause_seconds)
        if (await left)["type"] == "http.disconnect":
            self.running.discard(path)
            self.cancelled[path] = sent


@contextmanager
def streaming(streams: Streams, limits: ConnectionLimits) -> Iterator[str]:
    entry = RequestIds(Edge(BodyLimit(Failover(streams))))
    with listening(entry, LimitedProtocol.limited(limits)) as service:
        yield service


def connect_little(service: str) -> socket.socket:
    """A connection of a client whose system buffers little."""
    address = urlsplit(service)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((address.hostname, address.port))
    connection.settimeout(20)
    return connection


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("event_bytes", [250, 65536])
def test_an_unread_stream_is_cancelled(event_bytes: int) -> None:
    """Even if it is so short that the system's buffers could hold all of it."""
    streams = Streams(event_bytes)
    with streaming(streams, QUICK) as service, connect_little(service) as reader:
        reader.sendall(request(b"GET", b"/one"))
        until(lambda: "/one" in streams.cancelled)
    assert streams.cancelled["/one"] < 2 * UNSENT_BYTES + 2 * event_bytes + 65536


def test_unread_streams_of_an_address_are_bounded() -> None:
    """The oldest ones beyond the bound end long before their time; one that is read goes on."""
    patient = replace(QUICK, unread_seconds=60)
    streams = Streams(event_bytes=250)
    with streaming(streams, patient) as service, ExitStack() as stack:
        reader = stack.enter_context(connect_little(service))
        reader.sendall(request(b"GET", b"/read"))
        assert reader.recv(65536)
        for number in range(8):
            connection = stack.enter_context(connect_little(service))
            connection.sendall(request(b"GET", b"/%d" % number))
            until(lambda number=number: f"/{number}" in streams.running)  # type: ignore[misc]
        until(lambda: bool(reader.recv(65536)) and len(streams.cancelled) >= 5)
        assert {f"/{number}" for number in range(5)} <= streams.cancelled.keys()
        assert {"/read", "/6", "/7"} <= streams.running  # of which the first may count as well


def test_a_large_reply_may_take_longer_than_unread_seconds() -> None:
    """A client that reads on, slowly, gets all of it."""
    size = 500_000

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await _plain((200, b"x" * size), send)

    with (
        listening(large, LimitedProtocol.limited(QUICK)) as service,
        connect_little(service) as reader,
    ):
        reader.sendall(request(b"GET", b"/", b"Connection: close\r\n"))
        got = 0
        while received := reader.recv(2048):
            got += len(received)
            time.sleep(0.005)  # 1.2 seconds in all
        assert got > size


def test_waiting_bodies_take_bounded_memory(replicas: Replicas) -> None:
    entry = BodyLimit(Failover(replicas), max_waiting_bytes=10_000)
    with listening(entry) as service, ExitStack() as stack:
        replies = []
        for _ in range(3):
            connection = stack.enter_context(connect(service))
            head = request(b"POST", b"/tokenize", b"Content-Length: 9000\r\n")
            connection.sendall(head + b"x" * 6000)
            replies.append(connection)
        (refused, *_), _, _ = select.select(replies, [], [], 20)  # whichever came second
        content = refused.recv(65536)
        assert b"503 Service Unavailable" in content
        assert b"too many bodies are half sent" in content


# Admission


class Queue:
    """A service with room for so many requests, whose clients end when they are told to."""

    def __init__(self, room: int, **settings: Any) -> None:
        self.room = room
        self.asked = 0
        self.cleanup: asyncio.Event | None = None  # of requests whose replies are complete
        self.running: list[asyncio.Event] = []
        self.now = 0.0
        self._admission = Admission(self.serve, Gate(clock=lambda: self.now, **settings))

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        if len(self.running) >= self.room and scope["path"] != "/health":
            await error_response(OverloadedError("full"))(scope, receive, send)
            return
        self.running.append(end := asyncio.Event())
        await end.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})
        if self.cleanup is not None:
            await self.cleanup.wait()

    async def ask(self, path: str = "/v1/completions") -> int:
        status = 0

        async def send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        await self._admission(scope, receive, send)
        return status

    async def hold(self, path: str = "/v1/completions") -> asyncio.Task[int]:
        """A request that runs until `answer`."""
        task = asyncio.ensure_future(self.ask(path))
        await asyncio.sleep(0)
        return task

    async def answer(self) -> None:
        self.running.pop(0).set()
        for _ in range(5):
            await asyncio.sleep(0)


def test_a_full_service_is_not_tried_for_each_request() -> None:
    async def scenario() -> None:
        service = Queue(room=5)
        held = [await service.hold() for _ in range(5)]
        assert await service.ask() == 429
        assert service.asked == 6
        assert [await service.ask() for _ in range(100)] == [429] * 100
        assert service.asked == 6
        health = await service.hold("/health")
        assert len(service.running) == 6
        other = await service.hold("/classification")  # is refused by its own service
        while service.running:
            await service.answer()
        assert await asyncio.gather(*held, health, other) == [200] * 6 + [429]

    asyncio.run(scenario())


def test_the_bound_rises_gradually_after_a_service_grows() -> None:
    async def scenario() -> None:
        service = Queue(room=5)
        held = [await service.hold() for _ in range(5)]
        assert await service.ask() == 429
        service.room, service.now = 8, 10.0
        most = []
        for _ in range(20):
            held += [await service.hold() for _ in range(2)]
            most.append(len(service.running))
            await service.answer()
        assert most[0] == 5
        assert 8 in most
        assert most == sorted(most)
        while service.running:
            await service.answer()
        await asyncio.gather(*held)

    asyncio.run(scenario())


def test_a_request_counts_until_its_replys_last_byte() -> None:
    """Not until Serve has cleaned up: its client may already have sent the next one."""

    async def scenario() -> None:
        service = Queue(room=1000, first_bound=2)
        service.cleanup = asyncio.Event()
        held = [await service.hold() for _ in range(2)]
        assert await service.ask() == 429
        await service.answer()
        held.append(await service.hold())
        assert service.asked == 3
        service.cleanup.set()
        while service.running:
            await service.answer()
        assert await asyncio.gather(*held) == [200] * 3

    asyncio.run(scenario())


def test_an_initial_burst_is_bounded() -> None:
    async def scenario() -> None:
        service = Queue(room=1000, first_bound=10)
        held = [await service.hold() for _ in range(100)]
        assert service.asked == 10
        while service.running:
            await service.answer()
        statuses = Counter(await asyncio.gather(*held))
        assert statuses == {200: 10, 429: 90}

    asyncio.run(scenario())


def test_made_up_paths_take_no_memory() -> None:
    gate = Gate()
    for number in range(2 * MAX_KNOWN):
        for path in (f"OPTIONS /v1/{number}", "/v1/completions"):
            gate.enter(path)
            gate.leave(path, 200, refused=False)
    assert len(gate._bounds) == MAX_KNOWN
    assert "/v1/completions" in gate._bounds  # what is used stays known


def test_bodies_of_running_requests_are_bounded_together() -> None:
    """Also those whose application takes less: the proxy passes on what the largest takes."""

    async def run() -> None:
        queue = Queue(room=4)
        limited = BodyLimit(queue.serve, max_held_bytes=2500)

        async def ask() -> int:
            status = 0

            async def send(message: Message) -> None:
                nonlocal status
                status = message.get("status", status)

            async def receive() -> Message:
                return {"type": "http.request", "body": b"x" * 1000}

            scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
            await limited(scope, receive, send)
            return status

        held = [asyncio.ensure_future(ask()) for _ in range(2)]
        await asyncio.sleep(0)
        assert await ask() == 503
        await queue.answer()
        await asyncio.sleep(0)
        held.append(asyncio.ensure_future(ask()))
        await asyncio.sleep(0)
        for _ in range(2):
            await queue.answer()
        assert await asyncio.gather(*held) == [200] * 3

    asyncio.run(run())

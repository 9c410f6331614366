"""Edge cases of HTTP: requests outside any route get a declared answer too."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from serving_client import assert_error
from serving_models import KEY
from starlette.types import Message

from gptj.serving.app import new_app

pytest_plugins = ["serving_fixtures"]

BODY = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAA\r\n"
WEBSOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
HANDSHAKE = (
    WEBSOCKET + b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


class Reply:
    """What a server sends until it closes the connection, as far as it is one HTTP reply."""

    def __init__(self, content: bytes) -> None:
        head, _, body = content.partition(b"\r\n\r\n")
        line, *headers = head.decode("latin-1").split("\r\n")
        self.status_code = int(line.split()[1])
        pairs = (header.split(": ", 1) for header in headers)
        self.headers = {name.lower(): value for name, value in pairs}
        if self.headers.get("transfer-encoding") == "chunked":
            body = b"".join(body.split(b"\r\n")[1::2])
        self.text = body.decode()

    def json(self) -> Any:
        return json.loads(self.text)


def send(service: str, *parts: bytes) -> Reply:
    """Send bytes as they are, in parts that arrive one by one. The server must end the exchange."""
    address = urlsplit(service)
    assert address.hostname
    assert address.port
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.05)
        content = b""
        while received := connection.recv(65536):
            content += received
    return Reply(content)


def request(method: bytes, path: bytes, headers: bytes = b"", body: bytes = b"") -> bytes:
    length = b"Content-Length: %d\r\n" % len(body) if body else b""
    kind = b"Content-Type: application/json\r\n"
    return b"%s %s HTTP/1.1\r\nHost: x\r\n%s%s%s\r\n" % (method, path, kind, length, headers)


def undated(reply: httpx.Response) -> Any:
    """Its JSON without `created`, which another replica loaded at another time."""
    return json.loads(reply.content, object_hook=lambda each: {**each, "created": None})


def test_routes_answer_to_head_and_with_a_slash_at_the_end(service: str) -> None:
    """Never by a redirect, whose address would be of another scheme behind TLS."""
    with httpx.Client(base_url=service, timeout=30) as client:
        for path in (
            "/health",
            "/v1/models",
            "/v1/models/generation",
            "/tokenizer_info",
            "/classification/health",
            "/question-answering/health",
        ):
            reply = client.get(path)
            assert reply.status_code == 200
            assert undated(client.get(f"{path}/")) == undated(reply)
            for same in (path, f"{path}/"):
                head = client.head(same)
                assert (head.status_code, head.content) == (200, b"")
        assert client.head("/nothing").status_code == 404
        assert client.head("/v1/completions").status_code == 405
        inputs: dict[str, Any] = {"question": "Who?", "context": "Anna wrote it."}
        for path, body in (
            ("/v1/completions", {"prompt": "x", "max_tokens": 2, "temperature": 0}),
            ("/tokenize", {"prompt": "x"}),
            ("/classification", {"inputs": "x"}),
            ("/question-answering", {"inputs": inputs}),
        ):
            replies = [client.post(each, json=body) for each in (path, f"{path}/", f"{path}//")]
            assert [reply.status_code for reply in replies] == [200] * 3
        guarded = client.get("/guarded/v1/models/", headers={"Authorization": f"Bearer {KEY}"})
        assert guarded.json()["data"][0]["id"] == "org/guarded"
        assert client.head("/guarded/health").status_code == 200
        assert client.head("/guarded/v1/models").status_code == 401


@pytest.mark.parametrize("path", ["/v1/completions", "/classification", "/guarded/health"])
def test_an_unreadable_header_is_refused(service: str, path: str) -> None:
    """Those that Serve's proxy reads, before it looks for an application."""
    for name in (
        "X-Request-Id",
        "X-Request-Timeout-Seconds",
        "X-Request-Disconnect-Disabled",
        "X-Session-Id",
        "Serve-Multiplexed-Model-Id",
        "Serve_Multiplexed_Model_Id",
    ):
        for value in (b"\xe9", b"a\xff\xfeb", b"\x80" * 200):
            reply = httpx.post(service + path, content=BODY, headers={name: value}, timeout=30)
            assert_error(reply, 400, f"the header {name.lower()} is not valid UTF-8")


def test_any_bytes_are_allowed_in_other_headers(service: str) -> None:
    headers = {
        "User-Agent": b"\xe9",
        "X-User": b"Jos\xe9 \xff",
        "Accept": b"\x80",
        "Cookie": b"\xe9",
    }
    reply = httpx.get(f"{service}/v1/models", headers=headers, timeout=30)
    assert reply.status_code == 200
    reply = httpx.get(f"{service}/v1/models", headers={"X-Request-Id": "é".encode()}, timeout=30)
    assert reply.status_code == 200


def test_any_time_limit_is_accepted(service: str) -> None:
    name = "X-Request-Timeout-Seconds"
    for value in ("1" + "0" * 400, "1" + "0" * 4400, "1e300", "inf", "nan", "1000001"):
        reply = httpx.post(
            f"{service}/v1/completions", content=BODY, headers={name: value}, timeout=30
        )
        assert_error(reply, 400, f"the header {name.lower()} must be at most 1000000, got ")
    for value in ("60", "1000000", "0", "-1", "soon", ""):
        reply = httpx.get(f"{service}/v1/models", headers={name: value}, timeout=30)
        assert reply.status_code == 200, value


@pytest.mark.parametrize("path", [b"/v1/completions", b"/classification", b"/question-answering"])
def test_a_body_after_an_upgrade_offer_is_refused(service: str, path: bytes) -> None:
    """As curl --http2 and Java's client send it, in one piece and in two."""
    head = request(b"POST", path, H2C, BODY)
    chunked = request(b"POST", path, H2C + b"Transfer-Encoding: chunked\r\n")
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    for parts in ((head + BODY,), (head, BODY), (chunked + body,), (chunked, body)):
        reply = send(service, *parts)
        assert_error(reply, 400, "send it without the header Upgrade")  # type: ignore[arg-type]
        assert reply.headers["connection"] == "close"


def test_a_request_without_a_body_may_offer_an_upgrade(service: str) -> None:
    """It is answered in HTTP/1.1; the connection, on which no other would be read, is closed."""
    for path in (b"/v1/models", b"/guarded/health"):
        reply = send(service, request(b"GET", path, H2C) * 2)
        assert reply.status_code == 200
        assert reply.headers["connection"] == "close"


@pytest.mark.parametrize("path", [b"/v1/completions", b"/classification", b"/guarded/health"])
def test_websocket_is_refused_with_the_reason(service: str, path: bytes) -> None:
    for handshake in (
        request(b"GET", path, HANDSHAKE),
        request(b"GET", path, WEBSOCKET),
        request(b"GET", path, HANDSHAKE.replace(b"13", b"7").replace(b"websocket", b"WebSocket")),
        request(b"POST", path, HANDSHAKE, BODY) + BODY,
        request(b"POST", path, WEBSOCKET, BODY) + BODY,
    ):
        reply = send(service, handshake)
        assert_error(reply, 400, "WebSocket is not supported")  # type: ignore[arg-type]
        assert reply.headers["connection"] == "close"


def test_websocket_is_refused_by_servers_that_have_it_too() -> None:
    app = new_app("a service")

    async def sent(extensions: dict[str, Any]) -> list[Message]:
        messages: list[Message] = []

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            messages.append(dict(message))

        scope = {"type": "websocket", "path": "/", "headers": [], "extensions": extensions}
        await app(scope, receive, send)
        return messages

    (closed,) = asyncio.run(sent({}))
    assert (closed["type"], closed["code"]) == ("websocket.close", 1008)
    start, body = asyncio.run(sent({"websocket.http.response": {}}))
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 400)
    assert body["type"] == "websocket.http.response.body"
    assert json.loads(body["body"])["error"]["code"] == "websocket_not_supported"

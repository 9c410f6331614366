"""Requests that begin alike have one session, by which a router keeps them together."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from gptj.serving.entry.sessions import PARSED_BYTES, PrefixSessions, session_of

LONG = "Answer from this text. " * 40
SYSTEM = {"role": "system", "content": LONG}


def session(**body: Any) -> str | None:
    return session_of(json.dumps(body).encode())


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ({"prompt": LONG + "a"}, {"prompt": LONG + "b", "n": 2}, True),
        ({"prompt": [LONG + "a"]}, {"prompt": LONG + "b"}, True),
        ({"prompt": LONG}, {"prompt": "x" + LONG}, False),
        ({"prompt": LONG, "model": "a"}, {"prompt": LONG, "model": "b"}, False),
        ({"prompt": [*range(200)]}, {"prompt": [[*range(200), 7]]}, True),
        ({"prompt": [*range(200)]}, {"prompt": [*range(1, 200)]}, False),
        ({"messages": [SYSTEM, user("a")]}, {"messages": [SYSTEM, user("b")]}, True),
        (
            {"messages": [user("Hello there, and " * 5)]},
            {"messages": [user("Hello there, and " * 5), SYSTEM, user("And then?")]},
            True,
        ),
        ({"messages": [user("Hello, " * 20)]}, {"messages": [user("Howdy, " * 20)]}, False),
    ],
)
def test_what_begins_alike_is_of_one_session(
    one: dict[str, Any], other: dict[str, Any], alike: bool
) -> None:
    found = session(**one), session(**other)
    assert None not in found and (found[0] == found[1]) == alike


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'"x"', b"[" * 100_000, b'{"prompt": "short"}', b'{"prompt": [1, 2]}',
        b'{"prompt": {}}', b'{"messages": "x"}', b'{"messages": [1]}', b'{"prompt": []}',
        b'{"prompt": null}', b"\xff",
    ],
)  # fmt: skip
def test_short_and_wrong_prompts_have_none(body: bytes) -> None:
    assert session_of(body) is None


def test_lone_surrogates_are_no_error() -> None:
    assert session_of(b'{"prompt": "%s"}' % (rb"\ud800" * 100)) is not None


def test_the_header_is_set_and_the_body_passed_on() -> None:
    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        content = [request.headers.get("x-session-id"), len(await request.body())]
        await JSONResponse(content)(scope, receive, send)

    client = TestClient(PrefixSessions(echo))
    for size in (1000, 2 * PARSED_BYTES):
        body = json.dumps({"prompt": "x" * size})
        for route in ("/v1/completions", "/other/v1/chat/completions/"):
            assert client.post(route, content=body).json() == [session_of(body.encode()), len(body)]
        own = {"X-Session-Id": "mine"}
        assert client.post("/v1/completions", content=body, headers=own).json()[0] == "mine"
        assert client.post("/tokenize", content=body).json() == [None, len(body)]

"""An application's HTTP settings: CORS origins, body limits and unknown fields."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pydantic
import pytest
import uvicorn.config
from fastapi import FastAPI
from serving_client import assert_error
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http import auto

from deployments import proxy
from deployments.generation import Arguments
from gptj.engine.constraints.grammar import Grammar
from gptj.engine.speculation import Speculation
from gptj.serving import requests
from gptj.serving.app import HTTPOptions, new_app
from gptj.serving.chat.messages import ChatMessage
from gptj.serving.classification import ClassificationRequest
from gptj.serving.completions.constraints import ResponseFormat, StructuredOutputs
from gptj.serving.entry.admission import Admission, Gate
from gptj.serving.entry.refusals import MAX_KNOWN, ReadableRefusals
from gptj.serving.middleware.limits import LARGEST_BODY_BYTES, MAX_BODY_BYTES
from gptj.serving.requests import RequestModel, ignoring_unknown_fields

HERE, ELSEWHERE = "https://chat.example.org", "https://other.example.org"


class Inner(RequestModel):
    number: int = 0


class Body(RequestModel):
    text: str
    inner: Inner | None = None


def application(**options: Any) -> FastAPI:
    app = new_app("test", options=HTTPOptions(**options))

    @app.post("/v1/echo")
    async def echo(body: Body) -> dict[str, Any]:
        return body.model_dump()

    return app


def preflight(app: ASGIApp, origin: str) -> Any:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    return TestClient(app).options("/v1/echo", headers=headers)


def test_listed_origins_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTJ_API_KEYS", "a-key")
    app = application(cors_origins=(HERE,))
    reply = preflight(app, HERE)  # which browsers send without a key
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == HERE
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert "authorization" in reply.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in reply.headers
    client = TestClient(app)
    headers = {"Origin": HERE, "Authorization": "Bearer a-key"}
    for sent, status in ((headers, 200), ({"Origin": HERE}, 401)):
        reply = client.post("/v1/echo", json={"text": "x"}, headers=sent)
        assert reply.status_code == status  # pages can read errors as well
        assert reply.headers["access-control-allow-origin"] == HERE
        assert reply.headers["access-control-expose-headers"] == "*"


def test_other_origins_are_refused() -> None:
    app = application(cors_origins=(HERE,))
    refused = preflight(app, ELSEWHERE)
    assert_error(refused, 400, "args.cors_origins")
    reply = TestClient(app).post("/v1/echo", json={"text": "x"}, headers={"Origin": ELSEWHERE})
    assert "access-control-allow-origin" not in reply.headers
    assert preflight(application(), HERE).status_code == 405  # by default there is none
    assert preflight(application(cors_origins=("*",)), ELSEWHERE).status_code == 200


@pytest.fixture
def in_proxy(monkeypatch: pytest.MonkeyPatch) -> Callable[[ASGIApp], TestClient]:
    """A client of an application behind what Serve's proxy has before it."""
    for module, name in ((auto, "AutoHTTPProtocol"), (uvicorn.config, "WS_PROTOCOLS")):
        monkeypatch.setattr(module, name, copy.copy(getattr(module, name)))  # which it changes
    monkeypatch.setattr(proxy, "follow_serve", lambda: None)  # the loggers of all other tests

    def client(app: ASGIApp) -> TestClient:
        for middleware in proxy.middlewares():
            app = middleware.cls(app, *middleware.args, **middleware.kwargs)
        return TestClient(app)

    return client


def test_pages_can_read_the_proxys_own_refusals(
    in_proxy: Callable[[ASGIApp], TestClient],
) -> None:
    client = in_proxy(application(cors_origins=(HERE,)))

    def refused(origin: str, path: str = "/v1/echo") -> httpx.Headers:
        headers = {"Origin": origin, "Content-Length": str(LARGEST_BODY_BYTES + 1)}
        reply = client.post(path, content=b"{}", headers=headers)
        assert_error(reply, 413, str(LARGEST_BODY_BYTES))
        return reply.headers  # type: ignore[return-value]

    assert "access-control-allow-origin" not in refused(HERE)  # no reply has shown it yet
    headers = {"Origin": HERE, "Access-Control-Request-Method": "POST"}
    assert client.options("/v1/echo/", headers=headers).status_code == 200
    found = refused(HERE)
    assert found["access-control-allow-origin"] == HERE
    assert found["access-control-expose-headers"] == "*"
    assert found["vary"] == "Origin"
    for origin, path in ((ELSEWHERE, "/v1/echo"), (HERE, "/other")):
        assert "access-control-allow-origin" not in refused(origin, path)
    forbidding = in_proxy(application())
    forbidding.options("/v1/echo", headers=headers)
    reply = forbidding.post(
        "/v1/echo", content=b"", headers={"Origin": HERE, "Upgrade": "websocket"}
    )
    assert reply.status_code == 400 and "access-control-allow-origin" not in reply.headers


def test_remembered_origins_are_bounded_and_may_change() -> None:
    allowed = True

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"access-control-allow-origin", b"*")] if allowed else []
        status = 429 if scope["path"] == "/full" and scope["method"] == "POST" else 200
        if status == 429:
            headers = []
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body"})

    refusals = ReadableRefusals(answering)
    client = TestClient(refusals)
    headers = {"Origin": HERE}
    client.get("/full", headers=headers)
    reply = client.post("/full", headers=headers)
    assert reply.headers["access-control-allow-origin"] == "*" and "vary" not in reply.headers
    allowed = False
    client.get("/full", headers=headers)
    assert "access-control-allow-origin" not in client.post("/full", headers=headers).headers
    allowed = True

    async def get_many() -> None:
        for number in range(MAX_KNOWN + 9):
            await _get(refusals, f"/{number}")

    asyncio.run(get_many())
    assert len(refusals._known) == MAX_KNOWN


async def _get(app: ASGIApp, path: str) -> None:
    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None: ...

    headers = [(b"origin", HERE.encode())]
    await app({"type": "http", "method": "GET", "path": path, "headers": headers}, receive, send)


def test_preflights_pass_while_a_route_is_full() -> None:
    asyncio.run(_preflights_beside_a_full_route())


async def _preflights_beside_a_full_route() -> None:
    app = application(cors_origins=(HERE,))
    release = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            await release.wait()
        await app(scope, receive, send)

    entry = ReadableRefusals(Admission(slow, Gate(first_bound=1)))
    headers = {"Origin": HERE, "Access-Control-Request-Method": "POST"}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(entry), base_url="http://test", headers=headers
    ) as client:
        first = asyncio.create_task(client.post("/v1/echo", json={"text": "x"}))
        await asyncio.sleep(0.05)
        for _ in range(3):
            assert (await client.options("/v1/echo")).status_code == 200
            refused = await client.post("/v1/echo", json={"text": "x"})
            assert_error(refused, 429, "try again later")
            assert refused.headers["access-control-allow-origin"] == HERE
        release.set()
        assert (await first).status_code == 200


def test_a_bodys_limit_can_be_set(in_proxy: Callable[[ASGIApp], TestClient]) -> None:
    for limit in (100, 2 * MAX_BODY_BYTES):
        client = in_proxy(application(max_body_bytes=limit, cors_origins=(HERE,)))
        text = "x" * (limit - len(json.dumps({"text": ""})))
        assert client.post("/v1/echo", content=json.dumps({"text": text})).status_code == 200
        for send in (str, iter):  # at once, or in chunks
            body = json.dumps({"text": text + "x"})
            content = body if send is str else (part.encode() for part in (body[:50], body[50:]))
            reply = client.post("/v1/echo", content=content, headers={"Origin": HERE})
            assert_error(reply, 413, f"larger than {limit} bytes")
            assert reply.headers["access-control-allow-origin"] == HERE


def test_unknown_fields_can_be_ignored_with_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "_warned", set())
    body = {"text": "x", "service_tier": "auto", "inner": {"number": 1, "other": [1]}}
    client = TestClient(application(ignore_unknown_fields=True))
    with caplog.at_level(logging.WARNING, "gptj.serving.requests"):
        for _ in range(2):
            reply = client.post("/v1/echo", json=body)
            assert reply.json() == {"text": "x", "inner": {"number": 1}}
    ours = [record for record in caplog.records if record.name == requests.__name__]
    warnings = [record.getMessage() for record in ours]
    assert len(warnings) == 2  # once for each of two bodies
    assert "'service_tier'" in warnings[0] and "'other'" in warnings[1]
    assert_error(client.post("/v1/echo", json={"text": 3, "other": 1}), 422, "text")
    many = {"text": "x", **{f"field-{number}": 1 for number in range(300)}}
    for _ in range(2):
        assert client.post("/v1/echo", json=many).status_code == 200
    assert len(requests._warned) < 400
    document = client.get("/openapi.json").json()["components"]["schemas"]
    assert document["Body"]["additionalProperties"] is True


def test_fields_with_aliases_are_not_unknown() -> None:
    named = {"name": "x", "schema": {"type": "object"}}
    with ignoring_unknown_fields():
        form = ResponseFormat.model_validate({"type": "json_schema", "json_schema": named})
        outputs = StructuredOutputs.model_validate({"json": {"type": "object"}, "other": 1})
    assert form.grammar() == outputs.grammar() == Grammar.of_json_object()


PART = {"type": "text", "text": "x"}
CACHED = {"cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize(
    ("body", "known", "more"),
    [
        (ChatMessage, {"role": "user", "content": [PART]}, [{**PART, **CACHED}]),
        (ClassificationRequest, {"inputs": {"text": "x"}}, {"text": "x", "other": 1}),
        (ClassificationRequest, {"inputs": [{"text": "x"}]}, [{"text": "x", "other": 1}]),
    ],
)
def test_unknown_fields_within_values_are_like_others(
    body: type[RequestModel], known: dict[str, Any], more: Any
) -> None:
    field = list(known)[-1]
    expected = body.model_validate(known)
    with pytest.raises(pydantic.ValidationError):
        body.model_validate({**known, field: more})
    with ignoring_unknown_fields():
        assert body.model_validate({**known, field: more}) == expected
    nulls = json.loads(
        json.dumps(more).replace('{"type": "ephemeral"}', "null").replace("1", "null")
    )
    assert body.model_validate({**known, field: nulls}) == expected


def test_unknown_fields_are_refused_otherwise() -> None:
    client = TestClient(application())
    assert_error(client.post("/v1/echo", json={"text": "x", "other": 1}), 422, "other: unknown")
    document = client.get("/openapi.json").json()["components"]["schemas"]
    assert document["Body"]["additionalProperties"] == {"type": "null"}


def test_settings_become_options_and_wrong_ones_are_refused() -> None:
    arguments = Arguments.model_validate(
        {"checkpoint": "x", "cors_origins": [HERE, "*"], "unknown_fields": "ignore"}
    )
    assert arguments.http_options() == HTTPOptions((HERE, "*"), True)
    assert Arguments(checkpoint="x").http_options() == HTTPOptions()
    assert Arguments(checkpoint="x", max_body_bytes=2**23).http_options().max_body_bytes == 2**23
    for size in (0, LARGEST_BODY_BYTES + 1):
        with pytest.raises(pydantic.ValidationError, match="max_body_bytes"):
            Arguments(checkpoint="x", max_body_bytes=size)
    for wrong in ("chat.example.org", f"{HERE}/", f"{HERE}/chat", "ftp://x", ""):
        with pytest.raises(pydantic.ValidationError, match="scheme://host"):
            Arguments.model_validate({"checkpoint": "x", "cors_origins": [wrong]})
    with pytest.raises(pydantic.ValidationError, match="refuse"):
        Arguments.model_validate({"checkpoint": "x", "unknown_fields": "drop"})


def test_speculation_takes_vllms_names_and_nothing_else() -> None:
    def given(value: Any) -> Speculation | None:
        return Arguments.model_validate({"checkpoint": "x", "speculation": value}).speculation

    assert Arguments(checkpoint="x").speculation is None
    assert given({}) == Speculation()
    assert given({"method": "ngram", "num_speculative_tokens": 4}) == Speculation(
        num_speculative_tokens=4
    )
    for wrong, reason in (
        ({"method": "eagle"}, "ngram"),
        ({"num_speculative_tokens": 16}, r"in \[1, 15\], got 16"),
        ({"prompt_lookup_min": 5}, r"in \[1, prompt_lookup_max=4\], got 5"),
        ({"prompt_lookup_min": 0}, "got 0"),
        ({"tokens": 8}, "tokens"),
    ):
        with pytest.raises(pydantic.ValidationError, match=reason):
            given(wrong)

"""What an application's settings say of its HTTP: other origins, and fields that no body has."""

from __future__ import annotations

import logging
from typing import Any

import pydantic
import pytest
from fastapi import FastAPI
from serving_client import assert_error
from starlette.testclient import TestClient

from deployments.generation import Arguments
from gptj.engine.constraints.grammar import Grammar
from gptj.engine.speculation import Speculation
from gptj.serving import requests
from gptj.serving.app import HTTPOptions, new_app
from gptj.serving.completions.constraints import ResponseFormat, StructuredOutputs
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


def preflight(app: FastAPI, origin: str) -> Any:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    return TestClient(app).options("/v1/echo", headers=headers)


def test_pages_of_listed_origins_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_other_origins_may_not() -> None:
    app = application(cors_origins=(HERE,))
    refused = preflight(app, ELSEWHERE)
    assert_error(refused, 400, "args.cors_origins")
    reply = TestClient(app).post("/v1/echo", json={"text": "x"}, headers={"Origin": ELSEWHERE})
    assert "access-control-allow-origin" not in reply.headers
    assert preflight(application(), HERE).status_code == 405  # by default there is none
    assert preflight(application(cors_origins=("*",)), ELSEWHERE).status_code == 200


def test_unknown_fields_are_ignored_with_a_warning_if_that_is_set(
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


def test_fields_whose_names_python_cannot_have_are_not_unknown() -> None:
    named = {"name": "x", "schema": {"type": "object"}}
    with ignoring_unknown_fields():
        form = ResponseFormat.model_validate({"type": "json_schema", "json_schema": named})
        outputs = StructuredOutputs.model_validate({"json": {"type": "object"}, "other": 1})
    assert form.grammar() == outputs.grammar() == Grammar.of_json_object()


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

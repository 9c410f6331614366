"""Client errors: a status, a reason and a field for each."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from gapped_tokenizer import gapped
from http_server import listening
from serving_client import ANSWERS, CHATS, CLASSIFICATION, COMPLETIONS, EMBEDDINGS, assert_error
from serving_models import CONTEXT, SHORT_CONTEXT, Models, applications, mounted
from slow_cases import slow

from gptj.serving.app import new_app
from gptj.serving.batched_rows import BatchedRows
from gptj.serving.chat.messages import ChatMessage
from gptj.serving.chat.schemas import ChatRequest
from gptj.serving.classification import ClassificationParameters, ClassificationRequest
from gptj.serving.completions.generation_request import StreamOptions
from gptj.serving.completions.schemas import Choice, Completion, CompletionRequest
from gptj.serving.embeddings import EmbeddingsRequest
from gptj.serving.errors import APIError, OverloadedError, UnavailableError
from gptj.serving.middleware.limits import MAX_BODY_BYTES
from gptj.serving.question_answering import (
    QuestionAndContext,
    QuestionAnsweringParameters,
    QuestionAnsweringRequest,
)
from gptj.serving.requests import RequestModel
from gptj.serving.tokenize import DetokenizeRequest, TokenizeRequest

pytest_plugins = ["serving_fixtures"]

HELLO = {"role": "user", "content": "x"}
HERE = {"question": "Who?", "context": "Anna wrote it."}
LONG = "The tower " * 1000


def test_an_id_beyond_the_embedding_fails_no_other_request(models: Models) -> None:
    """Deploying refuses such a tokenizer; a batch must not fail even so."""
    beyond = replace(models, tokenizer=gapped(models.tokenizer, 5000))

    def bodies(text: str) -> dict[str, Any]:
        return {
            COMPLETIONS: {"prompt": text, "max_tokens": 1},
            CLASSIFICATION: {"inputs": ["A tower", text]},
            ANSWERS: {"inputs": {"question": "Who?", "context": f"Anna {text}"}},
            EMBEDDINGS: {"input": ["A tower", text]},
        }

    async def replies(apps: dict[str, FastAPI]) -> None:
        transport = httpx.ASGITransport(mounted({**apps}))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for (path, bad), good in zip(
                bodies("z").items(), bodies("river").values(), strict=True
            ):
                asked = [client.post(path, json=body) for body in (good, bad, good, bad, good)]
                answers = await asyncio.gather(*asked)
                assert [each.status_code for each in answers] == [200, 400, 200, 400, 200], path
                assert "5000 is not a token id of this model" in answers[1].text
                health = "/health" if path == COMPLETIONS else f"{path}/health"
                assert (await client.get(health)).status_code == 200

    with applications(beyond) as apps:
        asyncio.run(replies(apps))


def test_ids_are_checked_on_text_threads(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the event loop: a request may have a million."""
    threads: list[str] = []
    check = BatchedRows.checked

    def recorded(self: BatchedRows[Any], rows: Sequence[list[int]]) -> Sequence[list[int]]:
        threads.append(threading.current_thread().name.rsplit("_", 1)[0])
        return check(self, rows)

    monkeypatch.setattr(BatchedRows, "checked", recorded)
    bodies: dict[str, dict[str, Any]] = {
        CLASSIFICATION: {"inputs": ["A tower"]},
        ANSWERS: {"inputs": {"question": "Who?", "context": "Anna"}},
        EMBEDDINGS: {"input": [[5, 6], [7]]},
    }

    async def statuses(apps: dict[str, FastAPI]) -> list[int]:
        transport = httpx.ASGITransport(mounted({**apps}))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [
                (await client.post(path, json=body)).status_code for path, body in bodies.items()
            ]

    with applications(models) as apps:
        assert asyncio.run(statuses(apps)) == [200] * len(bodies)
    assert threads == ["short text"] * len(bodies)


WRONG: list[tuple[str, Any, int, str]] = [
    (COMPLETIONS, b"", 422, "JSON object"),
    (CHATS, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 422, "surrogate"),
    (CHATS, b'{"messages": [{"role": "user", "content": "x", "name": "\\ud800"}]}', 422, "surr"),
    (CHATS, b'{"messages": [{"role": "\\ud800", "content": "x"}]}', 422, "messages"),
    (CHATS, b'{"messages": ' + b"[" * 800 + b"]" * 800 + b"}", 422, "messages"),
    (
        COMPLETIONS,
        {"prompt": [[1] * 1300] * 32, "prompt_logprobs": 20, "max_tokens": 0},
        400,
        "may have 873600 logprobs",
    ),
    (
        COMPLETIONS,
        {"prompt": [[1] * 500] * 2, "echo": True, "n": 60, "logprobs": 20},
        400,
        "may have 1300320 logprobs",
    ),
    (COMPLETIONS, b"{", 400, "not valid JSON"),
    (COMPLETIONS, b"\xff\xfe{}", 400, "JSON"),
    (COMPLETIONS, b'{"prompt": "\xc3("}', 400, "JSON"),
    (COMPLETIONS, b'{"prompt": ' + b"[" * 100_000, 400, "JSON"),
    (COMPLETIONS, b'{"prompt": ' + b"[" * 800 + b"]" * 800 + b"}", 422, "prompt"),
    (COMPLETIONS, b'{"n": 1' + b"0" * 5000 + b"}", 400, "JSON"),
    (COMPLETIONS, b'{"prompt": "x", "temperature": NaN}', 422, "temperature"),
    (COMPLETIONS, b'{"prompt": "x", "temperature": Infinity}', 422, "temperature"),
    (COMPLETIONS, b'{"prompt": "x", "top_p": -Infinity}', 422, "top_p"),
    (COMPLETIONS, b'{"prompt": "x", "logit_bias": {"1": NaN}}', 422, "logit_bias"),
    (COMPLETIONS, b'{"prompt": "\\ud800"}', 422, "surrogate"),
    (COMPLETIONS, b'{"prompt": "x", "stop": "\\ud800"}', 422, "surrogate"),
    (COMPLETIONS, b'{"prompt": "x", "model": "\\ud800"}', 404, "does not exist"),
    (COMPLETIONS, b'{"prompt": "x", "\\ud800": 1}', 422, "body: Input should be"),
    (COMPLETIONS, b'{"prompt": "x", "logit_bias": {"\\ud800": 1}}', 422, "logit_bias"),
    (COMPLETIONS, b'{"prompt": "x", "model": "\\u0000"}', 404, "does not exist"),
    (COMPLETIONS, [], 422, "JSON object"),
    (COMPLETIONS, None, 422, "JSON object"),
    (COMPLETIONS, "x", 422, "JSON object"),
    (COMPLETIONS, {"prompt": []}, 422, "empty list"),
    (COMPLETIONS, {"prompt": [[]]}, 422, "empty list"),
    (COMPLETIONS, {"prompt": 5}, 422, "prompt"),
    (COMPLETIONS, {"prompt": {"a": 1}}, 422, "prompt"),
    (COMPLETIONS, {"prompt": [1, "x"]}, 422, "mixture"),
    (COMPLETIONS, {"prompt": [True]}, 422, "prompt"),
    (COMPLETIONS, {"prompt": [1.5]}, 422, "prompt"),
    (COMPLETIONS, {"prompt": [[1], ["x"]]}, 422, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "-1"),
    (COMPLETIONS, {"prompt": [305]}, 400, "305 is not in the vocabulary"),
    (COMPLETIONS, {"prompt": [10**30]}, 400, "vocabulary"),
    (COMPLETIONS, {"prompt": LONG}, 400, f"context is {CONTEXT} tokens, but "),
    (COMPLETIONS, {"prompt": LONG * 50}, 400, "requested: at least "),
    (COMPLETIONS, {"prompt": [5] * 2000, "max_tokens": 49}, 400, "2049 are requested: 2000 of"),
    (COMPLETIONS, {"prompt": ["x"] * 129}, 400, "prompt may have at most 128 items, got 129"),
    (COMPLETIONS, {"n": 129}, 400, "129 outputs"),
    (COMPLETIONS, {"n": 10**30}, 400, "outputs"),
    (COMPLETIONS, {"n": 0}, 400, "n must be 1 or more, got 0"),
    (COMPLETIONS, {"n": 1.5}, 422, "n: "),
    (COMPLETIONS, {"n": "2"}, 422, "n: "),
    (COMPLETIONS, {"n": True}, 422, "n: "),
    (COMPLETIONS, {"n": 3, "best_of": 2}, 400, "best_of=2"),
    (COMPLETIONS, {"best_of": 2, "stream": True}, 400, "best"),
    (COMPLETIONS, {"suffix": "end"}, 400, "suffix"),
    (COMPLETIONS, {"max_tokens": -1}, 400, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 0}, 400, "echo"),
    (COMPLETIONS, {"max_tokens": 10**30}, 400, "context"),
    (COMPLETIONS, {"max_tokens": 5, "min_tokens": 6}, 400, "min_tokens"),
    (COMPLETIONS, {"min_tokens": -1}, 400, "min_tokens"),
    (COMPLETIONS, {"min_tokens": 5000}, 400, "context"),
    (COMPLETIONS, {"temperature": -0.1}, 400, "temperature must be in"),
    (COMPLETIONS, {"temperature": 10**300}, 400, "temperature must be in"),
    (COMPLETIONS, {"temperature": 10**400}, 422, "temperature"),
    (COMPLETIONS, {"temperature": "hot"}, 422, "temperature"),
    (COMPLETIONS, {"top_p": -0.1}, 400, "top_p must be in [0, 1], got -0.1"),
    (COMPLETIONS, {"top_p": 1.1}, 400, "top_p"),
    (COMPLETIONS, {"top_k": -2}, 400, "top_k"),
    (COMPLETIONS, {"min_p": 2}, 400, "min_p"),
    (COMPLETIONS, {"repetition_penalty": 0}, 400, "repetition_penalty"),
    (COMPLETIONS, {"repetition_penalty": 1e-38}, 400, "repetition_penalty"),
    (COMPLETIONS, {"presence_penalty": 3}, 400, "presence_penalty"),
    (COMPLETIONS, {"frequency_penalty": -3}, 400, "frequency_penalty"),
    (COMPLETIONS, {"logprobs": 21}, 400, "logprobs must be in [0, 20]"),
    (COMPLETIONS, {"prompt_logprobs": 21}, 400, "prompt_logprobs must be in [0, 20]"),
    (
        COMPLETIONS,
        {"prompt_logprobs": 1, "stream": True},
        400,
        "does not work with prompt_logprobs",
    ),
    (COMPLETIONS, {"bad_words": [" "]}, 400, "bad_words must not have an empty"),
    (COMPLETIONS, {"bad_words": ["a"] * 300}, 400, "bad_words may have at most 256 items, got 300"),
    (COMPLETIONS, {"bad_words": "a"}, 422, "list"),
    (COMPLETIONS, {"allowed_token_ids": []}, 400, "allowed_token_ids may have 1 to 4096"),
    (COMPLETIONS, {"allowed_token_ids": [10**6]}, 400, "1000000 is not a token id"),
    (COMPLETIONS, {"response_format": {"type": "xml"}}, 422, "json_schema"),
    (COMPLETIONS, {"response_format": {"type": "json_schema"}}, 400, "need each other"),
    (COMPLETIONS, {"structured_outputs": {}}, 400, "exactly one of json"),
    (COMPLETIONS, {"structured_outputs": {"regex": "a", "choice": ["b"]}}, 400, "exactly one of"),
    (COMPLETIONS, {"structured_outputs": {"regex": "(?=a)"}}, 400, "look-around"),
    (COMPLETIONS, {"structured_outputs": {"json": "{"}}, 400, "not valid JSON"),
    (COMPLETIONS, {"structured_outputs": {"grammar": "start: x"}}, 400, "cannot be compiled"),
    (COMPLETIONS, {"structured_outputs": {"json": {"uniqueItems": True}}}, 400, "uniqueItems"),
    (
        COMPLETIONS,
        {
            "structured_outputs": {"choice": ["a"]},
            "response_format": {"type": "json_object"},
        },
        400,
        "leave one out",
    ),
    (
        COMPLETIONS,
        {"structured_outputs": {"choice": ["a"]}, "use_beam_search": True},
        400,
        "beam search does not work with structured_outputs",
    ),
    (COMPLETIONS, {"logprobs": -1}, 400, "logprobs"),
    (COMPLETIONS, {"logprobs": True}, 422, "logprobs"),
    (COMPLETIONS, {"stop": ""}, 422, "empty"),
    (COMPLETIONS, {"stop": ["a", 1]}, 422, "stop"),
    (COMPLETIONS, {"stop": ["x"] * 17}, 400, "stop"),
    (COMPLETIONS, {"stop": "x" * 1001}, 400, "stop"),
    (COMPLETIONS, {"stream_options": {"include_usage": True}}, 400, "stream"),
    (COMPLETIONS, {"stream": True, "stream_options": {"x": 1}}, 422, "stream_options.x"),
    (COMPLETIONS, {"stream": "yes"}, 422, "stream"),
    (COMPLETIONS, {"logit_bias": {"x": 1}}, 422, "'x' is not a token id"),
    (COMPLETIONS, {"logit_bias": {"310": 1}}, 400, "310"),
    (COMPLETIONS, {"logit_bias": {"-1": 1}}, 422, "-1"),
    (COMPLETIONS, {"logit_bias": {"1": 101}}, 422, "101"),
    (COMPLETIONS, {"logit_bias": {"1": "2"}}, 422, "logit_bias"),
    (COMPLETIONS, {"logit_bias": [1]}, 422, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {str(n): 1 for n in range(1025)}}, 400, "logit_bias"),
    (COMPLETIONS, {"stop_token_ids": [310]}, 400, "310"),
    (COMPLETIONS, {"stop_token_ids": [-5]}, 400, "-5"),
    (COMPLETIONS, {"stop_token_ids": 5}, 422, "stop_token_ids"),
    (COMPLETIONS, {"seed": 1.5}, 422, "seed"),
    (COMPLETIONS, {"nonsense": 1}, 422, "nonsense: unknown field"),
    (COMPLETIONS, {"model": "other"}, 404, "'other'"),
    (COMPLETIONS, {"model": 5}, 422, "model"),
    (COMPLETIONS, {"use_beam_search": True, "stream": True}, 400, "stream"),
    (COMPLETIONS, {"use_beam_search": True, "temperature": 0.5}, 400, "temperature"),
    (COMPLETIONS, {"use_beam_search": True, "logprobs": 1}, 400, "logprobs"),
    (COMPLETIONS, {"use_beam_search": True, "n": 100}, 400, "num_beams"),
    (COMPLETIONS, {"use_beam_search": True, "length_penalty": 1e300}, 400, "length_penalty"),
    (COMPLETIONS, {"length_penalty": 2.0}, 400, "use_beam_search"),
    ("/tokenize", {}, 400, "prompt"),
    ("/tokenize", {"prompt": "x", "continue_final_message": True}, 400, "needs messages"),
    ("/tokenize", {"prompt": "x", "chat_template_kwargs": {"a": 1}}, 400, "needs messages"),
    ("/tokenize", {"prompt": ["x"]}, 422, "prompt"),
    ("/tokenize", b'{"prompt": "\\udfff"}', 422, "prompt"),
    ("/tokenize", {"prompt": "x", "model": "other"}, 404, "'other'"),
    ("/detokenize", {"tokens": [999]}, 400, "999"),
    ("/detokenize", {"tokens": [-1]}, 400, "-1"),
    ("/detokenize", {"tokens": [10**30]}, 400, "vocabulary"),
    ("/detokenize", {"tokens": "x"}, 422, "tokens"),
    (CLASSIFICATION, b"{", 400, "not valid JSON"),
    (CLASSIFICATION, {}, 422, "inputs"),
    (CLASSIFICATION, {"inputs": []}, 422, "empty list"),
    (CLASSIFICATION, {"inputs": [1]}, 422, "inputs"),
    (CLASSIFICATION, {"inputs": {"texts": "x"}}, 422, "inputs"),
    (CLASSIFICATION, b'{"inputs": "\\ud800"}', 422, "surrogate"),
    (CLASSIFICATION, {"inputs": ""}, 400, "empty"),
    (CLASSIFICATION, {"inputs": ["x", ""]}, 400, "inputs[1]"),
    (CLASSIFICATION, {"inputs": ["x"] * 257}, 400, "257"),
    (CLASSIFICATION, {"inputs": LONG}, 400, f"context is {SHORT_CONTEXT}"),
    (CLASSIFICATION, {"inputs": LONG * 50}, 400, "has at least "),
    (CLASSIFICATION, {"inputs": "x", "parameters": {"top_k": 0}}, 400, "top_k"),
    (CLASSIFICATION, {"inputs": "x", "parameters": {"top_k": "all"}}, 422, "top_k"),
    (CLASSIFICATION, {"inputs": "x", "parameters": {"function_to_apply": "f"}}, 422, "softmax"),
    (CLASSIFICATION, {"inputs": "x", "parameters": []}, 422, "parameters"),
    (CLASSIFICATION, {"inputs": "x", "parameters": {"other": 1}}, 422, "parameters.other"),
    (ANSWERS, b"{", 400, "not valid JSON"),
    (ANSWERS, {}, 422, "inputs"),
    (ANSWERS, {"inputs": "x"}, 422, "inputs"),
    (ANSWERS, {"inputs": {"question": "x"}}, 422, "inputs.context"),
    (ANSWERS, {"inputs": {**HERE, "question": " "}}, 422, "inputs.question: must not be empty"),
    (ANSWERS, {"inputs": {**HERE, "context": ""}}, 422, "inputs.context: must not be empty"),
    (ANSWERS, b'{"inputs": {"question": "\\ud800", "context": "x"}}', 422, "inputs.question"),
    (ANSWERS, {"inputs": {**HERE, "question": LONG}}, 400, f"in a window of {SHORT_CONTEXT}"),
    (ANSWERS, {"inputs": {**HERE, "context": LONG * 50}}, 400, "windows of"),
    (ANSWERS, {"inputs": HERE, "parameters": {"top_k": 0}}, 400, "top_k"),
    (ANSWERS, {"inputs": HERE, "parameters": {"top_k": 10**30}}, 400, "top_k"),
    (ANSWERS, {"inputs": HERE, "parameters": {"max_answer_len": 0}}, 400, "max_answer_len"),
    (ANSWERS, {"inputs": HERE, "parameters": {"max_seq_len": 65}}, 400, "max_seq_len"),
    (ANSWERS, {"inputs": HERE, "parameters": {"doc_stride": 64}}, 400, "doc_stride"),
    (ANSWERS, {"inputs": HERE, "parameters": {"doc_stride": -1}}, 400, "doc_stride"),
    (ANSWERS, {"inputs": HERE, "parameters": {"handle_impossible_answer": 1}}, 422, "impossible"),
    (ANSWERS, {"inputs": HERE, "parameters": {"other": 1}}, 422, "parameters.other"),
]


@pytest.mark.parametrize(
    ("route", "body", "status", "reason"), WRONG, ids=lambda each: str(each)[:40]
)
def test_invalid_requests_get_a_status_and_the_reason(
    service: str, route: str, body: Any, status: int, reason: str
) -> None:
    if route == COMPLETIONS and isinstance(body, dict):
        body = {"prompt": "x", **body}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    reply = httpx.post(service + route, content=content, headers=headers, timeout=30)
    assert_error(reply, status, reason)


HUGEST = int("9" * 4300)
HUGE: list[Any] = [int("9" * 309), HUGEST, -HUGEST, [HUGEST], [[1, HUGEST]]]
TOO_LONG = "9" * 4301  # Python's JSON reads no more digits
BODIES: list[tuple[str, type[RequestModel], dict[str, Any], list[Any]]] = [
    (COMPLETIONS, CompletionRequest, {"prompt": "x"}, []),
    (CHATS, ChatRequest, {"messages": [HELLO]}, []),
    (CHATS, ChatMessage, {"messages": [HELLO]}, ["messages", 0]),
    (COMPLETIONS, StreamOptions, {"prompt": "x", "stream": True}, ["stream_options"]),
    ("/tokenize", TokenizeRequest, {"prompt": "x"}, []),
    ("/detokenize", DetokenizeRequest, {"tokens": [1]}, []),
    (CLASSIFICATION, ClassificationRequest, {"inputs": "x"}, []),
    (CLASSIFICATION, ClassificationParameters, {"inputs": "x"}, ["parameters"]),
    (EMBEDDINGS, EmbeddingsRequest, {"input": "x"}, []),
    (ANSWERS, QuestionAnsweringRequest, {"inputs": HERE}, []),
    (ANSWERS, QuestionAndContext, {"inputs": HERE}, ["inputs"]),
    (ANSWERS, QuestionAnsweringParameters, {"inputs": HERE}, ["parameters"]),
]


@pytest.mark.parametrize(
    ("route", "model", "body", "path"),
    [*slow(BODIES[:3]), *BODIES[3:]],  # the models with the most fields
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_huge_integer_is_refused_in_every_field(
    service: str, route: str, model: type[RequestModel], body: dict[str, Any], path: list[Any]
) -> None:
    with httpx.Client(base_url=service, timeout=30) as client:
        for name, field in model.model_fields.items():
            for value in (*HUGE, {"1": HUGEST}, "TOO LONG"):
                is_dict = isinstance(value, dict)
                if is_dict and field.annotation == dict[str, Any]:
                    continue  # values are the caller's, such as a template's variables
                fields = copy.deepcopy(body)
                inner = fields
                for part in path:
                    inner = inner[part] if isinstance(inner, list) else inner.setdefault(part, {})
                inner[name] = value
                content = json.dumps(fields).replace('"TOO LONG"', TOO_LONG)
                reply = client.post(route, content=content)
                if value == "TOO LONG":
                    assert_error(reply, 400, "JSON")
                    continue
                if is_dict and field.annotation is Any:
                    assert_error(reply, 400, "")
                    continue
                reason = "at most 1024 bits" if value in HUGE else ""
                assert_error(reply, 422, reason)
                param = reply.json()["error"]["param"]
                whole = ".".join(map(str, [*path, name])).replace(".0", "[0]")
                assert param.startswith(whole)
                assert param == whole or not reason


def test_integers_may_be_written_with_a_decimal_point(service: str) -> None:
    """JSON has one kind of number, and a schema's integer is any without a fraction."""
    for route, whole, written in (
        (COMPLETIONS, {"prompt": [5, 6], "max_tokens": 3}, {"prompt": [5.0, 6], "max_tokens": 3.0}),
        ("/detokenize", {"tokens": [5, 6]}, {"tokens": [5.0, 6.0]}),
        (ANSWERS, {"inputs": HERE}, {"inputs": HERE, "parameters": {"top_k": 1.0}}),
    ):
        seeded = {"temperature": 0} if route == COMPLETIONS else {}
        replies = [
            httpx.post(service + route, json={**body, **seeded}, timeout=30).json()
            for body in (whole, written)
        ]
        for reply in replies:
            reply.pop("id", None)
            reply.pop("created", None)
        assert replies[0] == replies[1]
        assert "error" not in replies[0]


def test_a_seed_may_be_any_integer_of_a_sensible_size(service: str) -> None:
    for seed in (0, -5, 2**64, -(2**200), 10**300):
        fields = {"prompt": "x", "max_tokens": 3, "seed": seed, "n": 2}
        texts = [httpx.post(service + COMPLETIONS, json=fields, timeout=30).json() for _ in "ab"]
        assert texts[0]["choices"] == texts[1]["choices"]


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        (COMPLETIONS, {"n": 0}, "n"),
        (COMPLETIONS, {"n": "2"}, "n"),
        (COMPLETIONS, {"best_of": 129}, "best_of"),
        (COMPLETIONS, {"prompt": ["x"] * 129}, "prompt"),
        (COMPLETIONS, {"prompt": LONG}, "prompt"),
        (COMPLETIONS, {"prompt": [305]}, "prompt"),
        (COMPLETIONS, {"max_tokens": CONTEXT}, "max_tokens"),
        (COMPLETIONS, {"min_tokens": CONTEXT}, "min_tokens"),
        (COMPLETIONS, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        (COMPLETIONS, {"stop_token_ids": [1, "x"]}, "stop_token_ids[1]"),
        (COMPLETIONS, {"stop_token_ids": [310]}, "stop_token_ids"),
        (COMPLETIONS, {"logit_bias": {"310": 1}}, "logit_bias"),
        (COMPLETIONS, {"use_beam_search": True, "n": 100}, "n"),
        (COMPLETIONS, {"use_beam_search": True, "best_of": 100}, "best_of"),
        (COMPLETIONS, {"model": "other"}, "model"),
        (COMPLETIONS, [], None),
        (COMPLETIONS, b"{", None),
        (COMPLETIONS, b'{"prompt": "x", "\\ud800": 1}', None),
        ("/tokenize", {}, "prompt"),
        ("/detokenize", {"tokens": [1, "x"]}, "tokens[1]"),
        ("/detokenize", {"tokens": [999]}, "tokens"),
        (CLASSIFICATION, {}, "inputs"),
        (CLASSIFICATION, {"inputs": ["x", ""]}, "inputs[1]"),
        (CLASSIFICATION, {"inputs": ["x", LONG]}, "inputs[1]"),
        (CLASSIFICATION, {"inputs": ""}, "inputs"),
        (CLASSIFICATION, {"inputs": LONG}, "inputs"),
        (CLASSIFICATION, {"inputs": ["x"] * 257}, "inputs"),
        (CLASSIFICATION, {"inputs": "x", "parameters": {"top_k": 0}}, "parameters.top_k"),
        (CLASSIFICATION, {"inputs": "x", "parameters": {"top_k": "1"}}, "parameters.top_k"),
        (ANSWERS, {"inputs": {"question": "x"}}, "inputs.context"),
        (ANSWERS, {"inputs": {**HERE, "question": LONG}}, "inputs.question"),
        (ANSWERS, {"inputs": {**HERE, "context": LONG * 50}}, "inputs.context"),
        (ANSWERS, {"inputs": HERE, "parameters": {"top_k": 0}}, "parameters.top_k"),
        (ANSWERS, {"inputs": HERE, "parameters": {"doc_stride": 64}}, "parameters.doc_stride"),
        (ANSWERS, {"inputs": HERE, "parameters": {"top_k": 1.5}}, "parameters.top_k"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_an_error_names_the_field_by_its_path_in_the_body(
    service: str, route: str, body: Any, param: str | None
) -> None:
    if route == COMPLETIONS and isinstance(body, dict):
        body = {"prompt": "x", **body}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = httpx.post(service + route, content=content, timeout=30)
    assert_error(reply, reply.status_code, "")
    assert reply.status_code in (400, 404, 422)
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("method", "route", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/classification", 405),
        ("GET", "/classification/nothing", 404),
        ("PUT", "/question-answering", 405),
        ("GET", "/v1/models/%00", 404),
        ("GET", "/v1/models/%ff", 404),
    ],
)
def test_a_wrong_route_or_method_gets_the_same_error_body(
    service: str, method: str, route: str, status: int
) -> None:
    assert_error(httpx.request(method, service + route), status, "")


def test_a_body_of_another_type_is_refused_with_the_remedy(service: str) -> None:
    reply = httpx.post(f"{service}/v1/completions", data={"prompt": "x"})
    assert_error(reply, 422, "Content-Type: application/json")


@pytest.mark.parametrize(
    ("fields", "error", "status", "param", "code"),
    [
        ({"n": 0}, openai.BadRequestError, 400, "n", None),
        ({"prompt": LONG}, openai.BadRequestError, 400, "prompt", "context_length_exceeded"),
        ({"model": "another"}, openai.NotFoundError, 404, "model", "model_not_found"),
        ({"prompt": "x" * MAX_BODY_BYTES}, openai.APIStatusError, 413, None, None),
        ({"extra_body": {"no": 1}}, openai.UnprocessableEntityError, 422, "no", None),
    ],
    ids=lambda each: str(each)[:40],
)
def test_openais_client_maps_errors_to_its_classes(
    client: openai.OpenAI,
    fields: dict[str, Any],
    error: type[openai.APIStatusError],
    status: int,
    param: str | None,
    code: str | None,
) -> None:
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": "generation", "prompt": "x", **fields})
    assert (caught.value.status_code, caught.value.param, caught.value.code) == (
        status,
        param,
        code,
    )
    assert caught.value.body["message"] in caught.value.message  # type: ignore[index]


@pytest.mark.parametrize("error", [OverloadedError("full"), UnavailableError("not now")], ids=str)
def test_openais_client_retries_both_transient_errors(error: APIError) -> None:
    app = new_app("a service that is in trouble once")
    asked: list[str] = []

    @app.post("/v1/completions")
    async def complete(request: Request) -> Completion:
        asked.append(request.headers["x-stainless-retry-count"])
        if len(asked) == 1:
            raise error
        return Completion(model="a-model", choices=[Choice(index=0, text="at last")])

    with listening(app) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=1)
        reply = client.completions.create(model="a-model", prompt="x")
    assert reply.choices[0].text == "at last"
    assert asked == ["0", "1"]


def _subclasses(model: type[RequestModel]) -> Iterator[type[RequestModel]]:
    for each in model.__subclasses__():
        yield each
        yield from _subclasses(each)


def _lists(schema: Any) -> Iterator[dict[str, Any]]:
    """The lists of a pydantic core schema whose items may be wrong."""
    if isinstance(schema, list | tuple):
        for each in schema:
            yield from _lists(each)
    elif isinstance(schema, dict):
        if schema.get("type") == "list" and schema["items_schema"]["type"] != "any":
            yield schema
        for name, each in schema.items():
            if name not in ("metadata", "serialization"):
                yield from _lists(each)


def test_every_list_of_a_body_ends_at_its_first_wrong_item() -> None:
    """A body of 1 MiB could otherwise make half a million errors, and stop all other requests."""
    lists = {}
    for model in _subclasses(RequestModel):
        model.model_rebuild()
        assert isinstance(model.__pydantic_core_schema__, dict)
        lists[model.__name__] = list(_lists(model.__pydantic_core_schema__))
    assert sum(map(len, lists.values())) > 10
    for name, found in lists.items():
        assert all(each.get("fail_fast") for each in found), name


@pytest.mark.parametrize("route", [COMPLETIONS, CHATS, CLASSIFICATION, EMBEDDINGS, ANSWERS])
def test_many_unknown_fields_are_one_error(service: str, route: str) -> None:
    body = {f"field{number}": 0 for number in range(50_000)}
    assert_error(httpx.post(service + route, json=body, timeout=30), 422, "has 50000 fields")


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (CHATS, {"messages": [{}] * 4_000}),
        (COMPLETIONS, {"prompt": "x", "stop_token_ids": [""] * 1_000}),
        (COMPLETIONS, {"prompt": [0] * 100 + [0.5] * 10_000}),
        (EMBEDDINGS, {"input": [None] * 100_000}),
        (CLASSIFICATION, {"inputs": [None] * 200}),
        (ANSWERS, {"inputs": [{}] * 100_000}),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_list_of_wrong_items_is_one_error(service: str, route: str, body: dict[str, Any]) -> None:
    reply = httpx.post(service + route, json=body, timeout=30)
    assert_error(reply, 422, "")
    assert "more" not in reply.json()["error"]["message"]


Place = tuple[str | int, ...]
MODELS: dict[str, type[RequestModel]] = {
    COMPLETIONS: CompletionRequest,
    CHATS: ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    CLASSIFICATION: ClassificationRequest,
    EMBEDDINGS: EmbeddingsRequest,
    ANSWERS: QuestionAnsweringRequest,
}


def _arrays(whole: dict[str, Any], schema: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    """The places of a body that may be lists, and the lists' schemas."""
    if "$ref" in schema:
        schema = whole["$defs"][schema["$ref"].rpartition("/")[2]]
    for each in schema.get("anyOf", ()):
        shared = {name: schema[name] for name in ("items", "maxItems") if name in schema}
        yield from _arrays(whole, {**each, **shared}, place)
    if schema.get("type") == "array":
        yield place, schema
        yield from _arrays(whole, schema.get("items", {}), (*place, 0))
    for name, each in schema.get("properties", {}).items():
        yield from _arrays(whole, each, (*place, name))


def _item(whole: dict[str, Any], schema: Any) -> Any:
    """An item that a schema allows."""
    if "$ref" in schema:
        schema = whole["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return _item(whole, schema["anyOf"][0])
    if "const" in schema or "examples" in schema:
        return schema.get("const", schema.get("examples", [None])[0])
    if schema.get("type") == "object":
        return {name: _item(whole, schema["properties"][name]) for name in schema["required"]}
    return {"string": "text", "integer": 1, "array": [1]}.get(schema.get("type"), "text")


def test_lists_are_counted_before_their_items_are_looked_at(service: str) -> None:
    """Every list of every body has a limit in the document; further, wrong, items are not seen."""
    tried = set()
    for route, model in MODELS.items():
        whole = model.model_json_schema(by_alias=True)
        for place, schema in _arrays(whole, whole, ()):
            assert "maxItems" in schema, (route, place)
            most = schema["maxItems"]
            if most == 0:
                continue
            value: Any = [_item(whole, schema["items"]), *[None] * most]
            last = max(at for at, each in enumerate(place) if isinstance(each, str))
            field = ".".join(map(str, place[last:]))  # prompt.0 for a list in a list
            for index in reversed(range(1, len(place))):
                value = [value] if place[index] == 0 else {place[index]: value}
            if route in (CHATS, "/tokenize") and place[0] == "messages" and len(place) > 1:
                value[0] = {"role": "user", "content": "x", **value[0]}
            reply = httpx.post(service + route, json={place[0]: value}, timeout=30)
            assert_error(reply, 400, f"{field} may have at most {most} items, got {most + 1}")
            tried.add((route, place))
    assert len(tried) > 15

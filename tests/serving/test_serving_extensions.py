"""vLLM's extensions of completions: token ids, stop reasons, special tokens, cut prompts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from serving_client import (
    CLASSIFICATION,
    assert_alike,
    assert_error,
    complete,
    greedy,
    streamed,
    text_of,
)
from serving_models import CONTEXT, PROMPTS, SHORT_CONTEXT, Models
from starlette.requests import ClientDisconnect
from starlette.types import Message

from gptj.serving.completions.schemas import ModelCard
from gptj.serving.completions.server_sent_events import EventStreamResponse, server_sent

pytest_plugins = ["serving_fixtures"]


def test_token_ids_are_returned_if_requested(service: str, models: Models) -> None:
    prompts = [models.tokenizer.encode(prompt) for prompt in PROMPTS[:2]]
    for choice, prompt in zip(
        complete(service, prompt=PROMPTS[:2], return_token_ids=True)["choices"],
        prompts,
        strict=True,
    ):
        assert choice["prompt_token_ids"] == prompt
        assert choice["token_ids"] == greedy(models, prompt)
    plain = complete(service, prompt="x")["choices"][0]
    assert not {"prompt_token_ids", "token_ids"} & plain.keys()
    # Tokens whose text is held back or never sent are among them, in a stream as well.
    stop = text_of(models, greedy(models, PROMPTS[0]))[3:5]
    fields: dict[str, Any] = {"prompt": PROMPTS[0], "stop": stop, "return_token_ids": True}
    (whole,) = complete(service, **fields)["choices"]
    assert whole["token_ids"] == greedy(models, PROMPTS[0])[: len(whole["token_ids"])]
    assert models.tokenizer.decode(whole["token_ids"]).find(stop) >= 0
    with httpx.stream(
        "POST",
        f"{service}/v1/completions",
        json={"temperature": 0, "max_tokens": 12, **fields, "stream": True},
    ) as reply:
        lines = [line for line in reply.iter_lines() if line.startswith("data: {")]
    parts = [httpx.Response(200, content=line[6:]).json()["choices"][0] for line in lines]
    assert [token for part in parts for token in part["token_ids"]] == whole["token_ids"]
    assert parts[0]["prompt_token_ids"] == prompts[0]
    assert all("prompt_token_ids" not in part for part in parts[1:])
    beams = complete(
        service, prompt="x", use_beam_search=True, n=2, return_token_ids=True, max_tokens=5
    )["choices"]
    for beam in beams:
        assert text_of(models, beam["token_ids"]) == beam["text"]


def test_the_stop_reason_is_the_requests_stop(service: str, models: Models) -> None:
    token = models.tokenizer.encode("T")[0]
    eos = models.tokenizer.eos_token_id
    text = text_of(models, greedy(models, PROMPTS[0]))
    cases: list[tuple[dict[str, Any], str, Any]] = [
        ({}, "length", None),
        ({"stop": ["never", text[3:5]]}, "stop", text[3:5]),
        ({"stop_token_ids": [token], "logit_bias": {str(token): 100}}, "stop", token),
        ({"logit_bias": {str(eos): 100}}, "stop", None),
        ({"logit_bias": {str(eos): 100}, "stop_token_ids": [eos]}, "stop", None),
        (
            {"logit_bias": {str(eos): 100}, "stop_token_ids": [eos], "ignore_eos": True},
            "stop",
            eos,
        ),
    ]
    for fields, reason, stop_reason in cases:
        for extra in ({}, {"use_beam_search": True}):
            (choice,) = complete(service, prompt=PROMPTS[0], **fields, **extra)["choices"]
            if choice["finish_reason"] == reason:  # a beam may end elsewhere
                assert choice["stop_reason"] == stop_reason, (fields, extra)
            else:
                assert extra
        (choice,) = streamed(service, prompt=PROMPTS[0], **fields)
        assert (choice["finish_reason"], choice["stop_reason"]) == (reason, stop_reason)


def test_special_tokens_are_left_out_unless_requested(service: str, models: Models) -> None:
    eos = models.tokenizer.eos_token
    bias = {str(models.tokenizer.eos_token_id): 100}
    fields: dict[str, Any] = {"prompt": "x", "logit_bias": bias, "ignore_eos": True}
    for max_tokens in (1, 3):
        fields["max_tokens"] = max_tokens
        (left_out,) = complete(service, **fields)["choices"]
        assert left_out["text"] == ""
        (shown,) = complete(service, **fields, skip_special_tokens=False)["choices"]
        assert shown["text"] == max_tokens * str(eos)
        assert streamed(service, **fields)[0]["text"] == ""
    (logged,) = complete(service, **fields, logprobs=0)["choices"]
    assert logged["logprobs"]["tokens"] == 3 * [eos]
    assert logged["logprobs"]["text_offset"] == [0, 0, 0]


@pytest.mark.slow
def test_a_prompt_is_truncated_to_its_last_tokens(service: str, models: Models) -> None:
    ids = models.tokenizer.encode(PROMPTS[4])
    for prompt in (PROMPTS[4], ids):
        (choice,) = complete(
            service, prompt=prompt, truncate_prompt_tokens=5, return_token_ids=True
        )["choices"]
        assert choice["prompt_token_ids"] == ids[-5:]
        assert choice["token_ids"] == greedy(models, ids[-5:])
        (choice,) = complete(
            service, prompt=prompt, truncate_prompt_tokens=500, return_token_ids=True
        )["choices"]
        assert choice["prompt_token_ids"] == ids
    long = "The tower stands. " * 1000
    for fields, room in (
        ({"max_tokens": 30}, 30),
        ({"max_tokens": None}, 16),
        ({"max_tokens": None, "min_tokens": 20}, 20),
    ):
        reply = complete(service, prompt=long, truncate_prompt_tokens=-1, **fields)
        assert reply["usage"]["prompt_tokens"] == CONTEXT - room
    echoed = complete(service, prompt=ids, truncate_prompt_tokens=2, echo=True, max_tokens=0)
    assert PROMPTS[4].endswith(echoed["choices"][0]["text"])
    for wrong in (0, -2):
        body = {"prompt": "x", "truncate_prompt_tokens": wrong}
        reply = httpx.post(f"{service}/v1/completions", json=body)
        assert_error(reply, 400, "1 or more, or -1")
    body = {"prompt": long, "truncate_prompt_tokens": CONTEXT, "max_tokens": 1}
    assert_error(httpx.post(f"{service}/v1/completions", json=body), 400, "context is 2048")


def test_a_text_to_classify_may_be_truncated(service: str, models: Models) -> None:
    long = "The tower stands. " * 100
    body = {"inputs": long}
    reply = httpx.post(service + CLASSIFICATION, json=body)
    assert_error(reply, 400, "set parameters.truncation")
    cut = models.tokenizer.decode(models.tokenizer.encode(long)[:SHORT_CONTEXT])
    expected = httpx.post(service + CLASSIFICATION, json={"inputs": cut}).json()
    reply = httpx.post(service + CLASSIFICATION, json={**body, "parameters": {"truncation": True}})
    assert_alike(reply.json(), expected)


def test_a_stream_is_closed_at_once_when_its_client_has_left() -> None:
    closed = []

    async def chunks() -> AsyncGenerator[ModelCard]:
        try:
            while True:
                yield ModelCard(id="m", created=1, root="r", max_model_len=1)
        finally:
            closed.append("chunks")

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            raise OSError("the client has left")

    async def run() -> None:
        response = EventStreamResponse(server_sent(chunks()))
        scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
        with pytest.raises(ClientDisconnect):
            await response(scope, receive, send)
        assert closed == ["chunks"]

    asyncio.run(run())


def test_usage_counts_cached_prompt_tokens(service: str, models: Models) -> None:
    """All full pages but that of the last token, which is always computed."""
    text = "cached? " + " ".join(str(number) for number in range(40))

    def cached(usage: dict[str, Any], prompts: int = 1) -> bool:
        count = usage["prompt_tokens"] // prompts
        found = usage["prompt_tokens_details"]["cached_tokens"]
        assert found in (0, (count - 1) // 16 * 16 * prompts), usage
        return found > 0

    fields: dict[str, Any] = {"prompt": text, "max_tokens": 2}
    assert not cached(complete(service, **fields)["usage"])
    assert cached(complete(service, **fields)["usage"])
    assert cached(complete(service, **fields, n=3)["usage"])
    assert cached(complete(service, **fields, use_beam_search=True, n=2)["usage"])
    assert cached(complete(service, **{**fields, "prompt": [text, text]})["usage"], 2)
    body = {**fields, "stream": True, "stream_options": {"include_usage": True}}
    lines = httpx.post(f"{service}/v1/completions", json=body).text.split("\n\n")
    assert cached(json.loads(lines[-3].removeprefix("data: "))["usage"])
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
    usages = [
        httpx.post(f"{service}/v1/chat/completions", json=chat).json()["usage"] for _ in range(2)
    ]
    assert [cached(usage) for usage in usages] == [False, True]

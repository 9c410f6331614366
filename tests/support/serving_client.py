"""Asking the services over HTTP, and comparing replies with each other and with the models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
import torch
from serving_models import Models

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
CLASSIFICATION, ANSWERS = "/classification", "/question-answering"
EMBEDDINGS = "/v1/embeddings"


def complete(service: str, **fields: Any) -> dict[str, Any]:
    """The reply to a request; greedy, unless it says otherwise."""
    body = {"temperature": 0, "max_tokens": 12, **fields}
    reply = httpx.post(f"{service}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def streamed(service: str, **fields: Any) -> list[dict[str, Any]]:
    """The choices that the chunks of a stream make together, as a reply has them."""
    body = {"temperature": 0, "max_tokens": 12, **fields, "stream": True}
    choices: dict[int, dict[str, Any]] = {}
    with httpx.stream("POST", f"{service}/v1/completions", json=body, timeout=60) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    for chunk in chunks:
        for part in chunk["choices"]:
            whole = choices.setdefault(part["index"], part)
            assert part is whole or whole["finish_reason"] is None
            if part is not whole:
                whole["text"] += part["text"]
                whole["finish_reason"] = part["finish_reason"]
                whole["stop_reason"] = part["stop_reason"]
                if "token_ids" in part:
                    whole["token_ids"] += part["token_ids"]
                for name in part["logprobs"] or ():
                    whole["logprobs"][name] += part["logprobs"][name]
    return [choices[index] for index in sorted(choices)]


def greedy(models: Models, prompt: str | list[int], **arguments: Any) -> list[int]:
    """The new ids by the library's own generate."""
    ids = models.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    arguments = {"max_new_tokens": 12, **arguments}
    return models.generation.generate(torch.tensor([ids]), **arguments)[0, len(ids) :].tolist()


def text_of(models: Models, ids: Sequence[int]) -> str:
    eos = models.tokenizer.eos_token_id
    return models.tokenizer.decode([token for token in ids if token != eos])


def assert_alike(ours: Any, theirs: Any) -> None:
    """Equal; numbers but for 1e-4."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_alike(ours[key], theirs[key])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_alike(one, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-4)
    else:
        assert ours == theirs


def assert_error(reply: httpx.Response, status: int, reason: str) -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert reason in error["message"], error

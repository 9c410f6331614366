"""Replies with speculation equal those without, though several tokens arrive at a time."""

from __future__ import annotations

from typing import Any

import pytest
from serving_client import complete, greedy, streamed, text_of
from serving_models import PROMPTS, Models

pytest_plugins = ["serving_fixtures"]

LONG = {"max_tokens": 60, "ignore_eos": True}


def fields_of(models: Models) -> dict[str, dict[str, Any]]:
    prompt = PROMPTS[0] * 3
    text = text_of(models, greedy(models, prompt, max_new_tokens=60, eos_token_id=[]))
    return {
        "stop strings": {"stop": [text[20:24]], "return_token_ids": True},
        "a stop string that is shown": {"stop": text[30:33], "include_stop_str_in_output": True},
        "samples": {"n": 3, "best_of": 4, "temperature": 0.3, "seed": 1},
        "logprobs": {"logprobs": 2, "echo": True, "repetition_penalty": 0.7},
        "bans": {"bad_words": [text[:3]], "min_tokens": 20, "ignore_eos": False},
        "a format": {"structured_outputs": {"regex": "(ab){40}"}, "max_tokens": 100},
    }


KINDS = ("stop strings", "a stop string that is shown", "samples", "logprobs", "bans", "a format")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_replies_equal_those_without(service: str, models: Models, kind: str) -> None:
    fields = {**LONG, "prompt": PROMPTS[0] * 3, **fields_of(models)[kind]}
    plain, drafting = (complete(f"{service}{path}", **fields) for path in ("", "/drafting"))
    counts = "prompt_tokens", "completion_tokens"
    assert [drafting["usage"][name] for name in counts] == [plain["usage"][name] for name in counts]
    for ours, theirs in zip(drafting["choices"], plain["choices"], strict=True):
        assert ours["text"] == theirs["text"]
        assert ours.get("token_ids") == theirs.get("token_ids")
        assert ours["finish_reason"] == theirs["finish_reason"]
        assert ours["stop_reason"] == theirs["stop_reason"]
        if ours["logprobs"]:
            assert ours["logprobs"]["tokens"] == theirs["logprobs"]["tokens"]
    if "best_of" in fields:
        return  # not in a stream
    (choice,) = streamed(f"{service}/drafting", **fields)
    assert choice["text"] == plain["choices"][0]["text"]
    assert choice.get("token_ids") == plain["choices"][0].get("token_ids")

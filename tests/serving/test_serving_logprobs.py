"""Log-probabilities of prompts and outputs, and their use in best_of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from serving_client import assert_alike, complete, streamed
from serving_models import PROMPTS, Models

pytest_plugins = ["serving_fixtures"]


def bytes_of(token: str) -> bytes:
    r"""Of a token in OpenAI's notation, in which a part of a character is `bytes:\xf0`."""
    if token.startswith("bytes:"):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode()


def test_echo_with_logprobs_scores_the_prompt(service: str, models: Models) -> None:
    prompt = PROMPTS[4]
    reply = complete(service, prompt=prompt, max_tokens=0, echo=True, logprobs=2)
    ids = models.tokenizer.encode(prompt)
    expected = models.generation(torch.tensor([ids])).logits[0].detach().log_softmax(dim=-1)
    choice = reply["choices"][0]
    assert choice["text"] == prompt
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(
        [float(expected[place, token]) for place, token in enumerate(ids[1:])], abs=1e-4
    )
    for place, top in enumerate(logprobs["top_logprobs"][1:]):
        best = expected[place].topk(2).values.tolist()
        assert sorted(top.values(), reverse=True)[:2] == pytest.approx(best, abs=1e-4)
    done = b""
    for place, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert len(done.decode(errors="ignore")) == place
        done += bytes_of(token)
    assert done.decode() == prompt
    assert reply["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 0,
        "total_tokens": len(ids),
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_best_of_returns_those_of_the_highest_mean_logprob(service: str) -> None:
    fields = {"prompt": "The", "temperature": 1, "seed": 9, "logprobs": 0, "ignore_eos": True}
    candidates = complete(service, **fields, n=5)["choices"]
    assert len({choice["text"] for choice in candidates}) == 5

    def mean(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    best = complete(service, **fields, n=2, best_of=5)
    expected = sorted(candidates, key=mean, reverse=True)[:2]
    assert [choice["text"] for choice in best["choices"]] == [each["text"] for each in expected]
    assert best["usage"]["completion_tokens"] == 5 * 12
    without = complete(service, **{**fields, "logprobs": None}, n=1, best_of=5)["choices"]
    assert without[0]["text"] == expected[0]["text"]
    assert without[0]["logprobs"] is None


def test_best_of_counts_the_probability_of_ending(service: str, models: Models) -> None:
    """An output that ends at once is no better than the others for having no tokens."""
    eos = models.tokenizer.eos_token_id
    fields = {
        "prompt": "The",
        "temperature": 1,
        "logprobs": 0,
        "max_tokens": 2,
        "logit_bias": {str(eos): 6},
    }
    empty = 0
    for seed in range(6):
        candidates = complete(service, **fields, seed=seed, n=4)["choices"]
        if len({choice["text"] == "" for choice in candidates}) == 1:
            continue
        best = complete(service, **fields, seed=seed, n=1, best_of=4)["choices"][0]
        empty += best["text"] == ""
    assert empty == 0  # by the model alone, eos is far less likely than the other tokens


def test_the_chosen_token_is_among_the_top_logprobs(service: str) -> None:
    reply = complete(service, prompt="The", temperature=2, seed=1, logprobs=1, echo=True)
    logprobs = reply["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"][0] is None
    sizes = set()
    for token, value, top in list(
        zip(*(logprobs[k] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True)
    )[1:]:
        assert top[token] == value
        sizes.add(len(top))
    assert 2 in sizes
    assert sizes <= {1, 2}


def test_eos_is_among_the_logprobs_as_the_last_token(service: str, models: Models) -> None:
    """With text before it, echoed and without, and streamed."""
    tokenizer = models.tokenizer
    eos, prompt = tokenizer.eos_token_id, tokenizer.encode(PROMPTS[0])
    expected = models.generation(torch.tensor([prompt])).logits[0, -1].detach().log_softmax(dim=-1)
    fields: dict[str, Any] = {"prompt": PROMPTS[0], "logprobs": 2, "logit_bias": {str(eos): 100}}
    for echo in (False, True):
        (choice,) = complete(service, **fields, echo=echo)["choices"]
        logprobs, before = choice["logprobs"], len(prompt) if echo else 0
        assert logprobs["tokens"][before:] == [tokenizer.eos_token]
        assert logprobs["text_offset"][before:] == [len(choice["text"])]
        assert logprobs["token_logprobs"][-1] == pytest.approx(float(expected[eos]), abs=1e-4)
        top = logprobs["top_logprobs"][-1]
        assert sorted(top.values())[-2:] == pytest.approx(
            sorted(expected.topk(2).values.tolist()), abs=1e-4
        )
        assert_alike(streamed(service, **fields, echo=echo), [choice])
    after = complete(service, **fields, min_tokens=3)
    assert after["choices"][0]["logprobs"]["tokens"][3:] == [tokenizer.eos_token]
    assert after["usage"]["completion_tokens"] == 4

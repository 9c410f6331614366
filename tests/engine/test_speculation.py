"""Speculation: outputs are those without it, and it is cheap where it fails."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_caller import (
    EOS,
    Caller,
    WatchedRunner,
    assert_same,
    assert_written_pages_are_not_shared,
    submit,
    tiny_model,
    tokens,
)
from plain_operations import PlainOperations

from gptj import GPTJForCausalLM
from gptj.engine.engine import Engine
from gptj.engine.runners.base import Runner, StepBatch
from gptj.engine.runners.cpu.library import UnsupportedError
from gptj.engine.runners.cpu.runner import CpuRunner
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.engine.runners.cuda.support import operations_for
from gptj.engine.runners.torch_runner import TorchRunner
from gptj.engine.sampler import Sampler
from gptj.engine.speculation import CANDIDATES, Drafter, NgramIndex, Speculation
from gptj.sampling import SamplingParams


@pytest.fixture(scope="module")
def model() -> GPTJForCausalLM:
    return tiny_model(n_positions=256)


def occurrence(tokens: Sequence[int], least: int, most: int) -> int:
    """The slow and plain way: where what followed the best earlier occurrence begins, or 0."""
    for size in range(min(most, len(tokens) - 1), least - 1, -1):
        for start in range(len(tokens) - 1, size - 1, -1):
            if tokens[start - size : start] == tokens[-size:]:
                return start
    return 0


@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 3), (2, 4), (3, 3)])
def test_drafts_continue_the_latest_of_the_longest_occurrences(least: int, most: int) -> None:
    rng = random.Random(least)
    for _ in range(40):
        sequence: list[int] = []
        index = NgramIndex(least, most)
        while len(sequence) < 40:
            sequence += rng.choices(range(4), k=rng.randrange(1, 6))
            start = occurrence(sequence, least, most)
            assert index.extend(sequence) == (start > 0)
            expected = list(sequence)
            for place in range(7 if start else 0):
                expected.append(expected[start + place])
            if len(sequence) < CANDIDATES:
                assert index.continuation(sequence, 7) == expected[len(sequence) :]
            else:
                assert bool(index.continuation(sequence, 7)) == (start > 0)


def prompt_of(rng: random.Random) -> list[int]:
    """Random, or with much to repeat."""
    words = [[rng.randrange(2, 97) for _ in range(rng.randrange(1, 9))] for _ in range(3)]
    prompt = [token for _ in range(rng.randrange(1, 9)) for token in rng.choice(words)]
    return prompt[:90] if rng.random() < 0.8 else tokens(rng.randrange(1, 60), rng.randrange(9))


def params_of(rng: random.Random, prompt: Sequence[int]) -> SamplingParams:
    """Any combination of what the sampler and the engine can do."""
    most = rng.randrange(1, 60)
    chosen: dict[str, Any] = {"max_tokens": most, "temperature": 0}
    options: list[dict[str, Any]] = [
        {"temperature": rng.choice([0.1, 0.3, 1.0]), "seed": rng.randrange(9)},
        {"ignore_eos": True},
        {"logprobs": rng.randrange(3)},
        {"prompt_logprobs": rng.randrange(3)},
        {"min_tokens": rng.randrange(most + 1)},
        {"stop_token_ids": tuple(rng.sample(range(97), 2)) + tuple(prompt[-1:])},
        {rng.choice(["repetition_penalty"]): rng.choice([0.5, 1.3])},
        {rng.choice(["presence_penalty", "frequency_penalty"]): rng.choice([-0.5, 0.5])},
        {"logit_bias": {token: rng.choice([3.0, -3.0]) for token in prompt[-5:]}},
        {"allowed_token_ids": tuple(sorted({EOS, *prompt, *range(50, 60)}))},
        {"bad_words_ids": ((rng.choice(prompt),), tuple(prompt[-3:]), tuple(prompt[:2]))},
        {"top_p": 0.8, "top_k": 20},
        {"min_p": 0.05},
    ]
    for option in options:
        if rng.random() < 0.25:
            chosen |= option
    return SamplingParams(**chosen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed",
    [
        0,
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2)),
        *(pytest.param(seed, marks=[pytest.mark.slow, pytest.mark.nightly]) for seed in (3, 4, 5)),
    ],
)
def test_outputs_equal_those_without_speculation(model: GPTJForCausalLM, seed: int) -> None:
    """With all sampling parameters, several samples, chunks, prefix caching and preemption."""
    rng = random.Random(seed)
    settings: dict[str, Any] = {
        "eos_ids": [EOS],
        "max_num_seqs": rng.choice([8, 64] if seed % 2 else [3, 64]),
        "max_num_batched_tokens": rng.choice([64, 256]),
        "prefix_caching": seed % 3 > 0,
        "speculation": Speculation(
            num_speculative_tokens=rng.choice([2, 8, 15]), prompt_lookup_min=rng.choice([1, 2])
        ),
    }

    def check(batch: StepBatch) -> None:
        assert_written_pages_are_not_shared(batch)
        assert len(batch.ids_T) <= settings["max_num_batched_tokens"]

    runner = WatchedRunner(model, 14 if seed % 2 else 200, check)
    drafting = Engine(runner, **settings)
    plain = Engine(TorchRunner(model, 200), eos_ids=[EOS])
    pairs: list[tuple[Caller, Caller]] = []
    for _ in range(25):
        prompt = prompt_of(rng)
        params = [params_of(rng, prompt)] * rng.choice([1, 1, 1, 3])
        callers = [[Caller() for _ in params] for _ in range(2)]
        for engine, some in zip((plain, drafting), callers, strict=True):
            each = [replace(one, seed=(one.seed or 0) + i) for i, one in enumerate(params)]
            for caller, ticket in zip(some, engine.submit_many(prompt, each, some), strict=True):
                caller.ticket = ticket
        pairs += zip(*callers, strict=True)
    for expected, found in pairs:
        assert_same(found, expected)
    stats = drafting.stats()
    assert stats.running == stats.waiting == stats.pages_used == 0
    assert 0 < stats.spec_decode_num_accepted_tokens < stats.spec_decode_num_draft_tokens
    assert stats.steps < plain.stats().tokens_out
    if seed % 2:
        assert stats.preemptions > 0
    # The prefix cache holds what the outputs are, not what was drafted.
    for expected, _ in pairs:
        said = expected.ticket._request.tokens[:200]
        assert submit(drafting, said, max_tokens=3).ids == submit(plain, said, max_tokens=3).ids
    assert (drafting.stats().prefix_tokens_hit > 0) == settings["prefix_caching"]
    drafting.close()
    plain.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "int8", "gpu"])
def test_outputs_on_other_runners_equal_those_without_speculation(
    model: GPTJForCausalLM, kind: Any, device: torch.device
) -> None:
    """Those of our CPU kernels bit by bit: a token's logits do not depend on its step."""
    runner = runner_of(kind, model, device)
    rng = random.Random(3)
    prompts = [prompt_of(rng) for _ in range(5)]
    settings: list[dict[str, Any]] = [
        {"ignore_eos": True},
        {"temperature": 0.3, "seed": 1, "frequency_penalty": -0.5},
    ]
    callers = []
    for speculation in (None, Speculation()):
        engine = Engine(runner, eos_ids=[EOS], speculation=speculation)
        callers.append(
            [
                submit(engine, prompt, max_tokens=40, logprobs=1, **more)
                for prompt in prompts
                for more in settings
            ]
        )
        for caller in callers[-1]:
            caller.wait()
        stats = engine.stats()
        engine.close()
    assert 0 < stats.spec_decode_num_accepted_tokens < stats.spec_decode_num_draft_tokens
    for expected, found in zip(*callers, strict=True):
        if isinstance(runner, CpuRunner):
            assert found.events == expected.events
        else:
            assert_same(found, expected)
    runner.close()


def runner_of(kind: Any, model: GPTJForCausalLM, device: torch.device) -> Runner:
    if kind == "gpu":
        model = copy.deepcopy(model).to(device)
        plain = PlainOperations(model.dtype, model.config.layer_norm_epsilon)
        return CudaRunner(model, 200, plain if device.type == "cpu" else operations_for(model))
    if device.type != "cpu":
        pytest.skip("these are a CPU's kernels")
    try:
        return CpuRunner(model, 200, kind, threads=1)
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_a_sampled_token_has_the_models_distribution_whatever_is_drafted() -> None:
    """Chi-squared over a small vocabulary, of the token after an accepted one, at p = 1e-4."""
    size, rows = 6, 5000
    sampler = Sampler([], torch.device("cpu"), size)
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5, 2.0, 0.2], [1.0, 0.0, 0.7, -2.0, 0.3, 0.1]])
    followed = np.zeros(size)
    first = np.zeros(size)
    for start in range(0, rows, 1000):
        keys = list(range(start, start + 1000))
        for key in keys:
            sampler.add(key, SamplingParams(temperature=1.0, seed=key), [1], [])
        drafts = {place: [4] for place in range(1000)}
        sampled = sampler.sample(logits.repeat(1000, 1), keys, drafts)
        for place in range(1000):
            first[sampled.tokens[2 * place]] += 1
            if sampled.tokens[2 * place] == 4:
                assert sampled.counts[place] == 2
                followed[sampled.tokens[2 * place + 1]] += 1
            else:
                assert sampled.counts[place] == 1
    for counts, row in ((first, logits[0]), (followed, logits[1])):
        expected = row.softmax(dim=-1).numpy() * counts.sum()
        assert ((counts - expected) ** 2 / expected).sum() < 25.7  # 5 degrees of freedom
    sampler.close()


def test_failing_drafts_become_rare_and_accepted_ones_longer() -> None:
    drafter = Drafter(Speculation(num_speculative_tokens=8))
    text = [5, 6, 7] * 4

    def drafted(steps: int, accepted: bool) -> list[int]:
        lengths = []
        for _ in range(steps):
            length = len(drafter.propose(text, 100, 0.1))
            lengths.append(length)
            if length:
                drafter.note(length, length if accepted else 0, 0.1)
        return lengths

    # At 0.1 of a step for each token, less than 3 % of 100 steps.
    assert 0 < sum(drafted(100, accepted=False)) < 30
    assert sum(drafted(1000, accepted=False)) < 20
    succeeding = drafted(400, accepted=True)
    assert succeeding[-100:] == [8] * 100

"""Async scheduling: launching a step before the last one's tokens are known changes no output.

The GPU's runner, with PyTorch's operations on the CPU. There a step is computed at once, but its
host's copy of unknown ids is overwritten, and the order of calls is checked.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engine_caller import Caller, assert_same, search, submit, submit_many, tiny_model, tokens
from plain_operations import PlainOperations
from slow_cases import slow
from torch import Tensor

from gptj import GPTJForCausalLM
from gptj.engine.engine import Engine
from gptj.engine.events import Failed, Finished, TokenEvent
from gptj.engine.page_pool import extend_digests
from gptj.engine.request import BeamParams
from gptj.engine.runners.base import PAGE_SIZE, StepBatch
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.engine.sampler import PendingOutput
from gptj.engine.speculation import Speculation
from gptj.engine.stats import EngineStats
from gptj.sampling import SamplingParams
from gptj.workers.worker_thread import WorkerThread

VOCABULARY = 97
CONTEXT = 64


class Runner(CudaRunner):
    """Notes how each step got its ids; `before` may raise."""

    def __init__(self, model: GPTJForCausalLM, num_pages: int, *, asynchronous: bool) -> None:
        operations = PlainOperations(model.dtype, model.config.layer_norm_epsilon)
        super().__init__(model, num_pages, operations)
        self.asynchronous = asynchronous
        self.ahead: list[bool] = []  # whether each step's ids were unknown to the host
        self.tokens: list[int] = []  # of each step
        self.before: Callable[[], None] = lambda: None

    def step(self, batch: StepBatch) -> Tensor:
        self.before()
        self.tokens.append(len(batch.ids_T))
        self.ahead.append(batch.device_ids is not None)
        if batch.device_ids is not None:
            batch.ids_T[: len(batch.device_ids)] = VOCABULARY - 1  # not to be read
        return super().step(batch)


class Steps:
    """An engine without a thread, whose steps the test runs."""

    def __init__(self, runner: Runner, **settings: Any) -> None:
        self.runner = runner
        self.engine = Engine(runner, eos_ids=[], **{"max_num_seqs": 6, **settings})

    @property
    def busy(self) -> bool:
        return bool(len(self.engine._queue) or self.engine._scheduler.running)

    def step(self) -> None:
        try:
            self.engine._step()
        except Exception as error:
            self.engine._recover(error)

    def finish(self) -> None:
        while self.busy:
            self.step()


@pytest.fixture(scope="module")
def model() -> GPTJForCausalLM:
    return tiny_model(n_positions=CONTEXT)


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerThread, "start", lambda self: None)


def steps(
    model: GPTJForCausalLM, num_pages: int = 64, *, asynchronous: bool = True, **settings: Any
) -> Steps:
    return Steps(Runner(model, num_pages, asynchronous=asynchronous), **settings)


def random_params(rng: random.Random, prompt: list[int]) -> dict[str, Any]:
    """Mostly greedy and sampled requests, and some of all others."""
    room = CONTEXT - len(prompt)
    length = rng.choice([1, 2, rng.randint(1, room), room, room])
    params: dict[str, Any] = {"max_tokens": length}
    if rng.random() < 0.6:
        params |= {"temperature": rng.choice([0.7, 1.5]), "seed": rng.randrange(99)}
        params |= rng.choice([{}, {}, {"top_k": 5}, {"min_p": 0.05}, {"top_p": 0.9}])
    if rng.random() < 0.5:
        params["stop_token_ids"] = tuple(rng.sample(range(VOCABULARY), 4))
    if rng.random() < 0.2:
        params["min_tokens"] = rng.randint(0, length)
    if rng.random() < 0.1:
        params["logit_bias"] = {3: 2.0}
    if rng.random() < 0.3:
        params |= rng.choice(
            [
                {"presence_penalty": 1.0},
                {"repetition_penalty": 1.3},
                {"logprobs": 2},
                {"bad_words_ids": ((7,), (8, 9))},
                {"allowed_token_ids": tuple(range(30))},
                {"prompt_logprobs": 1},
            ]
        )
    return params


def random_prompt(rng: random.Random) -> list[int]:
    """Some share a prefix."""
    start = tokens(rng.choice([0, 16, 32]))
    return start + [rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 3, 15, 16, 17, 20]))]


def prefix_of(caller: Caller, expected: Caller) -> bool:
    """Whether a cancelled request's tokens are the first of what it would have got."""
    ids, others = (
        [event.token_id for event in each.events if isinstance(event, TokenEvent)]
        for each in (caller, expected)
    )
    return ids == others[: len(ids)]


@pytest.mark.slow
@pytest.mark.parametrize("pages", [64, 12, 8], ids=["plain", "preemption", "few pages"])
def test_random_requests_get_the_same_events_as_without(model: GPTJForCausalLM, pages: int) -> None:
    stats = [check_random_requests(model, seed, pages) for seed in range(3)]
    assert (sum(each.preemptions for each in stats) > 0) == (pages < 64)
    assert sum(each.cancellations for each in stats) > 0


def check_random_requests(model: GPTJForCausalLM, seed: int, pages: int) -> EngineStats:
    """Each gets the events of an engine that waits for its steps, or their start if cancelled."""
    rng = random.Random(seed)
    prompts = [random_prompt(rng) for _ in range(30)]
    chosen = [random_params(rng, prompt) for prompt in prompts]
    reference = steps(model, asynchronous=False)
    expected = [
        submit(reference.engine, prompt, **each)
        for prompt, each in zip(prompts, chosen, strict=True)
    ]
    reference.finish()
    assert not any(reference.runner.ahead)
    ours = steps(model, pages, max_num_batched_tokens=24)
    callers: list[Caller] = []
    cancelled: set[int] = set()
    while len(callers) < len(prompts) or ours.busy:
        if len(callers) < len(prompts) and (not ours.busy or rng.random() < 0.4):
            for _ in range(rng.randint(1, 3)):
                if len(callers) < len(prompts):
                    place = len(callers)
                    callers.append(submit(ours.engine, prompts[place], **chosen[place]))
        if rng.random() < 0.05:
            place = rng.randrange(len(callers))
            if not callers[place].ended.is_set():
                callers[place].ticket.cancel()
                cancelled.add(place)
        ours.step()
    assert sum(ours.runner.ahead) > 20
    stats = ours.engine.stats()
    assert stats.running == stats.waiting == stats.pages_used == 0
    assert stats.cancellations <= len(cancelled)
    for place, caller in enumerate(callers):
        assert sum(isinstance(event, Finished | Failed) for event in caller.events) == 1
        if place in cancelled and caller.events[-1] == Finished("cancelled"):
            assert prefix_of(caller, expected[place])
        else:
            assert_same(caller, expected[place])
    check_cached_pages(ours, model, list(map(sequence, prompts, callers)))
    return stats


@pytest.mark.slow
@pytest.mark.parametrize("pages", [64, 20])
@pytest.mark.parametrize("seed", range(3))
def test_samples_and_beams_among_others_get_the_same_events(
    model: GPTJForCausalLM, seed: int, pages: int
) -> None:
    """They start in steps that wait for the last one's tokens."""
    found: list[list[Caller]] = []
    for asynchronous in (False, True):
        rng = random.Random(seed)
        ours = steps(model, pages if asynchronous else 64, asynchronous=asynchronous)
        callers: list[Caller] = []
        for _ in range(12):
            prompt = random_prompt(rng)[:30]
            params = random_params(rng, prompt)
            kind = rng.choice(["one", "samples", "beams"])
            if kind == "samples":
                params.pop("prompt_logprobs", None)
                samples = [{**params, "seed": sample} for sample in range(rng.randint(2, 4))]
                callers += submit_many(ours.engine, prompt, *samples)
            elif kind == "beams":
                beams = BeamParams(rng.randint(2, 4))
                callers.append(search(ours.engine, prompt, beams, max_tokens=rng.randint(1, 20)))
            else:
                callers.append(submit(ours.engine, prompt, **params))
            for _ in range(rng.randint(0, 6)):
                if asynchronous:
                    ours.step()
        ours.finish()
        assert any(ours.runner.ahead) == asynchronous
        assert ours.engine.stats().pages_used == 0
        found.append(callers)
    for caller, expected in zip(*reversed(found), strict=True):
        assert_same(caller, expected)


def test_logits_are_freed_before_the_next_step_is_launched(model: GPTJForCausalLM) -> None:
    """And the last launched step, in which nobody is left, with the last request."""
    ours = steps(model)
    before: list[weakref.ref[Tensor]] = []
    compute = ours.runner.step

    def step(batch: StepBatch) -> Tensor:
        assert all(logits() is None for logits in before)
        logits_WV = compute(batch)
        before.append(weakref.ref(logits_WV))
        return logits_WV

    ours.runner.step = step  # type: ignore[method-assign]
    first = submit(ours.engine, tokens(5), max_tokens=9)
    ours.finish()
    assert len(before) > 5 and sum(ours.runner.ahead) > 3
    (*_, last, _) = first.events
    assert isinstance(last, TokenEvent)
    submit(ours.engine, tokens(5), max_tokens=30, stop_token_ids=(last.token_id,))
    ours.finish()
    assert all(logits() is None for logits in before)


@pytest.mark.slow
def test_preempted_requests_get_the_same_output(model: GPTJForCausalLM) -> None:
    callers: list[list[Caller]] = []
    for pages, asynchronous in ((10, True), (64, False)):
        ours = steps(model, pages, asynchronous=asynchronous)
        callers.append(
            [
                submit(ours.engine, [7, i], max_tokens=50, temperature=i % 2, seed=i)
                for i in range(6)
            ]
        )
        ours.finish()
        assert (ours.engine.stats().preemptions > 0) == asynchronous
        assert any(ours.runner.ahead) == asynchronous
    for found, expected in zip(*callers, strict=True):
        assert found.events == expected.events


@pytest.mark.parametrize("max_tokens", [17, *slow([1, 2, 15, 16, 33])])
@pytest.mark.parametrize("length", [16, *slow([1, 15, 17])])
def test_cached_pages_have_the_content_of_their_tokens(
    model: GPTJForCausalLM, length: int, max_tokens: int
) -> None:
    """Requests that continue an output find its pages, whatever ended it."""
    ours, reference = steps(model), steps(model, asynchronous=False, prefix_caching=False)
    prompt = tokens(length)
    first = submit(ours.engine, prompt, max_tokens=max_tokens)
    submit(ours.engine, prompt, max_tokens=max_tokens + 5)
    cancelled = submit(ours.engine, [3, *prompt], max_tokens=40)
    for _ in range(max_tokens):
        ours.step()
    cancelled.ticket.cancel()
    stops = submit(ours.engine, [4, *prompt], max_tokens=30, stop_token_ids=tuple(range(20)))
    ours.finish()
    assert any(ours.runner.ahead)
    sequences = [
        sequence(prompt, first),
        sequence([3, *prompt], cancelled),
        sequence([4, *prompt], stops),
    ]
    found_pages = check_cached_pages(ours, model, sequences)
    assert found_pages >= sum((len(ids) - 1) // PAGE_SIZE for ids in sequences)
    for ids in sequences:
        for end in ([], [90]):
            again = (ids + end)[: CONTEXT - 5]
            found = submit(ours.engine, again, max_tokens=5)
            expected = submit(reference.engine, again, max_tokens=5)
            ours.finish()
            reference.finish()
            assert found.ids == expected.ids


def check_cached_pages(ours: Steps, model: GPTJForCausalLM, sequences: list[list[int]]) -> int:
    """Each page found for these tokens has their keys and values; returns how many were found."""
    count = 0
    for ids in sequences:
        digests: list[bytes] = []
        extend_digests(digests, ids, PAGE_SIZE)
        pages = ours.engine._pool.find(digests)
        if not pages:
            continue
        reference = Runner(model, len(pages), asynchronous=False)
        length = len(pages) * PAGE_SIZE
        reference.step(
            StepBatch(
                np.array(ids[:length], np.int32),
                np.arange(length, dtype=np.int32),
                np.array([0, length], np.int32),
                np.arange(len(pages), dtype=np.int32)[None],
                np.array([length - 1], np.int32),
            )
        )
        # One chunk, instead of decode steps, sums in another order.
        torch.testing.assert_close(
            ours.runner._cache.data[:, :, pages],
            reference._cache.data[:, :, : len(pages)],
            rtol=0,
            atol=1e-4,
        )
        count += len(pages)
    return count


def sequence(prompt: list[int], caller: Caller) -> list[int]:
    """A request's prompt and output."""
    ids = [event.token_id for event in caller.events if isinstance(event, TokenEvent)]
    return prompt + ids


def test_the_next_step_is_launched_before_the_host_waits_for_tokens(
    model: GPTJForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, calls = steps(model), []
    result = PendingOutput.result

    def waiting(self: PendingOutput) -> Any:
        calls.append("wait")
        return result(self)

    monkeypatch.setattr(PendingOutput, "result", waiting)
    ours.runner.before = lambda: calls.append("launch")
    counts: list[int] = []
    caller = submit(ours.engine, tokens(3), max_tokens=5)
    while ours.busy:
        ours.step()
        counts.append(len(caller.events))
    assert calls == ["launch", "launch", *["wait", "launch"] * 3, "wait", "wait"]
    assert ours.runner.ahead == [False, True, True, True, True]
    assert counts == [1, 2, 3, 4, 6]  # each step reports its own token


@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 1.0},
        {"frequency_penalty": 1.0},
        {"repetition_penalty": 1.3},
        {"logprobs": 2},
        {"bad_words_ids": ((7,), (8, 9))},
        {"allowed_token_ids": (7, 8, 9)},
        {"min_tokens": 6, "stop_token_ids": tuple(range(90))},
        {"temperature": 1.0, "top_p": 0.9, "seed": 5},
        {"temperature": 1.0, "top_k": 9, "min_p": 0.02, "seed": 5},
    ],
    ids=str,
)
def test_all_sampling_parameters_work_one_step_ahead(
    model: GPTJForCausalLM, params: dict[str, Any]
) -> None:
    callers: list[Caller] = []
    for asynchronous in (True, False):
        ours = steps(model, asynchronous=asynchronous)
        callers.append(submit(ours.engine, tokens(4), **{"max_tokens": 20, **params}))
        ours.finish()
        assert ours.runner.ahead[1:] == [asynchronous] * (len(ours.runner.ahead) - 1)
    assert callers[0].events == callers[1].events


def test_beams_and_drafts_are_computed_without(model: GPTJForCausalLM) -> None:
    ours = steps(model)
    ours.engine.beam_search(
        tokens(3), SamplingParams(max_tokens=5, temperature=0), BeamParams(2), Caller()
    )
    submit(ours.engine, tokens(4), max_tokens=3)
    ours.finish()
    ours = steps(model, speculation=Speculation())
    submit(ours.engine, [5, 6, 5, 6, 5, 6], max_tokens=9)
    ours.finish()
    assert not any(ours.runner.ahead)


def test_prompts_are_computed_beside_rows_whose_ids_are_not_known(
    model: GPTJForCausalLM,
) -> None:
    ours = steps(model, max_num_seqs=3, max_num_batched_tokens=18)
    prompts = [tokens(3), tokens(40), tokens(20)]
    callers = [submit(ours.engine, prompts[0], max_tokens=12)]
    ours.step()
    callers += [submit(ours.engine, prompt, max_tokens=9) for prompt in prompts[1:]]
    ours.finish()
    assert ours.runner.ahead[1:] == [True] * (len(ours.runner.ahead) - 1)
    assert max(ours.runner.tokens) == 18
    reference = steps(model, asynchronous=False)
    for caller, prompt in zip(callers, prompts, strict=True):
        expected = submit(reference.engine, prompt, max_tokens=len(caller.ids))
        reference.finish()
        assert caller.events == expected.events


def test_a_prompt_cancelled_while_it_is_computed_leaves_nothing(model: GPTJForCausalLM) -> None:
    ours = steps(model)
    first = submit(ours.engine, tokens(3), max_tokens=9)
    ours.step()
    second = submit(ours.engine, tokens(20), max_tokens=9)
    ours.step()
    assert ours.runner.tokens[-1] == 21
    second.ticket.cancel()
    ours.step()
    assert second.events == [Finished("cancelled")]
    ours.finish()
    assert len(first.ids) == 9
    assert ours.engine.stats().pages_used == 0
    assert check_cached_pages(ours, model, [tokens(20)]) == 0


def test_a_sequence_that_ends_by_its_length_makes_room_for_the_next_step(
    model: GPTJForCausalLM,
) -> None:
    for asynchronous in (True, False):
        ours = steps(model, asynchronous=asynchronous, max_num_seqs=2)
        for i in range(4):
            submit(ours.engine, [i, 5], max_tokens=3 + i % 2)
        ours.finish()
        assert ours.runner.tokens == [4, 2, 2, 3, 3, 2, 1, 1]


def test_batches_larger_than_the_largest_graph(
    model: GPTJForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptj.engine.runners.cuda.runner.MAX_SIZE", 2)
    outputs = []
    for asynchronous in (True, False):
        ours = steps(model, asynchronous=asynchronous)
        callers = [submit(ours.engine, [i, 5], max_tokens=9 + i) for i in range(4)]
        ours.finish()
        assert any(ours.runner.ahead) == asynchronous
        outputs.append([caller.events for caller in callers])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("where", ["launch", "result"])
def test_a_failed_step_fails_its_requests_and_reports_the_tokens_before(
    model: GPTJForCausalLM, monkeypatch: pytest.MonkeyPatch, where: str, at: int
) -> None:
    reference = steps(model, asynchronous=False)
    expected = submit(reference.engine, tokens(3), max_tokens=9)
    reference.finish()
    ours = steps(model)
    caller = submit(ours.engine, tokens(3), max_tokens=9)
    ended = submit(ours.engine, tokens(4), max_tokens=at) if at else None
    numbers = failing(ours, monkeypatch, where, at)
    ours.finish()
    assert at in numbers
    assert "broken" in str(caller.error)
    assert len(caller.events) == at + 1
    assert prefix_of(caller, expected)
    if ended is not None:
        assert len(ended.ids) == at
    assert ours.engine.stats().pages_used == 0
    again = submit(ours.engine, tokens(3), max_tokens=9)
    ours.finish()
    assert again.ids == expected.ids


def failing(ours: Steps, monkeypatch: pytest.MonkeyPatch, where: str, at: int) -> list[int]:
    """Make the step with this number fail; returns the numbers of the steps that began."""
    numbers: list[int] = []
    result = PendingOutput.result

    def fail() -> None:
        numbers.append(len(numbers))
        if numbers[-1] == at:
            raise RuntimeError("broken")

    def failing_result(self: PendingOutput) -> Any:
        fail()
        return result(self)

    if where == "launch":
        ours.runner.before = fail
    else:
        monkeypatch.setattr(PendingOutput, "result", failing_result)
    return numbers


def test_a_row_that_is_not_finite_fails_alone_and_its_pages_are_forgotten(
    model: GPTJForCausalLM,
) -> None:
    ours = steps(model)
    broken, sound = (submit(ours.engine, tokens(15, start=i), max_tokens=9) for i in (3, 4))
    for _ in range(3):
        ours.step()
    page = ours.engine._scheduler.decode_batch.sequences[0].pages[0]
    ours.runner._cache.data[:, :, page] = torch.nan
    ours.finish()
    assert "not finite" in str(broken.error)
    assert len(sound.ids) == 9
    stats = ours.engine.stats()
    assert stats.pages_used == 0
    again = submit(ours.engine, tokens(15, start=3), max_tokens=9)
    ours.finish()
    assert len(again.ids) == 9


def test_closing_with_a_step_in_flight_fails_its_requests(model: GPTJForCausalLM) -> None:
    ours = steps(model)
    caller = submit(ours.engine, tokens(3), max_tokens=9)
    ours.step()
    assert ours.engine._core._launched is not None
    ours.engine._finish()
    assert "closed" in str(caller.error)
    assert ours.engine._core._launched is None


def test_top_p_that_keeps_more_tokens_than_it_looks_at_first_is_drawn_again(
    model: GPTJForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptj.engine.sampling_batch.CANDIDATES", 2)
    monkeypatch.setattr("gptj.engine.sampling_batch.CANDIDATES_GROWTH", 2)
    chosen: list[dict[str, Any]] = [
        {"temperature": 1.5 + i, "top_p": 0.97, "seed": i, "max_tokens": 9 + i} for i in range(3)
    ]
    chosen.append({"temperature": 1.0, "seed": 9, "min_tokens": 5, "stop_token_ids": (5, 6, 7)})
    callers: list[list[Caller]] = []
    for asynchronous in (True, False):
        ours = steps(model, asynchronous=asynchronous)
        callers.append([submit(ours.engine, tokens(4), **each) for each in chosen])
        ours.finish()
        assert any(ours.runner.ahead) == asynchronous
    for found, expected in zip(*callers, strict=True):
        assert found.events == expected.events

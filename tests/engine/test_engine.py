"""The engine: each request gets what it would get alone, and one's end or error is its own."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from engine_caller import (
    EOS,
    SECONDS,
    Caller,
    Gate,
    WatchedRunner,
    alone,
    held,
    search,
    submit,
    submit_many,
    tiny_model,
    tokens,
)

from gptj import GPTJForCausalLM
from gptj.engine.constraints.grammar import GrammarError
from gptj.engine.engine import Engine
from gptj.engine.events import Event, Failed, Finished, PromptLogprobs, TokenEvent
from gptj.engine.request import BeamParams, Ticket
from gptj.engine.runners.base import StepBatch
from gptj.engine.runners.torch_runner import TorchRunner
from gptj.sampling import SamplingParams
from gptj.workers.errors import ClosedError, QueueFullError

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [2, 3], [40, 41, 42, 43]]


@pytest.fixture(scope="module")
def model() -> GPTJForCausalLM:
    return tiny_model(n_positions=64)


@pytest.fixture
def engine(model: GPTJForCausalLM) -> Iterator[Engine]:
    engine = Engine(TorchRunner(model, 32), eos_ids=[EOS], max_num_seqs=8)
    yield engine
    engine.close()


@cache
def mixed_batch(device: torch.device) -> tuple[GPTJForCausalLM, list[list[int]], list[list[int]]]:
    """A model, prompts, and what `generate` makes of each alone."""
    model = tiny_model(device=device)
    prompts = [*PROMPTS, tokens(16), tokens(17), tokens(70), tokens(40, start=3)]
    expected = [
        alone(model, prompt, max_new_tokens=30 + 5 * i, eos_token_id=[])
        for i, prompt in enumerate(prompts)
    ]
    return model, prompts, expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pages", "settings"),
    [
        (128, {}),
        (128, {"prefix_caching": False}),
        (128, {"max_num_batched_tokens": 8}),
        (10, {}),
        (10, {"max_num_batched_tokens": 8, "prefix_caching": False}),
    ],
    ids=["plain", "no prefix cache", "chunks", "preemption", "preemption without prefix cache"],
)
def test_greedy_output_of_a_mixed_batch_equals_generate_for_each_prompt_alone(
    device: torch.device, pages: int, settings: dict[str, Any]
) -> None:
    """Twice, so that the second time finds what the first has left in the prefix cache."""
    model, prompts, expected = mixed_batch(device)
    engine = Engine(TorchRunner(model, pages), eos_ids=[EOS], max_num_seqs=8, **settings)
    for _ in range(2):
        callers = [
            submit(engine, prompt, max_tokens=30 + 5 * i, ignore_eos=True)
            for i, prompt in enumerate(prompts)
        ]
        assert [caller.ids for caller in callers] == expected
    stats = engine.stats()
    assert (stats.preemptions > 0) == (pages == 10)
    assert (stats.prefix_tokens_hit > 0) == settings.get("prefix_caching", True)
    assert stats.pages_used == 0
    engine.close()


def test_more_requests_than_may_run_all_get_their_own_output(model: GPTJForCausalLM) -> None:
    engine = Engine(TorchRunner(model, 32), eos_ids=[EOS], max_num_seqs=2)
    callers = [submit(engine, prompt) for prompt in PROMPTS]
    for prompt, caller in zip(PROMPTS, callers, strict=True):
        assert caller.ids == alone(model, prompt)
    engine.close()


def test_requests_with_different_parameters_share_a_batch(
    engine: Engine, model: GPTJForCausalLM
) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "top_k": 5, "seed": 1},
        {"repetition_penalty": 1.5},
        {"temperature": 1.0, "top_p": 0.9, "min_p": 0.05, "seed": 2, "presence_penalty": 1.0},
        {"logit_bias": {17: 100.0}},
    ]
    together = [submit(engine, p, **s) for p, s in zip(PROMPTS, settings, strict=True)]
    outputs = [caller.ids for caller in together]
    assert outputs == [
        submit(engine, prompt, **setting).ids
        for prompt, setting in zip(PROMPTS, settings, strict=True)
    ]
    assert outputs[2] == alone(model, PROMPTS[2], repetition_penalty=1.5)
    assert outputs[2] != alone(model, PROMPTS[2])
    unpenalised = {**settings[3], "presence_penalty": 0.0}
    assert outputs[3] != submit(engine, PROMPTS[3], **unpenalised).ids
    assert outputs[4] == [17] * 12


def test_a_seed_gives_the_same_tokens_in_any_batch(engine: Engine) -> None:
    setting = {"temperature": 1.0, "seed": 7, "ignore_eos": True}
    first = submit(engine, PROMPTS[0], **setting).ids
    others = [submit(engine, prompt, temperature=1.0) for prompt in PROMPTS]
    again = submit(engine, PROMPTS[0], **setting)
    different = submit(engine, PROMPTS[0], **{**setting, "seed": 8})
    assert again.ids == first
    assert different.ids != first
    for other in others:
        other.wait()


@pytest.mark.slow
def test_a_seed_gives_the_same_tokens_when_its_request_is_preempted(
    model: GPTJForCausalLM,
) -> None:
    settings: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": seed, "max_tokens": 45, "ignore_eos": True, **more}
        for seed, more in enumerate(({}, {"top_p": 0.9}, {"frequency_penalty": 0.5}, {}))
    ]
    outputs = []
    for pages in (32, 6):
        engine = Engine(TorchRunner(model, pages), eos_ids=[EOS], max_num_seqs=8)
        callers = [submit(engine, p, **w) for p, w in zip(PROMPTS, settings, strict=False)]
        outputs.append([caller.ids for caller in callers])
        assert (engine.stats().preemptions > 0) == (pages == 6)
        engine.close()
    assert outputs[0] == outputs[1]


@pytest.mark.slow
def test_samples_submitted_together_equal_those_submitted_separately(
    model: GPTJForCausalLM,
) -> None:
    """With room for all, with few at a time, and with a cache that some must give up."""
    settings: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": seed, "max_tokens": 12 + 3 * seed, "ignore_eos": True}
        for seed in range(6)
    ]
    apart = Engine(TorchRunner(model, 64), eos_ids=[EOS])
    for prompt in (PROMPTS[2], tokens(16), tokens(30)):
        expected = [submit(apart, prompt, **each).ids for each in settings]
        for pages, max_num_seqs in ((64, 8), (64, 4), (5, 8)):
            engine = Engine(TorchRunner(model, pages), eos_ids=[EOS], max_num_seqs=max_num_seqs)
            assert [each.ids for each in submit_many(engine, prompt, *settings)] == expected
            assert engine.stats().pages_used == 0
            engine.close()
    apart.close()


def test_a_prompt_with_several_samples_is_computed_once(model: GPTJForCausalLM) -> None:
    """Even without the prefix cache."""
    engine = Engine(TorchRunner(model, 64), eos_ids=[EOS], prefix_caching=False)
    callers = submit_many(engine, tokens(30), *({"max_tokens": 5, "min_tokens": 5},) * 4)
    assert len({tuple(caller.ids) for caller in callers}) == 1
    assert engine.stats().tokens_in == 30
    engine.close()


def test_only_samples_that_request_prompt_logprobs_get_them(
    model: GPTJForCausalLM,
) -> None:
    engine = Engine(TorchRunner(model, 64), eos_ids=[EOS], max_num_seqs=8, max_num_batched_tokens=8)
    for asking in range(3):
        settings: list[dict[str, Any]] = [
            {"prompt_logprobs": 1} if number == asking else {} for number in range(3)
        ]
        callers = submit_many(engine, tokens(40), *settings)
        assert [caller.scored for caller in callers] == [n == asking for n in range(3)]
        assert all(caller.ids == alone(model, tokens(40)) for caller in callers)
    engine.close()


def test_samples_of_one_prompt_can_be_cancelled_separately(model: GPTJForCausalLM) -> None:
    """The first, too, while the prompt is computed: it is computed for the others."""
    gate = Gate()
    runner = WatchedRunner(model, 64, gate)
    engine = Engine(runner, eos_ids=[EOS], max_num_seqs=8, max_num_batched_tokens=8)
    callers = [Caller() for _ in range(3)]
    params = [SamplingParams(max_tokens=12, temperature=0)] * 3
    tickets = engine.submit_many(tokens(30), params, callers)
    assert gate.reached.wait(30)
    tickets[0].cancel()
    gate.open()
    assert callers[0].wait() == [Finished("cancelled")]
    assert callers[1].ids == callers[2].ids == alone(model, tokens(30))
    assert engine.stats().tokens_in == 30
    engine.close()


def test_logprobs_of_output_and_prompt_are_the_models(
    engine: Engine, model: GPTJForCausalLM
) -> None:
    prompt = PROMPTS[2]
    caller = submit(engine, prompt, logprobs=3, prompt_logprobs=2, max_tokens=4, min_tokens=4)
    check_logprobs(model, prompt, caller)


def test_prompt_logprobs_are_complete_despite_chunking_and_prefix_caching(
    model: GPTJForCausalLM,
) -> None:
    engine = Engine(TorchRunner(model, 32), eos_ids=[EOS], max_num_seqs=4, max_num_batched_tokens=7)
    for _ in range(2):
        caller = submit(
            engine, tokens(50), logprobs=3, prompt_logprobs=2, max_tokens=4, min_tokens=4
        )
        check_logprobs(model, tokens(50), caller)
    engine.close()


def check_logprobs(model: GPTJForCausalLM, prompt: list[int], caller: Caller) -> None:
    scored, *others = caller.wait()
    assert isinstance(scored, PromptLogprobs)
    ids = [*prompt, *caller.ids]
    expected = model(torch.tensor([ids])).logits[0].detach().log_softmax(dim=-1)
    events = [*scored.tokens, *(event for event in others if isinstance(event, TokenEvent))]
    assert [event.token_id for event in events] == ids
    assert events[0].logprob is None
    assert events[0].top == ()
    for place, event in enumerate(events[1:]):
        assert event.logprob == pytest.approx(float(expected[place, event.token_id]), abs=1e-4)
        best = expected[place].topk(2 if place + 1 < len(prompt) else 3)
        assert [token for token, _ in event.top] == best.indices.tolist()
        assert [value for _, value in event.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_prompt_can_be_scored_without_generating(engine: Engine) -> None:
    scored, end = submit(engine, PROMPTS[0], max_tokens=0, prompt_logprobs=0).wait()
    assert isinstance(scored, PromptLogprobs)
    assert end == Finished("length")
    assert len(scored.tokens) == 3
    scored, _ = submit(engine, [5], max_tokens=0, prompt_logprobs=2).wait()
    assert scored == PromptLogprobs((TokenEvent(5),))


def test_no_logprobs_are_reported_unless_requested(engine: Engine) -> None:
    found = submit(engine, PROMPTS[0], max_tokens=2, min_tokens=2).wait()[:-1]
    assert [event.logprob for event in found if isinstance(event, TokenEvent)] == [None, None]


def test_eos_ends_an_output_unless_it_is_ignored(engine: Engine) -> None:
    forced = {"logit_bias": {EOS: 100.0}, "max_tokens": 5}
    assert submit(engine, [5], **forced).wait() == [Finished("stop", EOS)]
    assert submit(engine, [5], **forced, ignore_eos=True).ids == [EOS] * 5
    assert submit(engine, [5], **forced, min_tokens=3).ids[3:] == [EOS]
    assert EOS not in submit(engine, [5], **forced, min_tokens=3).ids[:3]


def test_stop_tokens_end_an_output_and_are_reported(engine: Engine) -> None:
    full = submit(engine, PROMPTS[0], ignore_eos=True).ids
    stop = next(each for each in full[2:] if each != full[0])
    assert 0 < full.index(stop) < len(full) - 1
    caller = submit(engine, PROMPTS[0], ignore_eos=True, stop_token_ids=(stop,))
    assert caller.ids == full[: full.index(stop) + 1]
    assert caller.events[-1] == Finished("stop", stop)


def test_banned_ids_are_masked(model: GPTJForCausalLM) -> None:
    favourite = alone(model, PROMPTS[0], max_new_tokens=1)[0]
    engine = Engine(TorchRunner(model, 32), eos_ids=[EOS], banned_ids=[favourite])
    caller = submit(engine, PROMPTS[0], logprobs=97, ignore_eos=True, max_tokens=20)
    assert favourite not in caller.ids
    for event in caller.events[:-1]:
        assert isinstance(event, TokenEvent)
        assert favourite not in dict(event.top)
        assert sum(math.exp(value) for _, value in event.top) == pytest.approx(1, abs=1e-5)
    beams = search(engine, PROMPTS[0], BeamParams(4, 4), max_tokens=8).beams
    assert all(favourite not in output for output in beams)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_beam_search_equals_transformers(
    model: GPTJForCausalLM, length_penalty: float, early_stopping: bool
) -> None:
    """And generate; alone, beside others, and where it must wait for room in the cache."""
    theirs = transformers.GPTJForCausalLM(transformers.GPTJConfig(**model.config.to_dict()))
    theirs.load_state_dict(model.state_dict())
    theirs.eval()
    beams = BeamParams(3, 3, length_penalty, early_stopping)
    for prompt in (PROMPTS[2], tokens(16)):
        expected = [
            each.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                num_beams=3,
                num_return_sequences=3,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                max_new_tokens=25,
                pad_token_id=0,
            )[:, len(prompt) :].tolist()
            for each in (theirs, model)
        ]
        for pages in (64, 9):
            engine = Engine(
                TorchRunner(model, pages), eos_ids=[EOS], max_num_seqs=8, max_num_batched_tokens=8
            )
            others = [submit(engine, tokens(10, start=n), max_tokens=30) for n in range(4)]
            found = search(engine, prompt, beams, max_tokens=25)
            more = submit(engine, prompt, max_tokens=30)
            for each in expected:
                check_beams(found, each)
            for caller in (*others, more):
                caller.wait()
            check_beams(search(engine, prompt, beams, max_tokens=25), expected[0])
            assert engine.stats().pages_used == 0
            engine.close()


def check_beams(found: Caller, expected: list[list[int]]) -> None:
    """The rest of what generate returns is padding."""
    assert len(found.beams) == len(expected)
    for ours, theirs in zip(found.beams, expected, strict=True):
        assert ours == theirs[: len(ours)]
        assert set(theirs[len(ours) :]) <= {0}


def test_beam_search_applies_min_tokens_and_penalties(
    engine: Engine, model: GPTJForCausalLM
) -> None:
    plain = alone(model, PROMPTS[2], num_beams=4, pad_token_id=0)
    stops = [EOS, plain[2]]  # which plain beams meet early
    for ours, theirs, without in (
        (
            {"min_tokens": 8, "stop_token_ids": tuple(stops)},
            {"min_new_tokens": 8, "eos_token_id": stops},
            {"eos_token_id": stops},
        ),
        ({"repetition_penalty": 20.0}, {"repetition_penalty": 20.0}, {}),
    ):
        found = search(engine, PROMPTS[2], BeamParams(4), max_tokens=12, **ours)
        again = search(engine, PROMPTS[4], BeamParams(2), max_tokens=12)
        for caller, prompt, beams, more in (
            (found, PROMPTS[2], 4, theirs),
            (again, PROMPTS[4], 2, {}),
        ):
            expected = alone(model, prompt, num_beams=beams, pad_token_id=0, **more)
            check_beams(caller, [expected])
        # Or else there would be nothing to heed.
        heeded = alone(model, PROMPTS[2], num_beams=4, pad_token_id=0, **theirs)
        assert heeded != alone(model, PROMPTS[2], num_beams=4, pad_token_id=0, **without)


def test_beam_search_with_every_token_as_a_stop_token(engine: Engine) -> None:
    found = search(engine, PROMPTS[0], BeamParams(4), max_tokens=3, stop_token_ids=tuple(range(97)))
    assert len(found.beams[0]) == 1


PAIRS = [(7, 7), (7, 8), (8, 7), (8, 8)]  # all that may follow one another of 7 and 8


@pytest.mark.parametrize(
    "params",
    [
        {"allowed_token_ids": (95,)},  # which is banned
        {"allowed_token_ids": (EOS,), "min_tokens": 3},
        {"allowed_token_ids": (7,), "bad_words_ids": ((7,),)},
        {"allowed_token_ids": (7, 8), "bad_words_ids": tuple(PAIRS)},  # after the first
        {"allowed_token_ids": (7, EOS), "bad_words_ids": ((7, 7),), "min_tokens": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("beams", [BeamParams(2, 2), BeamParams(3, 1, early_stopping=True)])
def test_a_request_that_allows_no_further_token_fails_with_the_reason(
    model: GPTJForCausalLM, params: dict[str, Any], beams: BeamParams
) -> None:
    """A beam search as a sampled one, and others of its steps are unharmed."""
    engine = Engine(TorchRunner(model, 64), eos_ids=[EOS], banned_ids=[95, 96])
    other = search(engine, PROMPTS[2], BeamParams(2, 2), max_tokens=5)
    sampled = submit(engine, PROMPTS[0], max_tokens=5, **params)
    found = search(engine, PROMPTS[0], beams, max_tokens=5, **params)
    assert isinstance(found.error, GrammarError)
    assert "allows no further token" in str(found.error)
    assert str(found.error) == str(sampled.error)
    assert other.beams == search(engine, PROMPTS[2], BeamParams(2, 2), max_tokens=5).beams
    assert engine.stats().pages_used == 0
    engine.close()


@pytest.mark.parametrize(
    ("allowed", "bad_words", "expected"),
    [
        ((7, 8), [pair for pair in PAIRS if pair != (8, 7)], [8, 7]),  # a single way on
        ((7, EOS), [(7, 7), (7, EOS)], [EOS]),  # one that has ended, and a dead end
    ],
)
def test_beams_without_a_further_token_are_no_results(
    engine: Engine, allowed: tuple[int, ...], bad_words: list[tuple[int, ...]], expected: list[int]
) -> None:
    params = {"allowed_token_ids": allowed, "bad_words_ids": tuple(bad_words), "max_tokens": 2}
    for width in (2, 3, 4):
        assert search(engine, PROMPTS[0], BeamParams(width), **params).beams == [expected]
    error = search(engine, PROMPTS[0], BeamParams(4, 4), **params).error
    assert isinstance(error, GrammarError)
    assert "of 4 outputs" in str(error)


def test_a_cancelled_request_ends_and_the_others_continue(
    engine: Engine, model: GPTJForCausalLM
) -> None:
    """Cancelled from within its own first event: the next step must drop its row."""
    tickets: queue.Queue[Ticket] = queue.Queue()

    def cancel_at_once(event: Event) -> None:
        if isinstance(event, TokenEvent):
            tickets.get(timeout=10).cancel()

    caller = Caller(cancel_at_once)
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    tickets.put(engine.submit(PROMPTS[0][:2], params, caller))
    other = submit(engine, PROMPTS[4])
    assert len(caller.wait()) == 2
    assert caller.events[-1] == Finished("cancelled")
    assert other.ids == alone(model, PROMPTS[4])


def test_a_waiting_request_is_cancelled_at_once(model: GPTJForCausalLM) -> None:
    gate = Gate()
    engine = Engine(WatchedRunner(model, 32, gate), eos_ids=[], max_num_seqs=1)
    running = held(engine, gate)
    caller = Caller()
    ticket = engine.submit(PROMPTS[1], SamplingParams(), caller)
    ticket.cancel()
    ticket.cancel()
    assert caller.events == [Finished("cancelled")]
    gate.open()
    running.wait()
    assert engine.stats().cancellations == 1
    engine.close()


def test_a_beam_search_can_be_cancelled(model: GPTJForCausalLM) -> None:
    engine = Engine(TorchRunner(model, 32), eos_ids=[], max_num_seqs=4)
    tickets: queue.Queue[Ticket] = queue.Queue()
    caller = Caller()
    other = Caller(
        lambda event: tickets.get(timeout=10).cancel() if not event_ends(event) else None
    )
    engine.submit(PROMPTS[0], SamplingParams(max_tokens=1), other)
    tickets.put(engine.beam_search([5], SamplingParams(max_tokens=63), BeamParams(3), caller))
    assert caller.wait() == [Finished("cancelled")]
    assert engine.stats().pages_used == 0
    engine.close()


def event_ends(event: Event) -> bool:
    return isinstance(event, Finished | Failed)


def test_a_ticket_reports_its_requests_queue_time(model: GPTJForCausalLM) -> None:
    gate = Gate()
    engine = Engine(WatchedRunner(model, 32, gate), eos_ids=[], max_num_seqs=1)
    running = held(engine, gate)
    waiting = submit(engine, PROMPTS[0])
    assert waiting.ticket.queued_seconds is None
    time.sleep(0.2)
    gate.open()
    running.wait()
    waiting.wait()
    first, second = running.ticket.queued_seconds, waiting.ticket.queued_seconds
    assert first is not None
    assert second is not None
    assert 0 <= first < second
    assert second >= 0.2
    engine.close()


def test_a_failed_step_fails_its_requests_and_the_engine_continues(
    model: GPTJForCausalLM,
) -> None:
    """With a new cache: nothing that the failed step may have written is found again."""
    errors = [RuntimeError("the step broke")]

    def break_once(batch: StepBatch) -> None:
        if errors and batch.positions_T.max() >= 20:
            raise errors.pop()

    runner = WatchedRunner(model, 32, break_once)
    engine = Engine(runner, eos_ids=[EOS], max_num_seqs=2)
    running = [submit(engine, tokens(17), max_tokens=20, ignore_eos=True) for _ in range(2)]
    waiting = submit(engine, tokens(17))
    for caller in running:
        assert str(caller.error) == "the step broke"
        assert len(caller.events) > 1
    assert waiting.ids == alone(model, tokens(17))
    assert runner.resets == 1
    assert engine.alive(within_seconds=30)
    stats = engine.stats()
    assert stats.prefix_tokens_hit == 0
    assert stats.pages_used == 0
    assert stats.running == 0
    engine.close()


def test_a_nonfinite_output_fails_with_the_reason() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.bias[3] = math.nan
    engine = Engine(TorchRunner(model, 32), eos_ids=[EOS])
    for setting in ({}, {"prompt_logprobs": 1, "max_tokens": 0}):
        assert "not finite" in str(submit(engine, [5, 6], **setting).error)
    assert "not finite" in str(search(engine, [5, 6], BeamParams(2)).error)
    assert engine.alive(within_seconds=30)  # it is no failed step
    assert engine.stats().pages_used == 0
    engine.close()


def test_pages_with_nonfinite_values_are_not_reused(model: GPTJForCausalLM) -> None:
    """A single fault must not stay in the prefix cache; the others of its step are unharmed."""

    class Faulty(TorchRunner):
        faults = 1

        def step(self, batch: StepBatch) -> torch.Tensor:
            logits = super().step(batch)
            if self.faults and len(logits) == 2:
                self.faults -= 1
                logits[1] = math.nan
            return logits

    engine = Engine(Faulty(model, 32), eos_ids=[EOS])
    other = submit(engine, PROMPTS[0], max_tokens=60, ignore_eos=True)
    while not other.events:
        time.sleep(0.001)
    assert "not finite" in str(submit(engine, tokens(40)).error)
    assert submit(engine, tokens(40)).ids == alone(model, tokens(40))
    assert engine.stats().prefix_tokens_hit == 0
    assert other.ids == alone(model, PROMPTS[0], max_new_tokens=60, eos_token_id=[])
    engine.close()


def test_a_failing_callback_does_not_affect_other_callers(
    engine: Engine, model: GPTJForCausalLM
) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("this caller is gone")

    caller = Caller(broken)
    engine.submit(PROMPTS[1], SamplingParams(temperature=0, ignore_eos=True), caller)
    assert submit(engine, PROMPTS[0]).ids == alone(model, PROMPTS[0])
    assert caller.wait()[-1] == Finished("cancelled")


def test_parameters_that_break_the_sampler_fail_only_their_request(
    engine: Engine, model: GPTJForCausalLM
) -> None:
    class Broken(dict[int, float]):
        def values(self) -> Any:
            raise RuntimeError("no values here")

    others = submit_many(engine, PROMPTS[0], {}, {"logit_bias": Broken({5: 1.0})}, {})
    assert str(others[1].error) == "no values here"
    assert others[0].ids == others[2].ids == alone(model, PROMPTS[0])
    assert engine.alive(within_seconds=30)
    assert engine.stats().pages_used == 0


@pytest.mark.parametrize(
    ("prompt", "params", "reason"),
    [
        ([], {}, "no tokens"),
        ([97], {}, "97 is not a token id"),
        ([-1], {}, "-1 is not a token id"),
        ([5] * 60, {"max_tokens": 5}, "60 prompt tokens and max_tokens=5 .* of 64"),
        ([5], {"logit_bias": {97: 1.0}}, "logit_bias: 97"),
        ([5], {"stop_token_ids": (99,)}, "stop_token_ids: 99"),
    ],
)
def test_invalid_requests_are_refused_with_the_value(
    engine: Engine, prompt: list[int], params: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        submit(engine, prompt, **params)


def test_requests_larger_than_the_cache_are_refused(model: GPTJForCausalLM) -> None:
    engine = Engine(TorchRunner(model, 3), eos_ids=[EOS], max_num_seqs=4)
    with pytest.raises(
        ValueError, match=r"40 prompt tokens .* max_tokens=9 need 4 pages of 16 .* has 3"
    ):
        submit(engine, tokens(40), max_tokens=9)
    with pytest.raises(ValueError, match="for each of 4 beams need 4 pages"):
        search(engine, [5], BeamParams(4), max_tokens=12)
    with pytest.raises(ValueError, match="num_beams must be at most max_num_seqs=4, got 5"):
        search(engine, [5], BeamParams(5))
    assert submit(engine, tokens(40), max_tokens=8).ids == alone(
        model, tokens(40), max_new_tokens=8
    )
    engine.close()
    with pytest.raises(ValueError, match=r"max_num_seqs must be in .* got 9"):
        Engine(TorchRunner(model, 3), eos_ids=[], max_num_seqs=9, max_num_batched_tokens=8)


def test_a_prompt_and_output_can_fill_the_context(engine: Engine, model: GPTJForCausalLM) -> None:
    prompt = [5, 6] * 26
    callers = [
        submit(engine, [7], max_tokens=63, ignore_eos=True),
        submit(engine, prompt, ignore_eos=True),
    ]
    assert len(callers[0].ids) == 63
    assert callers[1].ids == alone(model, prompt, eos_token_id=[])


def test_a_full_queue_refuses_all_or_nothing_and_recovers(
    model: GPTJForCausalLM,
) -> None:
    gate = Gate()
    engine = Engine(WatchedRunner(model, 32, gate), eos_ids=[EOS], max_num_seqs=1, max_queued=2)
    held(engine, gate)
    waiting = [submit(engine, PROMPTS[0])]
    with pytest.raises(QueueFullError, match="1 requests are already waiting, and 2 more"):
        submit_many(engine, PROMPTS[0], {}, {})
    waiting.append(submit(engine, PROMPTS[0]))
    with pytest.raises(QueueFullError, match="2 requests are already waiting"):
        submit(engine, PROMPTS[0])
    gate.open()
    for caller in waiting:
        caller.wait()
    assert submit(engine, PROMPTS[0]).ids == alone(model, PROMPTS[0])
    engine.close()


def test_a_request_that_would_wait_too_long_is_refused(model: GPTJForCausalLM) -> None:
    gate = Gate()
    runner = WatchedRunner(model, 32, gate)
    engine = Engine(runner, eos_ids=[EOS], max_num_seqs=1, max_queue_seconds=0.05)
    held(engine, gate)
    waiting = [submit(engine, PROMPTS[0]) for _ in range(3)]
    time.sleep(0.2)
    gate.open()
    for caller in waiting:
        caller.wait()
    gate.again()
    held(engine, gate)
    last = submit(engine, PROMPTS[0])  # nobody waits before it
    with pytest.raises(QueueFullError, match=r"wait for about .* more than the limit of 0\.05 s"):
        submit(engine, PROMPTS[0])
    gate.open()
    last.wait()
    engine.close()


@pytest.mark.slow
def test_the_engine_is_alive_unless_it_hangs_or_has_ended(
    model: GPTJForCausalLM,
) -> None:
    gate = Gate()
    engine = Engine(WatchedRunner(model, 32, gate), eos_ids=[EOS])
    time.sleep(2)
    assert engine.alive(within_seconds=1.9)  # an idle one shows it twice a second
    caller = held(engine, gate)  # a step that does not end
    time.sleep(0.7)
    assert not engine.alive(within_seconds=0.65)
    gate.open()
    caller.wait()
    assert engine.alive(within_seconds=10)
    engine.close()
    assert not engine.alive(within_seconds=100)


def test_callers_never_wait_for_a_step(model: GPTJForCausalLM) -> None:
    """What an event loop calls returns while the model computes."""
    gate = Gate()
    engine = Engine(WatchedRunner(model, 32, gate), eos_ids=[EOS], max_num_seqs=1)
    running = Caller()
    ticket = engine.submit([5], SamplingParams(), running)
    assert gate.reached.wait(30)

    def call_everything() -> None:
        engine.submit(PROMPTS[0], SamplingParams(), Caller()).cancel()
        ticket.cancel()
        engine.alive(1)
        assert engine.stats().running == 1

    thread = threading.Thread(target=call_everything)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    gate.open()
    assert running.wait()[-1] == Finished("cancelled")
    engine.close()


def test_an_engine_whose_every_step_fails_is_not_alive(model: GPTJForCausalLM) -> None:
    """As after an error of a GPU, from which only a new process recovers."""

    def fail(batch: StepBatch) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    runner = WatchedRunner(model, 32, fail)
    engine = Engine(runner, eos_ids=[EOS])
    for failures in range(3):
        assert engine.alive(within_seconds=30), failures
        assert "illegal memory" in str(submit(engine, PROMPTS[0]).error)
    assert not engine.alive(within_seconds=30)
    runner.before = lambda batch: None
    assert submit(engine, PROMPTS[0]).ids == alone(model, PROMPTS[0])
    assert engine.alive(within_seconds=30)
    engine.close()


def test_closing_fails_running_waiting_and_new_requests(model: GPTJForCausalLM) -> None:
    gate = Gate()
    engine = Engine(WatchedRunner(model, 32, gate), eos_ids=[], max_num_seqs=1)
    running = held(engine, gate)
    waiting = submit(engine, PROMPTS[0])
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert isinstance(waiting.error, ClosedError)
    assert "before this request's turn" in str(waiting.error)
    with pytest.raises(ClosedError):
        submit(engine, PROMPTS[0])
    gate.open()
    closing.join(30)
    assert isinstance(running.error, ClosedError)
    assert "while this request ran" in str(running.error)


def test_a_caller_gets_all_events_of_a_step_in_one_call(model: GPTJForCausalLM) -> None:
    calls: list[list[tuple[Ticket, Event]]] = []
    ended = threading.Event()

    def collect(events: Sequence[tuple[Ticket, Event]]) -> None:
        calls.append(list(events))
        if sum(isinstance(event, Finished) for call in calls for _, event in call) == 4:
            ended.set()

    gate = Gate()
    engine = Engine(WatchedRunner(model, 32, gate), eos_ids=[], max_num_seqs=8)
    held(engine, gate)
    params = [SamplingParams(max_tokens=3, seed=seed) for seed in range(3)]
    tickets = engine.submit_many(PROMPTS[0], params, [collect] * 3)
    tickets.append(engine.submit(PROMPTS[1], SamplingParams(max_tokens=3), collect))
    gate.open()
    assert ended.wait(SECONDS)
    assert [[isinstance(event, TokenEvent) for _, event in call] for call in calls] == [
        [True] * 4,
        [True] * 4,
        [True] * 4 + [False] * 4,
    ]
    for call in calls:
        assert {ticket for ticket, _ in call} == set(tickets)
    engine.close()


def test_a_failed_step_still_reports_requests_that_ended_in_it(
    model: GPTJForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no sampling today")

    gate = Gate()
    engine = Engine(WatchedRunner(model, 32, gate), eos_ids=[], max_num_seqs=8)
    monkeypatch.setattr(engine._core._sampler, "launch", fail)
    first = submit(engine, PROMPTS[0], max_tokens=0)  # holds the engine in a step without sampling
    assert gate.reached.wait(SECONDS)
    scored = submit(engine, PROMPTS[0], max_tokens=0, prompt_logprobs=0)
    failed = submit(engine, PROMPTS[1])
    gate.open()
    assert "no sampling today" in str(failed.error)
    assert [type(event) for event in scored.wait()] == [PromptLogprobs, Finished]
    assert [type(event) for event in first.wait()] == [Finished]
    engine.close()

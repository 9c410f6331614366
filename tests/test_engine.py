"""The engine: each request gets what it would get alone, and one's end or error is its own."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from gptj import GPTJConfig, GPTJForCausalLM
from gptj.engine.batch_engine import (
    BatchEngine,
    BeamParams,
    BeamsFound,
    Event,
    Failed,
    Finished,
    PromptLogprobs,
    Ticket,
    TokenEvent,
)
from gptj.engine.batch_thread import Batcher, ClosedError, QueueFullError
from gptj.sampling import SamplingParams

EOS = 1
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [2, 3], [40, 41, 42, 43]]
CONFIG = GPTJConfig(
    vocab_size=60,
    n_positions=64,
    n_embd=32,
    n_layer=2,
    n_head=4,
    rotary_dim=4,
    bos_token_id=0,
    eos_token_id=EOS,
    initializer_range=0.3,  # wide, so that probabilities differ and eos comes
)


@pytest.fixture(scope="module")
def model() -> GPTJForCausalLM:
    torch.manual_seed(0)
    return GPTJForCausalLM(CONFIG).eval()


@pytest.fixture
def engine(model: GPTJForCausalLM) -> Iterator[BatchEngine]:
    engine = BatchEngine(model, eos_ids=[EOS], max_batch=8)
    yield engine
    engine.close()


class Caller:
    """Submits a request and collects its events."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()
        self.first = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.first.set()
        if isinstance(event, Finished | Failed):
            self.ended.set()

    def wait(self) -> list[Event]:
        assert self.ended.wait(30), "the request did not end"
        return self.events

    @property
    def ids(self) -> list[int]:
        """All new ids, with the stop token."""
        ids = [event.token_id for event in self.wait() if isinstance(event, TokenEvent)]
        last = self.events[-1]
        assert isinstance(last, Finished), last
        return ids if last.stop_token is None else [*ids, last.stop_token]


def submit(engine: BatchEngine, prompt: list[int], **params: Any) -> Caller:
    caller = Caller()
    engine.submit(prompt, SamplingParams(**{"max_tokens": 12, "temperature": 0, **params}), caller)
    return caller


def alone(model: GPTJForCausalLM, prompt: list[int], **arguments: Any) -> list[int]:
    tokens = torch.tensor([prompt], device=model.device)
    arguments = {"max_new_tokens": 12, **arguments}
    return model.generate(tokens, **arguments)[0, len(prompt) :].tolist()


def test_greedy_output_of_a_mixed_batch_equals_generate_for_each_prompt_alone(
    device: torch.device,
) -> None:
    torch.manual_seed(0)
    model = GPTJForCausalLM(CONFIG).eval().to(device)
    engine = BatchEngine(model, eos_ids=[EOS], max_batch=8)
    callers = [submit(engine, p, max_tokens=8 + 3 * i) for i, p in enumerate(PROMPTS)]
    for i, (prompt, caller) in enumerate(zip(PROMPTS, callers, strict=True)):
        assert caller.ids == alone(model, prompt, max_new_tokens=8 + 3 * i)
    engine.close()


def test_more_requests_than_a_batch_holds_all_get_their_own_output(model: GPTJForCausalLM) -> None:
    engine = BatchEngine(model, eos_ids=[EOS], max_batch=2)
    callers = [submit(engine, prompt) for prompt in PROMPTS]
    for prompt, caller in zip(PROMPTS, callers, strict=True):
        assert caller.ids == alone(model, prompt)
    engine.close()


def test_requests_with_different_parameters_share_a_batch(
    engine: BatchEngine, model: GPTJForCausalLM
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
    assert outputs[4] == [17] * 12


def test_a_seed_gives_the_same_tokens_whatever_runs_beside_it(engine: BatchEngine) -> None:
    setting = {"temperature": 1.0, "seed": 7, "ignore_eos": True}
    first = submit(engine, PROMPTS[0], **setting).ids
    others = [submit(engine, prompt, temperature=1.0) for prompt in PROMPTS]
    again = submit(engine, PROMPTS[0], **setting)
    different = submit(engine, PROMPTS[0], **{**setting, "seed": 8})
    assert again.ids == first
    assert different.ids != first
    for other in others:
        other.wait()


def test_logprobs_are_the_models_own_and_the_prompts_are_reported(
    engine: BatchEngine, model: GPTJForCausalLM
) -> None:
    prompt = PROMPTS[2]
    caller = submit(engine, prompt, logprobs=3, prompt_logprobs=2, max_tokens=4, min_tokens=4)
    scored, *tokens, _ = caller.wait()
    assert isinstance(scored, PromptLogprobs)
    ids = [*prompt, *caller.ids]
    expected = model(torch.tensor([ids])).logits[0].detach().log_softmax(dim=-1)
    events = [*scored.tokens, *(event for event in tokens if isinstance(event, TokenEvent))]
    assert [event.token_id for event in events] == ids
    assert events[0].logprob is None and events[0].top == ()
    for place, event in enumerate(events[1:]):
        assert event.logprob == pytest.approx(float(expected[place, event.token_id]), abs=1e-4)
        best = expected[place].topk(2 if place + 1 < len(prompt) else 3)
        assert [token for token, _ in event.top] == best.indices.tolist()
        assert [value for _, value in event.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_prompt_can_be_scored_without_generating(engine: BatchEngine) -> None:
    scored, end = submit(engine, PROMPTS[0], max_tokens=0, prompt_logprobs=0).wait()
    assert isinstance(scored, PromptLogprobs) and end == Finished("length")


def test_no_logprobs_are_reported_where_none_are_asked_for(engine: BatchEngine) -> None:
    tokens = submit(engine, PROMPTS[0], max_tokens=2, min_tokens=2).wait()[:-1]
    assert [event.logprob for event in tokens if isinstance(event, TokenEvent)] == [None, None]


def test_eos_ends_an_output_unless_it_is_ignored(engine: BatchEngine) -> None:
    forced = {"logit_bias": {EOS: 100.0}, "max_tokens": 5}
    assert submit(engine, [5], **forced).wait() == [Finished("stop", EOS)]
    assert submit(engine, [5], **forced, ignore_eos=True).ids == [EOS] * 5
    assert submit(engine, [5], **forced, min_tokens=3).ids[3:] == [EOS]
    assert EOS not in submit(engine, [5], **forced, min_tokens=3).ids[:3]


def test_stop_tokens_end_an_output_and_are_named(engine: BatchEngine) -> None:
    full = submit(engine, PROMPTS[0], ignore_eos=True).ids
    stop = full[4]
    caller = submit(engine, PROMPTS[0], ignore_eos=True, stop_token_ids=(stop,))
    assert caller.ids == full[: full.index(stop) + 1]
    assert caller.events[-1] == Finished("stop", stop)


def test_banned_ids_are_never_chosen_and_have_no_probability(model: GPTJForCausalLM) -> None:
    favourite = alone(model, PROMPTS[0], max_new_tokens=1)[0]
    engine = BatchEngine(model, eos_ids=[EOS], banned_ids=[favourite])
    caller = submit(engine, PROMPTS[0], logprobs=60, ignore_eos=True, max_tokens=20)
    assert favourite not in caller.ids
    for event in caller.events[:-1]:
        assert isinstance(event, TokenEvent)
        assert favourite not in dict(event.top)
        assert sum(math.exp(value) for _, value in event.top) == pytest.approx(1, abs=1e-5)
    found = Caller()
    engine.beam_search(PROMPTS[0], SamplingParams(max_tokens=8), BeamParams(4, 4), found)
    beams = found.wait()[0]
    assert isinstance(beams, BeamsFound)
    assert all(favourite not in output for output in beams.outputs)
    engine.close()


def test_beam_search_equals_generate_and_leaves_out_padding(
    engine: BatchEngine, model: GPTJForCausalLM
) -> None:
    prompt = PROMPTS[2]
    caller = Caller()
    submit(engine, PROMPTS[0])
    engine.beam_search(
        prompt, SamplingParams(max_tokens=10), BeamParams(4, 3, length_penalty=0.5), caller
    )
    beams, end = caller.wait()
    expected = model.generate(
        torch.tensor([prompt]),
        num_beams=4,
        num_return_sequences=3,
        length_penalty=0.5,
        max_new_tokens=10,
        pad_token_id=0,
    )[:, len(prompt) :].tolist()
    assert isinstance(beams, BeamsFound) and isinstance(end, Finished)
    for ours, theirs in zip(beams.outputs, expected, strict=True):
        assert list(ours) == theirs[: len(ours)]
        assert set(theirs[len(ours) :]) <= {0}


def test_a_cancelled_request_ends_and_the_others_go_on(
    engine: BatchEngine, model: GPTJForCausalLM
) -> None:
    """Cancelled from within its own first event: the next step must drop its row."""
    tickets: queue.Queue[Ticket] = queue.Queue()
    caller = Caller()

    def cancel_at_once(event: Event) -> None:
        if isinstance(event, TokenEvent):
            tickets.get(timeout=10).cancel()
        caller(event)

    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    tickets.put(engine.submit(PROMPTS[0][:2], params, cancel_at_once))
    other = submit(engine, PROMPTS[4])
    events = caller.wait()
    assert events[-1] == Finished("cancelled")
    assert len(events) == 2
    assert other.ids == alone(model, PROMPTS[4])


def test_a_waiting_request_is_cancelled_at_once(model: GPTJForCausalLM) -> None:
    engine = BatchEngine(model, eos_ids=[], max_batch=1)
    running = Blocker(engine)
    caller = Caller()
    ticket = engine.submit(PROMPTS[1], SamplingParams(), caller)
    ticket.cancel()
    assert caller.events == [Finished("cancelled")]
    running.release()
    running.caller.wait()
    engine.close()


def test_a_beam_search_can_be_cancelled(model: GPTJForCausalLM) -> None:
    engine = BatchEngine(model, eos_ids=[], max_batch=4)
    caller = Caller()
    ticket = engine.beam_search([5], SamplingParams(max_tokens=63), BeamParams(4), caller)
    ticket.cancel()
    assert caller.wait() == [Finished("cancelled")]
    engine.close()


def test_an_error_fails_the_requests_of_its_step_only_and_the_engine_goes_on(
    model: GPTJForCausalLM,
) -> None:
    """An id that passes no check is the error here: the embedding has no such row."""
    engine = BatchEngine(model, eos_ids=[EOS])
    blocker = Blocker(engine)
    bad = Caller()
    ticket = engine.submit([5, 6], SamplingParams(), bad)
    ticket._request.prompt[0] = 10_000
    blocker.release()
    (failed,) = bad.wait()
    assert isinstance(failed, Failed) and isinstance(failed.error, IndexError)
    assert submit(engine, PROMPTS[0]).ids == alone(model, PROMPTS[0])
    engine.close()


def test_an_output_that_is_not_finite_fails_with_the_reason() -> None:
    model = GPTJForCausalLM(CONFIG).eval()
    with torch.no_grad():
        model.lm_head.bias[3] = math.nan
    engine = BatchEngine(model, eos_ids=[EOS])
    for setting in ({}, {"prompt_logprobs": 1, "max_tokens": 0}):
        (failed,) = submit(engine, [5, 6], **setting).wait()
        assert isinstance(failed, Failed)
        assert "not finite" in str(failed.error)
    engine.close()


def test_a_caller_that_raises_harms_no_other(engine: BatchEngine, model: GPTJForCausalLM) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("this caller is gone")

    engine.submit(PROMPTS[1], SamplingParams(temperature=0), broken)
    assert submit(engine, PROMPTS[0]).ids == alone(model, PROMPTS[0])


@pytest.mark.parametrize(
    ("prompt", "params", "reason"),
    [
        ([], {}, "no tokens"),
        ([60], {}, "60 is no token id"),
        ([-1], {}, "-1 is no token id"),
        ([5] * 60, {"max_tokens": 5}, "60 tokens of the prompt and max_tokens=5 .* of 64"),
        ([5], {"logit_bias": {60: 1.0}}, "logit_bias: 60"),
        ([5], {"stop_token_ids": (99,)}, "stop_token_ids: 99"),
    ],
)
def test_what_cannot_work_is_refused_with_the_value(
    engine: BatchEngine, prompt: list[int], params: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        submit(engine, prompt, **params)


def test_a_prompt_and_output_can_fill_the_context(
    engine: BatchEngine, model: GPTJForCausalLM
) -> None:
    """Beside a shorter row, so that the batch has more columns than the context."""
    prompt = [5, 6] * 26
    callers = [
        submit(engine, [7], max_tokens=63, ignore_eos=True),
        submit(engine, prompt, ignore_eos=True),
    ]
    assert len(callers[0].ids) == 63
    assert callers[1].ids == alone(model, prompt, eos_token_id=[])


def test_a_full_queue_refuses_and_takes_requests_again_later(model: GPTJForCausalLM) -> None:
    engine = BatchEngine(model, eos_ids=[EOS], max_batch=1, max_waiting=2)
    blocker = Blocker(engine)
    waiting = [submit(engine, PROMPTS[0]) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        submit(engine, PROMPTS[0])
    blocker.release()
    for caller in waiting:
        caller.wait()
    assert submit(engine, PROMPTS[0]).ids == alone(model, PROMPTS[0])
    engine.close()


def test_the_engine_is_alive_idle_or_busy_and_not_when_it_hangs_or_has_ended(
    model: GPTJForCausalLM,
) -> None:
    engine = BatchEngine(model, eos_ids=[EOS])
    time.sleep(2)
    assert engine.alive(within_seconds=1.9)  # an idle one shows it twice a second
    blocker = Blocker(engine)  # a step that does not end
    time.sleep(0.7)
    assert not engine.alive(within_seconds=0.65)
    blocker.release()
    blocker.caller.wait()
    assert engine.alive(within_seconds=10)
    engine.close()
    assert not engine.alive(within_seconds=100)


def test_an_engine_whose_every_batch_fails_is_not_alive() -> None:
    """As after an error of a GPU, from which only a new process recovers."""
    torch.manual_seed(0)
    model = GPTJForCausalLM(CONFIG).eval()
    engine = BatchEngine(model, eos_ids=[EOS])

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    hook = model.transformer.register_forward_pre_hook(fail)
    for failures in range(3):
        assert engine.alive(within_seconds=30), failures
        (failed,) = submit(engine, PROMPTS[0]).wait()
        assert isinstance(failed, Failed)
        deadline = time.monotonic() + 10
        while engine.alive(30) and failures == 2 and time.monotonic() < deadline:
            time.sleep(0.01)  # the last event comes just before the batch counts
    assert not engine.alive(within_seconds=30)
    hook.remove()
    submit(engine, PROMPTS[0]).wait()
    deadline = time.monotonic() + 10
    while not engine.alive(30) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.alive(within_seconds=30)
    engine.close()


def test_a_beam_search_may_have_every_token_as_a_stop_token(
    engine: BatchEngine, model: GPTJForCausalLM
) -> None:
    caller = Caller()
    params = SamplingParams(max_tokens=3, stop_token_ids=tuple(range(60)))
    engine.beam_search(PROMPTS[0], params, BeamParams(num_beams=4), caller)
    found = caller.wait()[0]
    assert isinstance(found, BeamsFound) and len(found.outputs[0]) == 1


def test_closing_fails_what_waits_and_what_comes(model: GPTJForCausalLM) -> None:
    engine = BatchEngine(model, eos_ids=[], max_batch=1)
    blocker = Blocker(engine)
    waiting = submit(engine, PROMPTS[0])
    closing = threading.Thread(target=engine.close)
    closing.start()
    (failed,) = waiting.wait()
    assert isinstance(failed, Failed) and isinstance(failed.error, ClosedError)
    with pytest.raises(ClosedError):
        submit(engine, PROMPTS[0])
    blocker.release()
    closing.join(30)
    assert isinstance(blocker.caller.wait()[-1], Failed)


def test_a_batcher_gives_each_caller_its_own_result_in_few_batches() -> None:
    sizes = []
    started, go_on = threading.Event(), threading.Event()

    def squares(items: list[int]) -> list[int]:
        sizes.append(len(items))
        started.set()
        assert go_on.wait(10)
        return [item * item for item in items]

    batcher: Batcher[int, int] = Batcher("squares", squares, max_batch=4, max_waiting=9)
    first = batcher.submit([3])
    assert started.wait(10)
    futures: list[Future[int]] = [batcher.submit([n])[0] for n in range(8)]
    futures[2].cancel()
    more = batcher.submit([10, 11])
    with pytest.raises(QueueFullError):
        batcher.submit([1])
    go_on.set()
    assert first[0].result(10) == 9
    assert [f.result(10) for n, f in enumerate(futures) if n != 2] == [0, 1, 9, 16, 25, 36, 49]
    assert [future.result(10) for future in more] == [100, 121]
    assert sizes == [1, 4, 4, 1]
    batcher.close()


def test_a_batchers_error_reaches_its_callers_and_no_later_one() -> None:
    def inverses(items: list[float]) -> list[float]:
        return [1 / item for item in items]

    batcher: Batcher[float, float] = Batcher("inverses", inverses, max_batch=4, max_waiting=4)
    with pytest.raises(ZeroDivisionError):
        batcher.submit([0.0])[0].result(10)
    assert batcher.submit([4.0])[0].result(10) == 0.25
    batcher.close()
    with pytest.raises(ClosedError):
        batcher.submit([4.0])


class Blocker:
    """A request that holds the engine's thread in its first event until it is released."""

    def __init__(self, engine: BatchEngine) -> None:
        self._released = threading.Event()
        self._holds = threading.Event()
        self.caller = Caller()
        engine.submit([5], SamplingParams(max_tokens=2, ignore_eos=True), self._on_event)
        assert self._holds.wait(10)

    def _on_event(self, event: Event) -> None:
        self._holds.set()
        assert self._released.wait(10)
        self.caller(event)

    def release(self) -> None:
        self._released.set()

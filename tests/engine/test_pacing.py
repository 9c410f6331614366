"""Prompts are prefilled beside running streams without delaying these beyond a target."""

from __future__ import annotations

import random
import threading
from collections import deque
from types import SimpleNamespace

import pytest
from engine_caller import Caller, WatchedRunner, alone, tiny_model, tokens

from gptj.engine import core
from gptj.engine.engine import Engine
from gptj.engine.events import Event
from gptj.engine.pacing import AIM, PrefillPacer
from gptj.engine.runners.base import StepBatch
from gptj.sampling import SamplingParams

BASE, COST = 0.010, 0.002  # seconds of a step, and of each prompt token in it


@pytest.mark.parametrize("delay", [0, 1])  # steps launched before the last one's time is known
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize(("base", "cost"), [(0.001, 1e-5), (0.01, 0.002), (0.012, 0.0035)])
def test_steps_take_the_target_whatever_they_cost(
    base: float, cost: float, noise: float, delay: int
) -> None:
    numbers = random.Random(1)
    pacer = PrefillPacer(0.02, 4096)
    launched = deque(pacer.limit for _ in range(delay))
    took = []
    for _ in range(400):
        launched.append(pacer.limit)
        count = launched.popleft()
        seconds = (base + cost * count) * numbers.uniform(1 - noise, 1 + noise)
        pacer.note(count, seconds)
        took.append(seconds)
    settled = took[100:]
    assert 0.02 * AIM * (1 - 2 * noise) - cost <= sum(settled) / len(settled) <= 0.02 * AIM
    assert sorted(settled)[int(0.99 * len(settled))] <= 0.02
    assert max(took) <= 0.02 * (1 + noise)


def test_the_limit_follows_what_steps_cost() -> None:
    pacer = PrefillPacer(0.02, 4096)

    def settle(base: float) -> int:
        for _ in range(50):
            pacer.note(pacer.limit, base + 1e-4 * pacer.limit)
        return pacer.limit

    assert settle(0.002) == pytest.approx(160, abs=2)
    assert settle(0.015) == pytest.approx(30, abs=2)  # more streams
    assert settle(0.002) == pytest.approx(160, abs=2)  # they have ended
    assert settle(0.030) == 1  # out of reach: prompts still advance
    assert settle(0.002) == pytest.approx(160, abs=2)


def test_short_prompts_say_only_that_a_limit_is_too_high() -> None:
    pacer = PrefillPacer(0.02, 4096)
    for _ in range(50):
        pacer.note(pacer.limit, 0.002 + 1e-4 * pacer.limit)
    limit = pacer.limit
    for _ in range(50):
        pacer.note(3, 0.0023)
    assert pacer.limit == limit
    for _ in range(3):
        pacer.note(40, 0.024)
    assert pacer.limit == 30


@pytest.mark.parametrize("tokens", [1, 100])
def test_one_slow_step_says_little(tokens: int) -> None:
    """Whatever its prompt tokens: one of a cached prompt, or all that there was room for."""
    pacer = PrefillPacer(0.05, 4096)
    for _ in range(50):
        pacer.note(pacer.limit, 0.02 + 1e-4 * pacer.limit)
    before = pacer.limit
    assert before > 200
    pacer.note(tokens, 1.0)
    assert before / 2 <= pacer.limit + 1 <= before
    for _ in range(20):  # and many say much
        pacer.note(min(tokens, pacer.limit), 1.0)
    assert pacer.limit == 1


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan")])
def test_a_target_that_is_not_positive_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="itl_target_seconds must be above 0"):
        PrefillPacer(target, 256)


@pytest.mark.slow
@pytest.mark.parametrize("target", [None, 0.020])
def test_a_long_prompt_beside_a_stream_keeps_the_target(
    monkeypatch: pytest.MonkeyPatch, target: float | None
) -> None:
    """The clock is the model's: a step takes BASE and COST for each token of a prompt."""
    model = tiny_model()
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(core, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    took: list[tuple[int, float]] = []  # the sequences and seconds of each step

    def compute(batch: StepBatch) -> None:
        seconds = BASE + COST * (len(batch.ids_T) - 1)
        clock.now += seconds
        took.append((len(batch.query_start_loc) - 1, seconds))

    runner = WatchedRunner(model, 64, compute)
    engine = Engine(
        runner, eos_ids=[], max_num_seqs=4, max_num_batched_tokens=64, itl_target_seconds=target
    )
    submitted = threading.Event()
    long = Caller()
    params = SamplingParams(max_tokens=5, temperature=0)

    def submit_long(event: Event) -> None:
        if not submitted.is_set():
            submitted.set()
            engine.submit(tokens(200), params, long)

    stream = Caller(submit_long)
    engine.submit([5, 6], SamplingParams(max_tokens=100, temperature=0), stream)
    assert long.ids == alone(model, tokens(200), max_new_tokens=5, eos_token_id=[])
    assert stream.ids == alone(model, [5, 6], max_new_tokens=100, eos_token_id=[])
    engine.close()
    beside = [seconds for sequences, seconds in took if sequences == 2]
    if target is None:
        assert max(beside) == pytest.approx(BASE + COST * 63)
    else:
        assert max(beside) <= target
        assert BASE + COST * 3 in [pytest.approx(seconds) for seconds in beside]  # not always 1


def test_a_prompt_alone_is_not_delayed() -> None:
    model = tiny_model()
    runner = WatchedRunner(model, 64)
    engine = Engine(
        runner, eos_ids=[], max_num_seqs=4, max_num_batched_tokens=64, itl_target_seconds=1e-9
    )
    caller = Caller()
    engine.submit(tokens(200), SamplingParams(max_tokens=2, temperature=0), caller)
    caller.wait()
    engine.close()
    assert runner.lengths == [[64], [64], [64], [8], [1]]

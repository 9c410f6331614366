"""Who runs when, and on which pages: fair, bounded steps, prefixes computed once, and no leak."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
from engine_caller import (
    EOS,
    SECONDS,
    Caller,
    Gate,
    WatchedRunner,
    alone,
    assert_written_pages_are_not_shared,
    held,
    search,
    submit,
    submit_many,
    tiny_model,
    tokens,
)

from gptj import GPTJForCausalLM
from gptj.engine.engine import Engine
from gptj.engine.events import Event, Failed, Finished, TokenEvent
from gptj.engine.request import BeamParams, Ticket
from gptj.engine.runners.base import StepBatch
from gptj.engine.runners.torch_runner import TorchRunner
from gptj.sampling import SamplingParams


@pytest.fixture(scope="module")
def model() -> GPTJForCausalLM:
    return tiny_model()


def test_a_long_prompt_neither_stalls_decoding_nor_exceeds_the_token_budget(
    model: GPTJForCausalLM,
) -> None:
    runner = WatchedRunner(model, 64)
    engine = Engine(runner, eos_ids=[], max_num_seqs=8, max_num_batched_tokens=16)
    submitted = threading.Event()
    long = Caller()

    def submit_long(event: Event) -> None:
        if not submitted.is_set():
            submitted.set()
            engine.submit(tokens(200), SamplingParams(max_tokens=5, temperature=0), long)

    first = Caller(submit_long)
    params = SamplingParams(max_tokens=60, temperature=0)
    engine.submit_many([5, 6], [params] * 3, [first, Caller(), Caller()])
    assert long.ids == alone(model, tokens(200), max_new_tokens=5, eos_token_id=[])
    with_long = [lengths for lengths in runner.lengths if max(lengths) > 2]
    assert with_long == [[1, 1, 1, 13]] * 15 + [[1, 1, 1, 5]]
    first.wait()
    engine.close()


@pytest.mark.slow
def test_prompts_advance_even_with_max_num_seqs_decoding(
    model: GPTJForCausalLM,
) -> None:
    engine = Engine(TorchRunner(model, 64), eos_ids=[], max_num_seqs=4, max_num_batched_tokens=4)
    callers = [submit(engine, [5, n], max_tokens=200) for n in range(2, 5)]
    last = submit(engine, tokens(40), max_tokens=4)
    assert last.ids == alone(model, tokens(40), max_new_tokens=4, eos_token_id=[])
    assert not any(caller.ended.is_set() for caller in callers)
    for caller in callers:
        caller.wait()
    engine.close()


def test_prompts_are_computed_in_order_of_arrival(model: GPTJForCausalLM) -> None:
    gate = Gate()
    engine = Engine(
        WatchedRunner(model, 64, gate), eos_ids=[], max_num_seqs=8, max_num_batched_tokens=8
    )
    order: list[int] = []
    held(engine, gate)
    callers = []
    for number, length in enumerate((50, 3, 20, 1)):
        caller = Caller(lambda event, number=number: order.append(number))  # type: ignore[misc]
        engine.submit(tokens(length, start=number), SamplingParams(max_tokens=1), caller)
        callers.append(caller)
    gate.open()
    for caller in callers:
        caller.wait()
    assert list(dict.fromkeys(order)) == [0, 1, 2, 3]
    engine.close()


def test_requests_that_do_not_fit_wait_and_are_not_overtaken(
    model: GPTJForCausalLM,
) -> None:
    engine = Engine(TorchRunner(model, 5), eos_ids=[], max_num_seqs=8)
    callers = [submit(engine, tokens(40, start=n), max_tokens=30) for n in range(4)]
    callers.append(submit(engine, [5], max_tokens=2))
    assert not callers[-1].events
    for number, caller in enumerate(callers[:4]):
        expected = alone(model, tokens(40, start=number), max_new_tokens=30, eos_token_id=[])
        assert caller.ids == expected
    assert callers[-1].ids == alone(model, [5], max_new_tokens=2, eos_token_id=[])
    assert engine.stats().preemptions == 0  # one at a time, and none for nothing
    engine.close()


@pytest.mark.slow
def test_under_pressure_the_newest_is_preempted_and_gets_each_token_once(
    model: GPTJForCausalLM,
) -> None:
    runner = WatchedRunner(model, 9)
    engine = Engine(runner, eos_ids=[], max_num_seqs=8)
    ended: list[int] = []
    callers = []
    for number in range(3):
        caller = Caller(
            lambda event, number=number: (  # type: ignore[misc]
                ended.append(number) if isinstance(event, Finished) else None
            )
        )
        params = SamplingParams(max_tokens=100, temperature=0)
        engine.submit([5 + number], params, caller)
        callers.append(caller)
    for number, caller in enumerate(callers):
        assert caller.ids == alone(model, [5 + number], max_new_tokens=100, eos_token_id=[])
    assert ended == [0, 1, 2]
    stats = engine.stats()
    # Each comes back once only, when there is room for all that it may still write.
    assert stats.preemptions == 2
    assert stats.tokens_out == 300
    assert stats.waiting == stats.running == 0
    engine.close()


def test_a_cached_prefix_is_not_recomputed(model: GPTJForCausalLM) -> None:
    engine = Engine(TorchRunner(model, 64), eos_ids=[])
    expected = alone(model, tokens(40), eos_token_id=[])
    assert submit(engine, tokens(40)).ids == expected
    assert engine.stats().tokens_in == 40
    assert submit(engine, tokens(40)).ids == expected
    stats = engine.stats()
    assert stats.tokens_in == 40 + 8
    assert stats.prefix_tokens_hit == 32
    assert stats.prefix_tokens_asked == 80
    # The last token is always computed: its logits are what is wanted.
    assert submit(engine, tokens(32)).ids == alone(model, tokens(32), eos_token_id=[])
    assert engine.stats().prefix_tokens_hit == 32 + 16
    engine.close()


def test_a_conversations_next_turn_reuses_its_earlier_output(model: GPTJForCausalLM) -> None:
    engine = Engine(TorchRunner(model, 64), eos_ids=[])
    first = tokens(20)
    output = submit(engine, first, max_tokens=30).ids
    second = [*first, *output, 7, 8, 9]
    assert submit(engine, second).ids == alone(model, second, eos_token_id=[])
    assert engine.stats().prefix_tokens_hit == 48
    engine.close()


def test_equal_pages_after_different_prefixes_are_not_shared(model: GPTJForCausalLM) -> None:
    engine = Engine(TorchRunner(model, 64), eos_ids=[])
    for start in (3, 4):
        prompt = [*tokens(16, start=start), *tokens(16, start=9), 5]
        assert submit(engine, prompt).ids == alone(model, prompt, eos_token_id=[])
    assert engine.stats().prefix_tokens_hit == 0
    engine.close()


@pytest.mark.slow
def test_cached_prefixes_are_evicted_for_running_sequences(model: GPTJForCausalLM) -> None:
    engine = Engine(TorchRunner(model, 6), eos_ids=[])
    for number in range(6):
        prompt = tokens(50, start=number)
        assert submit(engine, prompt).ids == alone(model, prompt, eos_token_id=[])
    assert submit(engine, tokens(50, start=0)).ids == alone(model, tokens(50, 0), eos_token_id=[])
    stats = engine.stats()
    assert stats.prefix_tokens_hit == 0
    assert stats.pages_cached > 0
    assert stats.pages_used == 0
    engine.close()


def test_a_cancelled_requests_pages_are_free_at_the_next_step(model: GPTJForCausalLM) -> None:
    """Seen from another request: cancelled at one of its tokens, gone at the next."""
    engine = Engine(TorchRunner(model, 64), eos_ids=[])
    params = SamplingParams(max_tokens=100, temperature=0)
    victims = [Caller() for _ in range(4)]
    tickets: list[Ticket] = []
    used: list[int] = []

    def watch(event: Event) -> None:
        if isinstance(event, TokenEvent) and len(observer.events) == 6:
            for ticket in tickets:
                ticket.cancel()
        if isinstance(event, TokenEvent) and len(observer.events) == 7:
            used.append(engine.stats().pages_used)
            assert all(victim.ended.is_set() for victim in victims)

    observer = Caller(watch)
    tickets += engine.submit_many(tokens(70, start=5), [params] * 3, victims[:3])
    tickets.append(
        engine.beam_search(tokens(20), SamplingParams(max_tokens=90), BeamParams(4), victims[3])
    )
    engine.submit([5, 6], params, observer)
    observer.wait()
    assert used == [1]
    assert [victim.events[-1] for victim in victims] == [Finished("cancelled")] * 4
    engine.close()


def test_a_thousand_requests_cancelled_at_random_leave_nothing_running(
    model: GPTJForCausalLM,
) -> None:
    engine = Engine(TorchRunner(model, 80), eos_ids=[], max_num_seqs=16)
    rng = random.Random(0)
    callers = [Caller() for _ in range(1000)]
    tickets = [
        engine.submit(
            tokens(rng.randrange(1, 60), start=n % 7),
            SamplingParams(max_tokens=190, temperature=n % 2, seed=n),
            caller,
        )
        for n, caller in enumerate(callers)
    ]
    rng.shuffle(tickets)

    def cancel(some: list[Ticket]) -> None:
        for ticket in some:
            ticket.cancel()
            time.sleep(0.001)

    threads = [threading.Thread(target=cancel, args=(tickets[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for caller in callers:
        caller.wait()
    stats = engine.stats()
    assert stats.running == stats.waiting == stats.pages_used == 0
    finished = sum(caller.events[-1] == Finished("cancelled") for caller in callers)
    assert stats.cancellations == finished > 900
    assert submit(engine, tokens(20)).ids == alone(model, tokens(20), eos_token_id=[])
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(3, 8))]
)
def test_after_any_mix_each_request_ends_once_and_all_pages_are_free(
    model: GPTJForCausalLM, seed: int
) -> None:
    """Outputs of every kind, cancelled at random; callers and steps that fail at random."""
    rng = random.Random(seed)
    faults = random.Random(seed + 100)
    failing = seed % 2 == 1

    def fail_at_times(batch: StepBatch) -> None:
        assert_written_pages_are_not_shared(batch)
        if failing and faults.random() < 0.03:
            raise RuntimeError("the step broke")

    engine = Engine(
        WatchedRunner(model, rng.choice([14, 20, 40]), fail_at_times),
        eos_ids=[EOS],
        max_num_seqs=rng.choice([4, 8, 16]),
        max_num_batched_tokens=rng.choice([16, 40, 256]),
        prefix_caching=rng.random() < 0.7,
    )
    expected: dict[tuple[int, int], list[int]] = {}
    callers: list[Caller] = []
    greedy: list[tuple[Caller, tuple[int, int]]] = []
    tickets: list[Ticket] = []
    for _ in range(60):
        key = (rng.choice([1, 5, 15, 16, 33, 60]), rng.randrange(4))
        prompt = tokens(*key)
        kind = rng.random()
        some = [Caller(_raising_at(rng) if rng.random() < 0.1 else None) for _ in range(4)]
        if kind < 0.5:
            params = _params(rng)
            some = some[:1]
            tickets.append(engine.submit(prompt, params, some[0]))
            if params.temperature == 0 and params.min_tokens == 0:
                greedy.append((some[0], key))
        elif kind < 0.8:
            tickets += engine.submit_many(prompt, [_params(rng) for _ in some], some)
        else:
            some = some[:1]
            beams = BeamParams(rng.choice([2, 3]), early_stopping=rng.random() < 0.5)
            params = SamplingParams(max_tokens=rng.randrange(1, 30))
            tickets.append(engine.beam_search(prompt, params, beams, some[0]))
        callers += some
        if rng.random() < 0.4:
            rng.choice(tickets).cancel()
        time.sleep(rng.choice([0, 0.002]))
    for caller in callers:
        caller.wait()
    for caller in callers:
        ends = [event for event in caller.events if isinstance(event, Finished | Failed)]
        assert len(ends) == 1
        assert caller.events[-1] is ends[0]
        if isinstance(ends[0], Failed):
            assert failing
            assert str(ends[0].error) == "the step broke"
    for caller, key in greedy:
        found = [event.token_id for event in caller.events if isinstance(event, TokenEvent)]
        if key not in expected:
            expected[key] = alone(model, tokens(*key), max_new_tokens=60)
        assert found == expected[key][: len(found)]
    stats = engine.stats()
    assert stats.running == stats.waiting == stats.pages_used == 0
    engine.close()
    assert submit_is_refused(engine)


def submit_is_refused(engine: Engine) -> bool:
    try:
        submit(engine, [5])
    except RuntimeError as error:
        return "closed" in str(error)
    return False


def _params(rng: random.Random) -> SamplingParams:
    most = rng.randrange(1, 60)
    chosen: dict[str, Any] = rng.choice(
        [
            {"temperature": 0},
            {"temperature": 0},
            {"temperature": 1.0, "seed": rng.randrange(9)},
            {"temperature": 0.7, "top_p": 0.9, "logprobs": 2, "ignore_eos": True},
            {"temperature": 0, "prompt_logprobs": 1, "min_tokens": most},
        ]
    )
    return SamplingParams(max_tokens=most, **chosen)


def _raising_at(rng: random.Random) -> Any:
    left = [rng.randrange(1, 20)]

    def then(event: Event) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("this caller is gone")

    return then


def test_counters_only_grow_and_gauges_return_to_zero(model: GPTJForCausalLM) -> None:
    gate = Gate()
    engine = Engine(WatchedRunner(model, 64, gate), eos_ids=[], max_num_seqs=4)
    held(engine, gate)
    waiting = submit_many(engine, tokens(20), *({"max_tokens": 5},) * 4)
    found = search(engine, tokens(5), BeamParams(3), max_tokens=6)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (1, 5, 1)
    gate.open()
    for caller in (*waiting, found):
        assert caller.ended.wait(SECONDS)
    after = engine.stats()
    assert (after.running, after.waiting, after.pages_used) == (0, 0, 0)
    assert after.tokens_out == 2 + 20 + len(found.beams[0])
    assert after.steps > stats.steps
    assert after.tokens_in > stats.tokens_in
    assert after.pages_total == 64
    engine.close()

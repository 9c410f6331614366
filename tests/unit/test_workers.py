"""Bounded queues and batches: each caller gets its own result, or a reason at once."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

import pytest

from gptj.workers.batcher import Batcher, BatchTimes
from gptj.workers.bounded_queue import BoundedQueue
from gptj.workers.errors import ClosedError, QueueFullError


def test_a_queue_takes_all_or_none_and_is_fifo() -> None:
    queue: BoundedQueue[str] = BoundedQueue(3)
    queue.put(["a", "b"])
    with pytest.raises(QueueFullError, match="2 requests are already waiting, and 2 more"):
        queue.put(["c", "d"])
    queue.put(["c"])
    assert queue.peek(2) == ["a", "b"]
    assert queue.remove("b")
    assert not queue.remove("b")
    assert queue.take(["a", "b"]) == ["a"]
    queue.put_back(["a", "b", "x", "y"])  # beyond the limit: they had their turn
    assert queue.take(queue.peek(4)) == ["a", "b", "x", "y"]
    assert queue.close() == ["c"]
    assert len(queue) == 0
    with pytest.raises(ClosedError):
        queue.put(["d"])
    queue.wait(60)  # returns at once


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def take(queue: BoundedQueue[object], clock: Clock, seconds: float, count: int, turns: int) -> None:
    """So many turns of `count` items, each after so many seconds."""
    for _ in range(turns):
        clock.now += seconds
        for item in queue.peek(count):
            assert queue.take([item]) == [item]
        queue.end_turn()


def objects(number: int) -> list[object]:
    return [object() for _ in range(number)]


def test_a_queue_refuses_items_that_would_wait_too_long_at_the_recent_pace() -> None:
    clock = Clock()
    queue: BoundedQueue[object] = BoundedQueue(100, 2.0, clock=clock)
    queue.put(objects(60))  # nothing is known yet
    take(queue, clock, 0.1, 1, turns=40)
    with pytest.raises(
        QueueFullError, match=r"20 requests .* wait for about 2\.1 s, more than .* 2 s: try again"
    ) as refused:
        queue.put(objects(1))
    assert refused.value.for_one
    take(queue, clock, 0.1, 1, turns=2)
    queue.put(objects(1))  # the 19th
    take(queue, clock, 0.1, 2, turns=9)  # twice as fast
    queue.put(objects(60))
    take(queue, clock, 0.1, 2, turns=9)
    with pytest.raises(QueueFullError, match=r"43 requests .* about 2\.8 s"):
        queue.put(objects(1))


def test_what_fits_at_once_is_not_refused_for_the_pace_before() -> None:
    clock, room = Clock(), [0]
    queue: BoundedQueue[object] = BoundedQueue(100, 2.0, room=lambda: room[0], clock=clock)
    queue.put(objects(30))
    take(queue, clock, 1.0, 1, turns=29)
    with pytest.raises(QueueFullError):
        for _ in range(3):
            queue.put(objects(1))
    take(queue, clock, 1.0, 3, turns=1)
    room[0] = 20
    for _ in range(22):  # two of which wait for room, 2 s
        queue.put(objects(1))
    with pytest.raises(QueueFullError, match=r"22 requests .* about 2\.9 s"):
        queue.put(objects(1))


def test_only_time_without_room_counts_for_a_queues_pace() -> None:
    clock = Clock()
    queue: BoundedQueue[object] = BoundedQueue(100, 2.0, room=lambda: 8, clock=clock)
    for _ in range(50):
        queue.put(objects(2))
        take(queue, clock, 10.0, 8, turns=1)  # at once, after a long batch
    for _ in range(60):
        queue.put(objects(1))  # nothing is known
    assert len(queue) == 60


def test_items_that_gave_up_or_were_put_back_do_not_stop_a_queue() -> None:
    clock = Clock()
    queue: BoundedQueue[object] = BoundedQueue(100, 2.0, clock=clock)
    first, second, third = objects(3)
    queue.put([first, second, third])
    clock.now += 1
    assert queue.take([first]) == [first]
    queue.end_turn()
    clock.now += 100
    assert queue.remove(second)
    assert queue.remove(third)
    queue.put([second])
    queue.put([third])  # the last turn took 1 s
    queue.put_back([first])
    clock.now += 1
    assert queue.take([first, second, third]) == [first, second, third]
    queue.end_turn()
    assert len(queue) == 0


def test_a_request_of_many_items_is_refused_for_its_size() -> None:
    queue: BoundedQueue[object] = BoundedQueue(64)
    for waiting, for_one in ((0, False), (31, False), (32, True), (60, True)):
        queue.put(objects(waiting - len(queue)))
        with pytest.raises(QueueFullError) as refused:
            queue.put(objects(65 - waiting))
        assert refused.value.for_one == for_one


def test_answers_that_end_together_set_the_pace_together() -> None:
    """All slots are free every 10 s, and filled by 16 in each of the next steps."""
    clock, chance, slots = Clock(), random.Random(0), 256
    queue: BoundedQueue[float] = BoundedQueue(1024, 2.0, together=slots, clock=clock)
    waits: list[float] = []
    free, refused, end = slots, 0, 10.0
    for step in range(3000):
        for _ in range(round(80 * 0.04)):  # more than twice what fits
            try:
                queue.put([clock.now + 0.01 * chance.random()])
            except QueueFullError:
                refused += 1
        if clock.now >= end:
            free, end = slots, clock.now + 10
        taken = queue.take(queue.peek(min(free, 16)))
        queue.end_turn()
        free -= len(taken)
        if step > 1000:
            waits += [clock.now - each for each in taken]
        clock.now += 0.04
    assert refused
    assert statistics.median(waits) < 10 and max(waits) < 2 + 10 + 2


def closed_loop(clients: int, limit: float | None) -> tuple[int, float]:
    """Clients of batches of 32 that take a second each and that retry a second later.

    Returns the answers in a hundred batches, and the longest time from arrival to batch.
    """
    clock, chance = Clock(), random.Random(0)
    queue: BoundedQueue[list[float]] = BoundedQueue(
        1000, limit, at_once=32, together=32, clock=clock
    )
    arrivals = [chance.random() for _ in range(clients)]
    answers, longest, end = 0, 0.0, 0.0
    while clock.now < 100:
        end += 1.0  # of the running batch
        for client, arrival in sorted(enumerate(arrivals), key=lambda each: each[1]):
            if arrival < end:
                clock.now = arrival
                try:
                    queue.put([[arrival, client]])
                    arrivals[client] = float("inf")
                except QueueFullError:
                    arrivals[client] = arrival + 1 + 0.1 * chance.random()
        clock.now = end
        batch = queue.take(queue.peek(32))
        queue.end_turn()
        answers += len(batch)
        for arrival, client in batch:
            if arrival > 20:  # the pace is known
                longest = max(longest, end - arrival)
            arrivals[int(client)] = end + 1 + 0.1 * chance.random()
    return answers, longest


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.9, 1.2])
def test_a_load_below_capacity_is_rarely_refused(limit: float) -> None:
    """30 arrivals a second, and batches of 32 that take a second."""
    clock, chance = Clock(), random.Random(0)
    queue: BoundedQueue[object] = BoundedQueue(1000, limit, at_once=32, together=32, clock=clock)
    arrivals = refused = 0
    for end in range(1, 200):
        while (arrival := clock.now + chance.expovariate(30)) < end:
            clock.now = arrival
            arrivals += 1
            try:
                queue.put(objects(1))
            except QueueFullError:
                refused += 1
        clock.now = end
        queue.take(queue.peek(32))
        queue.end_turn()
    assert refused < 0.03 * arrivals


@pytest.mark.parametrize(("clients", "limit"), [(20, 1.2), (32, 0.5), (64, 0.5), (200, 1.0)])
def test_a_time_limit_does_not_make_batches_small(clients: int, limit: float) -> None:
    without, _ = closed_loop(clients, None)
    answers, longest = closed_loop(clients, limit)
    assert answers >= 0.7 * without
    assert longest < 2 + limit


@pytest.mark.parametrize(("max_batch", "max_queued"), [(0, 1), (1, 0)])
def test_a_batcher_needs_room(max_batch: int, max_queued: int) -> None:
    with pytest.raises(ValueError, match="must be 1 or more, got 0"):
        Batcher("none", list, max_batch=max_batch, max_queued=max_queued)


def test_a_batcher_gives_each_caller_its_own_result_in_few_batches() -> None:
    sizes = []
    started, go_on = threading.Event(), threading.Event()

    def squares(items: list[int]) -> list[int]:
        sizes.append(len(items))
        started.set()
        assert go_on.wait(10)
        return [item * item for item in items]

    batcher: Batcher[int, int] = Batcher("squares", squares, max_batch=4, max_queued=9)
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


def test_a_batchs_cost_is_bounded_and_its_times_are_reported() -> None:
    started, go_on = threading.Event(), threading.Event()
    seen: list[tuple[list[str], BatchTimes]] = []

    def lengths(items: Sequence[str]) -> list[int]:
        started.set()
        assert go_on.wait(10)
        return list(map(len, items))

    batcher: Batcher[str, int] = Batcher(
        "lengths",
        lengths,
        max_batch=3,
        max_queued=9,
        cost=len,
        max_cost=5,
        observe=lambda items, times: seen.append((list(items), times)),
    )
    begun = time.monotonic()
    first = batcher.submit(["a"])
    assert started.wait(10)
    items = ["aa", "bbb", "c", "longest", "d", "e", "f", "g"]
    futures = batcher.submit(items)
    submitted = time.monotonic()
    time.sleep(0.05)
    held = time.monotonic() - submitted
    go_on.set()
    assert [future.result(10) for future in first + futures] == [1, *map(len, items)]
    batcher.close()
    whole = time.monotonic() - begun
    batches = [batch for batch, _ in seen]
    assert batches == [["a"], ["aa", "bbb"], ["c"], ["longest"], ["d", "e", "f"], ["g"]]
    assert held <= seen[0][1].computing <= whole
    for batch, times in seen:
        assert len(times.queued) == len(batch)
        assert min(*times.queued, times.computing) >= 0
        assert max(times.queued) + times.computing <= whole
    for _, times in seen[1:]:
        assert min(times.queued) >= held  # behind the first batch


def test_a_batchers_error_reaches_only_that_batchs_callers() -> None:
    def inverses(items: list[float]) -> list[float]:
        return [1 / item for item in items]

    batcher: Batcher[float, float] = Batcher("inverses", inverses, max_batch=4, max_queued=4)
    with pytest.raises(ZeroDivisionError):
        batcher.submit([0.0])[0].result(10)
    assert batcher.submit([4.0])[0].result(10) == 0.25
    batcher.close()
    with pytest.raises(ClosedError):
        batcher.submit([4.0])

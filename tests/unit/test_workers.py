"""Bounded queues and batches: each caller gets its own result, or a reason at once."""

from __future__ import annotations

import threading
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


def serve(queue: BoundedQueue[object], clock: Clock, number: int, seconds: float) -> None:
    """So many turns, each after so many seconds."""
    for _ in range(number):
        clock.now += seconds
        assert queue.take(queue.peek(1))


def test_a_queue_refuses_items_that_would_wait_too_long_at_the_recent_pace() -> None:
    clock = Clock()
    queue: BoundedQueue[object] = BoundedQueue(100, 2.0, clock)
    queue.put([object() for _ in range(60)])  # nothing is known yet
    serve(queue, clock, 40, 0.1)
    with pytest.raises(
        QueueFullError, match=r"20 requests .* wait for about 2\.1 s, more than .* 2 s: try again"
    ):
        queue.put([object()])
    serve(queue, clock, 2, 0.1)
    queue.put([object()])  # the 19th
    serve(queue, clock, 19, 0.05)  # twice as fast
    queue.put([object() for _ in range(22)])
    serve(queue, clock, 22, 0.05)
    queue.put([object() for _ in range(35)])
    with pytest.raises(QueueFullError, match="35 requests"):
        queue.put([object() for _ in range(10)])


def test_a_queue_recovers_from_a_long_stop() -> None:
    """An empty queue takes any item, by which it learns the new pace."""
    clock = Clock()
    queue: BoundedQueue[object] = BoundedQueue(100, 2.0, clock)
    queue.put([object()])
    serve(queue, clock, 1, 10)
    for _ in range(100):
        queue.put([object()])
        serve(queue, clock, 1, 0.01)
    queue.put([object() for _ in range(50)])
    queue.put([object()])


def test_only_turns_set_a_queues_pace() -> None:
    clock = Clock()
    queue: BoundedQueue[object] = BoundedQueue(100, 2.0, clock)
    first, second, _ = items = [object() for _ in range(3)]
    queue.put(items)
    clock.now += 1
    assert queue.take([first]) == [first]
    clock.now += 100
    assert queue.remove(second)  # it gave up
    queue.put_back([first])
    assert queue.take([first]) == [first]  # its second turn
    queue.put([object()])  # the second to wait: 2 s expected


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
    first = batcher.submit(["a"])
    assert started.wait(10)
    items = ["aa", "bbb", "c", "longest", "d", "e", "f", "g"]
    futures = batcher.submit(items)
    go_on.set()
    assert [future.result(10) for future in first + futures] == [1, *map(len, items)]
    batcher.close()
    batches = [batch for batch, _ in seen]
    assert batches == [["a"], ["aa", "bbb"], ["c"], ["longest"], ["d", "e", "f"], ["g"]]
    for batch, times in seen:
        assert len(times.queued) == len(batch)
        assert min(*times.queued, times.computing, 0) == 0


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

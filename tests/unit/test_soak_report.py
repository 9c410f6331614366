"""What gptj_bench.soak reports as a fault: lost requests, used pages, growth."""

from __future__ import annotations

from collections import Counter

from gptj_bench.faults import ANSWERED, Result
from gptj_bench.soak import Process, Soak


def test_growth_is_reported_as_a_fault() -> None:
    flat, growing = Process(1), Process(2)
    for number in range(100):
        flat.memory.append(10**9 if number > 15 else 10**8)  # while it warms up
        flat.files.append(50 + number % 5)
        growing.memory.append(10**8 + number * 10**6)
        growing.files.append(50 + number)
    answered = Result("none", 5, Counter({ANSWERED: 5}))
    assert Soak(answered, 0, {"flat": flat}, 0).faults() == []
    lost = Result("none", 5, Counter({ANSWERED: 4, "request cut off": 1}))
    faults = Soak(lost, 0, {"it": growing}, 3).faults()
    assert [fault.partition(":")[0] for fault in faults] == [
        "1 requests were lost",
        "3 pages of the cache are in use without requests",
        "it",
        "it",
    ]
    assert Soak(answered, 0, {}, None).faults() != []  # unknown is not zero

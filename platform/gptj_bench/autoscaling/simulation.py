"""Simulate requests through a proxy to replicas, whose number Ray Serve's autoscaler decides.

Simulated parts of Serve: routing (the less loaded of two random replicas),
`max_ongoing_requests`, the proxy's queue with `max_queued_requests`, the proxy's reports, and
replicas that start (as fast as the machine allows) and stop (newest first, after finishing their
requests). Refused clients do not retry.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from gptj_bench.autoscaling.autoscaler import Autoscaler, Clock, simulated_time
from gptj_bench.autoscaling.machines import Machine
from gptj_bench.autoscaling.replica import (
    Replica,
    Request,
    RowsReplica,
    TokensReplica,
    mean_context,
)
from gptj_bench.autoscaling.traffic import Arrivals

Signal = Literal["requests", "tokens"]

CONTROL_SECONDS = 1.0  # Ray's controller decides ten times as often, on reports every 10 s


@dataclass(frozen=True)
class Service:
    """One deployment's settings, from a Serve config and its application's defaults."""

    autoscaling: dict[str, Any]
    max_ongoing_requests: int
    max_queued_requests: int  # -1: no limit
    max_num_seqs: int  # or rows in a batch
    max_num_batched_tokens: int | None  # None: it computes whole rows

    def replica(self, number: int, machine: Machine) -> Replica:
        """A new replica without requests."""
        if self.max_num_batched_tokens is None:
            return RowsReplica(number, machine, self.max_num_seqs)
        return TokensReplica(number, machine, self.max_num_seqs, self.max_num_batched_tokens)


@dataclass(frozen=True)
class Moment:
    """The state at one control period."""

    time: float
    target: int
    running: int
    starting: int
    ending: int
    ongoing: int
    queued: int


@dataclass
class Outcome:
    requests: list[Request]
    moments: list[Moment] = field(default_factory=list)
    replica_seconds: float = 0.0  # from order to end, as billed


def simulate(
    service: Service,
    machine: Machine,
    arrivals: Arrivals,
    seed: int = 0,
    *,
    signal: Signal = "requests",
) -> Outcome:
    """Run all requests to completion. Deterministic.

    Args:
        signal: what the autoscaler counts: requests, as Serve does, or their tokens, as a policy of
            ours could, in units of a mean request's.
    """
    clock = Clock()
    with simulated_time(clock):
        return _Simulation(service, machine, arrivals, seed, clock, signal).run()


class _Simulation:
    def __init__(
        self,
        service: Service,
        machine: Machine,
        arrivals: Arrivals,
        seed: int,
        clock: Clock,
        signal: Signal,
    ) -> None:
        self._service = service
        self._machine = machine
        self._random = random.Random(seed)
        self._clock = clock
        self._autoscaler = Autoscaler(service.autoscaling, clock)
        self._outcome = Outcome(
            [
                Request(number, time, prompt, output)
                for number, (time, prompt, output) in enumerate(
                    zip(
                        arrivals.times.tolist(),
                        arrivals.prompts.tolist(),
                        arrivals.outputs.tolist(),
                        strict=True,
                    )
                )
            ]
        )
        self._unit: float | None = None  # tokens that count as a request
        if signal == "tokens":
            requests = self._outcome.requests
            self._unit = sum(map(mean_context, requests)) / len(requests)
        self._queue: deque[Request] = deque()  # in the proxy
        self._starting: deque[tuple[float, float]] = deque()  # (ready, ordered)
        self._running: list[Replica] = []  # oldest first
        self._ending: list[Replica] = []
        self._ordered: dict[int, float] = {}  # order times by replica number
        self._numbers = 0
        self._events: list[tuple[float, int, Replica]] = []  # a heap; outdated ones are skipped
        for _ in range(self._autoscaler.target):
            self._begin(ordered=0.0)

    def run(self) -> Outcome:
        coming: Iterator[Request] = iter(self._outcome.requests)
        following = next(coming, None)
        left = len(self._outcome.requests)
        control = CONTROL_SECONDS
        while left:
            arrival = following.arrival if following else inf
            event = self._events[0][0] if self._events else inf
            ready = self._starting[0][0] if self._starting else inf
            now = self._clock.now = min(arrival, event, ready, control)
            if event == now:
                _, _, replica = heapq.heappop(self._events)
                if replica.due == now:
                    left -= self._work(replica)
            elif ready == now:
                self._begin(ordered=self._starting.popleft()[1])
                self._dequeue()
            elif following is not None and arrival == now:
                left -= self._arrive(following)
                following = next(coming, None)
            else:
                control += CONTROL_SECONDS
                self._control()
        for replica in [*self._running, *self._ending]:
            self._count(self._ordered[replica.number])
        for _, ordered in self._starting:
            self._count(ordered)
        return self._outcome

    def _arrive(self, request: Request) -> int:
        """1 if the request is refused, else 0."""
        replica = self._choose()
        if replica is not None:
            self._give(replica, request)
        elif len(self._queue) == self._service.max_queued_requests:
            request.refused = True
        else:
            self._queue.append(request)
        return int(request.refused)

    def _choose(self) -> Replica | None:
        """The less loaded of two; if both are full, another; None if all are."""
        replicas = self._running
        pair = replicas if len(replicas) < 3 else self._random.sample(replicas, 2)
        for candidates in (pair, replicas):
            best = min(candidates, key=lambda replica: replica.ongoing, default=None)
            if best is not None and best.ongoing < self._service.max_ongoing_requests:
                return best
        return None

    def _give(self, replica: Replica, request: Request) -> None:
        replica.add(self._clock.now, request)
        self._expect(replica)

    def _expect(self, replica: Replica) -> None:
        if replica.due < inf:
            heapq.heappush(self._events, (replica.due, replica.number, replica))

    def _work(self, replica: Replica) -> int:
        """Process a replica's events; returns how many requests ended."""
        ended = len(replica.work(self._clock.now))
        self._expect(replica)
        if replica in self._ending and not replica.ongoing:
            self._ending.remove(replica)
            self._count(self._ordered[replica.number])
        if ended:
            self._dequeue()
        return ended

    def _dequeue(self) -> None:
        while self._queue and (replica := self._choose()) is not None:
            self._give(replica, self._queue.popleft())

    def _control(self) -> None:
        if self._unit is None:
            loads = {replica.number: float(replica.ongoing) for replica in self._running}
            queued = float(len(self._queue))
        else:
            loads = {replica.number: replica.tokens / self._unit for replica in self._running}
            queued = sum(map(mean_context, self._queue)) / self._unit
        self._autoscaler.observe(loads, queued)
        target = self._autoscaler.decide(loads)
        now = self._clock.now
        while len(self._running) + len(self._starting) < target:
            self._starting.append((now + self._machine.start_seconds, now))
        while len(self._running) + len(self._starting) > target:
            if self._starting:
                self._count(self._starting.pop()[1])
                continue
            replica = self._running.pop()
            if replica.ongoing:
                self._ending.append(replica)
            else:
                self._count(self._ordered[replica.number])
        self._outcome.moments.append(
            Moment(
                now,
                target,
                len(self._running),
                len(self._starting),
                len(self._ending),
                sum(replica.ongoing for replica in [*self._running, *self._ending]),
                len(self._queue),
            )
        )

    def _begin(self, ordered: float) -> None:
        replica = self._service.replica(self._numbers, self._machine)
        self._ordered[replica.number] = ordered
        self._numbers += 1
        self._running.append(replica)

    def _count(self, ordered: float) -> None:
        self._outcome.replica_seconds += self._clock.now - ordered

"""Our metrics, exported by Ray to Prometheus: see the README for their names."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache

from ray.serve import metrics

from gptj.engine.stats import EngineStats
from gptj.serving.metrics import Labels

MIN_SECONDS, MAX_SECONDS, RATIO = 1e-3, 600.0, 1.15  # buckets fine enough for percentiles
REPORT_SECONDS = 1.0


def boundaries() -> list[float]:
    """Histogram bucket bounds from a millisecond to ten minutes, each 15 % above the last."""
    bounds = [MIN_SECONDS]
    while bounds[-1] < MAX_SECONDS:
        bounds.append(bounds[-1] * RATIO)
    return bounds


class ServeMetrics:
    """A Recorder; one per process, created in the replica by serve_metrics."""

    def __init__(self) -> None:
        self._requests = metrics.Counter(
            "gptj_requests",
            "Answered requests.",
            ("route", "status"),  # type: ignore[arg-type]  # Ray's tuple[str] means any number
        )
        self._seconds = self._histogram(
            "gptj_request_seconds", "From a request to its reply's last byte.", ("route",)
        )
        self._first = self._histogram(
            "gptj_time_to_first_token_seconds", "From a request to its output's first token."
        )
        self._gap = self._histogram(
            "gptj_time_per_output_token_seconds", "Mean time between an output's tokens."
        )
        self._queued = self._histogram(
            "gptj_queue_seconds", "From a request to the first step that worked on it."
        )
        self._batch = self._histogram("gptj_batch_seconds", "A batch of rows in the model.")
        self._batch_queued = self._histogram(
            "gptj_batch_queue_seconds", "From a row's arrival to the batch that it is in."
        )
        self._batch_tokens = metrics.Counter("gptj_batch_tokens", "Tokens computed in batches.")
        self._key_requests = metrics.Counter(
            "gptj_key_requests",
            "Requests by key.",
            ("key", "refused"),  # type: ignore[arg-type]  # as above
        )
        self._key_tokens = metrics.Counter(
            "gptj_key_tokens",
            "Prompt and output tokens by key.",
            ("key",),
        )
        self._grammars = metrics.Counter(
            "gptj_grammars",
            "Requests with a grammar, by result.",
            ("result",),
        )
        self._adapter_requests = metrics.Counter(
            "gptj_adapter_requests", "Requests of an adapter.", ("adapter",)
        )
        self._adapters = Labels()
        self._adapter_loads = metrics.Counter(
            "gptj_adapter_loads",
            "Adapters read, by result.",
            ("result",),
        )
        self._adapter_seconds = self._histogram(
            "gptj_adapter_load_seconds", "From an adapter's first request until it was loaded."
        )
        self._compiling = self._histogram(
            "gptj_grammar_seconds", "From a request with a grammar until it was compiled or known."
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.inc(1, {"route": route, "status": str(status)})
        self._seconds.observe(seconds, {"route": route})

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def token_gap(self, seconds: float) -> None:
        self._gap.observe(seconds)

    def queued(self, seconds: float) -> None:
        self._queued.observe(seconds)

    def batch(self, queued: Sequence[float], tokens: int, seconds: float) -> None:
        for each in queued:
            self._batch_queued.observe(each)
        self._batch.observe(seconds)
        self._batch_tokens.inc(tokens)

    def key_use(self, key: str, tokens: int, *, refused: bool) -> None:
        self._key_requests.inc(1, {"key": key, "refused": str(refused).lower()})
        if tokens:
            self._key_tokens.inc(tokens, {"key": key})

    def grammar(self, result: str, seconds: float) -> None:
        self._grammars.inc(1, {"result": result})
        self._compiling.observe(seconds)

    def adapter_request(self, adapter: str) -> None:
        self._adapter_requests.inc(1, {"adapter": self._adapters.of(adapter)})

    def adapter_load(self, result: str, seconds: float) -> None:
        self._adapter_loads.inc(1, {"result": result})
        self._adapter_seconds.observe(seconds)

    def _histogram(
        self, name: str, description: str, tags: tuple[str, ...] = ()
    ) -> metrics.Histogram:
        return metrics.Histogram(
            name,
            description,
            boundaries=boundaries(),
            tag_keys=tags,  # type: ignore[arg-type]  # as above
        )


@cache
def serve_metrics() -> ServeMetrics:
    """This process's metrics."""
    return ServeMetrics()


def refusal_counter() -> Callable[[int], None]:
    """A metric to add to; for a proxy, whose own refusals no replica counts."""
    counter = metrics.Counter("gptj_proxy_refusals", "Requests that a proxy refused itself.")
    return counter.inc


class EngineReporter:
    """Reports an engine's numbers every second, from its own thread."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats
        self._last: dict[str, int] = {}
        self._gauges: dict[str, metrics.Gauge] = {}
        self._counters: dict[str, metrics.Counter] = {}
        for each in fields(EngineStats):
            name, description = f"gptj_engine_{each.name}", each.metadata["description"]
            if each.metadata["gauge"]:
                self._gauges[each.name] = metrics.Gauge(name, description)
            else:
                self._counters[each.name] = metrics.Counter(name, description)
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="engine-metrics", daemon=True).start()

    def close(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(REPORT_SECONDS):
            stats = self._stats()
            for name, gauge in self._gauges.items():
                gauge.set(getattr(stats, name))
            for name, counter in self._counters.items():
                value = getattr(stats, name)
                if more := value - self._last.get(name, 0):
                    counter.inc(more)
                self._last[name] = value

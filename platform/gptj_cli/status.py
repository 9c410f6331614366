"""`gptj status`: what a cluster serves, with its rates and latencies.

Applications and replicas come from Serve, through the cluster's dashboard; numbers from its nodes'
metrics, or from a Prometheus that scrapes them.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

ANSWER_SECONDS = 5.0
TARGETS_PATH = "/api/prometheus/sd"
# Metrics that Serve and the deployments export, see deployments.metrics.
RUNNING, WAITING = "ray_gptj_engine_running", "ray_gptj_engine_waiting"
ONGOING = "ray_serve_replica_processing_queries"  # of services without our engine
TOKENS = "ray_gptj_engine_tokens_out_total"
PAGES_USED, PAGES_TOTAL = "ray_gptj_engine_pages_used", "ray_gptj_engine_pages_total"
REQUESTS = "ray_gptj_requests_total"
FIRST_TOKEN = "ray_gptj_time_to_first_token_seconds_bucket"
LATENCY = "ray_gptj_request_seconds_bucket"
NAMES = (
    *(RUNNING, WAITING, ONGOING, TOKENS, PAGES_USED, PAGES_TOTAL),
    *(REQUESTS, FIRST_TOKEN, LATENCY),
)
# Routes that run the model, below their application's prefix. Others, such as pages, do not count.
WORK_ROUTES = frozenset(("/", "/v1/completions", "/v1/chat/completions"))


@dataclass(frozen=True)
class Sample:
    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class Reading:
    """A cluster's state and metrics at one moment."""

    time: float  # of time.monotonic
    details: Mapping[str, Any]  # Serve's
    samples: Sequence[Sample]
    problems: Sequence[str] = ()  # metrics that could not be read


@dataclass(frozen=True)
class Percentiles:
    """In seconds."""

    p50: float
    p99: float


@dataclass
class Numbers:
    """Of a replica, or of all of an application's; None if unknown."""

    running: int | None = None  # requests; of our engine, sequences
    waiting: int | None = None
    requests_per_second: float | None = None
    tokens_per_second: float | None = None
    cache_pages_used: int | None = None
    cache_pages_total: int | None = None
    first_token_seconds: Percentiles | None = None
    request_seconds: Percentiles | None = None

    @property
    def cache_share(self) -> float | None:
        if self.cache_pages_used is None or not self.cache_pages_total:
            return None
        return self.cache_pages_used / self.cache_pages_total


@dataclass
class Replica:
    id: str
    state: str  # Serve's: STARTING, RUNNING, STOPPING, …
    node: str  # its address
    numbers: Numbers


@dataclass
class Application:
    name: str
    route: str
    status: str  # Serve's: DEPLOYING, RUNNING, UNHEALTHY, …
    message: str  # the reason, if it does not run
    target_replicas: int
    numbers: Numbers
    replicas: list[Replica] = field(default_factory=list)
    checkpoint: str | None = None  # None: not in the configuration


@dataclass
class Status:
    applications: list[Application]
    proxies: dict[str, str]  # state by node address
    seconds: float | None  # that rates and percentiles cover; None: since the replicas' start
    problems: list[str]


class Watcher:
    """Reads a cluster's state repeatedly.

    Args:
        dashboard: the cluster's, http://HOST:PORT.
        prometheus: address of a Prometheus that scrapes the cluster; None to query its nodes.
        window_seconds: the longest interval of rates and percentiles.

    Raises ConnectionError if the dashboard does not answer.
    """

    def __init__(
        self, dashboard: str, prometheus: str | None = None, window_seconds: float = 60
    ) -> None:
        self._client = ServeSubmissionClient(dashboard)
        self._prometheus = prometheus
        self._window_seconds = window_seconds
        self._readings: deque[Reading] = deque()

    def read(self) -> Status:
        """The state now. Raises OSError if the cluster does not answer."""
        details = self._client.get_serve_details()
        samples: list[Sample] = []
        problems: list[str] = []
        for text, problem in self._exports(details):
            if problem is not None:
                problems.append(problem)
            samples += text
        now = Reading(time.monotonic(), details, samples, problems)
        self._readings.append(now)
        while now.time - self._readings[0].time > self._window_seconds:
            self._readings.popleft()
        return status(now, self._readings[0])

    def _exports(self, details: Mapping[str, Any]) -> Iterable[tuple[list[Sample], str | None]]:
        if not details["applications"]:
            return
        if self._prometheus is not None:
            yield _read(lambda: from_prometheus(self._prometheus or ""), self._prometheus)
            return
        found = self._client._do_request("GET", TARGETS_PATH)
        found.raise_for_status()
        targets = [target for group in found.json() for target in group["targets"]]
        with ThreadPoolExecutor(16) as pool:
            yield from pool.map(_of_node, targets)


def _of_node(target: str) -> tuple[list[Sample], str | None]:
    return _read(
        lambda: parsed(_get(f"http://{target}/metrics")), f"the node's metrics at {target}"
    )


def _read(read: Callable[[], list[Sample]], what: str) -> tuple[list[Sample], str | None]:
    try:
        return read(), None
    except OSError as error:
        return [], f"{what}: {error}"


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as reply:
        content: bytes = reply.read()
    return content.decode()


def parsed(text: str) -> list[Sample]:
    """Our samples of an export in Prometheus' text format."""
    ours = "\n".join(line for line in text.splitlines() if line.startswith(NAMES))
    return [
        Sample(sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(ours + "\n")
        for sample in family.samples
    ]


def from_prometheus(address: str) -> list[Sample]:
    """As `parsed`, for everything that a Prometheus scrapes. Raises OSError."""
    query = urllib.parse.urlencode({"query": f'{{__name__=~"{"|".join(NAMES)}"}}'})
    body = json.loads(_get(f"{address.rstrip('/')}/api/v1/query?{query}"))
    return [
        Sample(each["metric"]["__name__"], each["metric"], float(each["value"][1]))
        for each in body["data"]["result"]
    ]


def status(now: Reading, before: Reading) -> Status:
    """The status from two readings; `before` may be `now`."""
    seconds = now.time - before.time
    metrics = Metrics(now.samples, before.samples, seconds)
    applications = []
    for name, each in sorted(now.details["applications"].items()):
        prefix = each["route_prefix"] or ""
        replicas = [
            Replica(
                replica["replica_id"],
                replica["state"],
                replica["node_ip"] or "",
                metrics.numbers([replica["replica_id"]], prefix),
            )
            for deployment in each["deployments"].values()
            for replica in deployment["replicas"]
        ]
        applications.append(
            Application(
                name,
                prefix,
                each["status"],
                each["message"],
                sum(d.get("target_num_replicas") or 0 for d in each["deployments"].values()),
                metrics.numbers([replica.id for replica in replicas], prefix),
                replicas,
                _arguments(each).get("checkpoint"),
            )
        )
    proxies = {each["node_ip"]: each["status"] for each in now.details["proxies"].values()}
    return Status(applications, proxies, seconds or None, list(now.problems))


def _arguments(application: Mapping[str, Any]) -> Mapping[str, Any]:
    return (application.get("deployed_app_config") or {}).get("args") or {}


class Metrics:
    """Replicas' numbers, from the samples of two moments."""

    def __init__(self, now: Iterable[Sample], before: Iterable[Sample], seconds: float) -> None:
        self._now, self._before = _by_replica(now), _by_replica(before)
        self._seconds = seconds

    def numbers(self, replicas: Sequence[str], prefix: str) -> Numbers:
        """The total of these replicas, whose application has this prefix."""
        running = self._sum(RUNNING, replicas)
        return Numbers(
            _whole(self._sum(ONGOING, replicas) if running is None else running),
            _whole(self._sum(WAITING, replicas)),
            self._rate(REQUESTS, replicas, prefix),
            self._rate(TOKENS, replicas, prefix),
            _whole(self._sum(PAGES_USED, replicas)),
            _whole(self._sum(PAGES_TOTAL, replicas)),
            self._percentiles(FIRST_TOKEN, replicas, prefix),
            self._percentiles(LATENCY, replicas, prefix),
        )

    def _sum(self, name: str, replicas: Sequence[str]) -> float | None:
        values = [each.value for id_ in replicas for each in self._now.get((id_, name), ())]
        return sum(values) if values else None

    def _rate(self, name: str, replicas: Sequence[str], prefix: str) -> float | None:
        if not self._seconds:
            return None
        total = known = 0.0
        found = False
        for replica in replicas:
            now = [each for each in self._now.get((replica, name), ()) if _works(each, prefix)]
            found |= bool(now)
            total += sum(each.value for each in now)
            before = self._before.get((replica, name), ())
            known += sum(each.value for each in before if _works(each, prefix))
        return (total - known) / self._seconds if found else None

    def _percentiles(self, name: str, replicas: Sequence[str], prefix: str) -> Percentiles | None:
        """Between the readings, or since the start if nothing was counted between them."""
        total: defaultdict[float, float] = defaultdict(float)
        recent: defaultdict[float, float] = defaultdict(float)
        for replica in replicas:
            for sign, samples in ((1, self._now), (-1, self._before)):
                for each in samples.get((replica, name), ()):
                    if _works(each, prefix):
                        bound = float(each.labels["le"])
                        recent[bound] += sign * each.value
                        total[bound] += max(sign, 0) * each.value
        counts = recent if max(recent.values(), default=0) > 0 else total
        if not max(counts.values(), default=0):
            return None
        return Percentiles(percentile(counts, 0.5), percentile(counts, 0.99))


def percentile(counts: Mapping[float, float], share: float) -> float:
    """From a histogram's cumulative counts by upper bound; linear in a bucket, as in Prometheus."""
    bounds = sorted(counts)
    wanted = share * counts[bounds[-1]]
    lower = below = 0.0
    for bound in bounds:
        count = counts[bound]
        if count >= wanted and count > below:
            if bound == float("inf"):
                return lower
            return lower + (bound - lower) * (wanted - below) / (count - below)
        lower, below = bound, count
    return lower


def _by_replica(samples: Iterable[Sample]) -> dict[tuple[str, str], list[Sample]]:
    found: defaultdict[tuple[str, str], list[Sample]] = defaultdict(list)
    for each in samples:
        found[each.labels.get("replica", ""), each.name].append(each)
    return dict(found)


def _works(sample: Sample, prefix: str) -> bool:
    """Whether it is of a route that runs the model, or of all the model's work."""
    route = sample.labels.get("route")
    return route is None or (route.removeprefix(prefix.rstrip("/")) or "/") in WORK_ROUTES


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)

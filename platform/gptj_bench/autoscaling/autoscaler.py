"""Ray Serve's own autoscaler on a simulated clock: ongoing work in, number of replicas out.

It calls the same classes and functions as Ray's controller and proxies and reimplements none of the
policy. They are private, so this file only works with the Ray version that pyproject.toml pins.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray.serve import autoscaling_policy
from ray.serve._private import autoscaling_state
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import (
    RUNNING_REQUESTS_KEY,
    DeploymentHandleSource,
    DeploymentID,
    HandleMetricReport,
    ReplicaID,
)
from ray.serve._private.config import DeploymentConfig, ReplicaConfig
from ray.serve._private.constants import RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve._private.metrics_utils import InMemoryMetricsStore
from ray.serve.config import AutoscalingConfig

QUEUED = "queued"


@dataclass
class Clock:
    """Replaces `time` in Ray's modules during a simulation."""

    now: float = 0.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


@contextmanager
def simulated_time(clock: Clock) -> Iterator[None]:
    """Make Ray's autoscaler read `clock` during the block."""
    modules: list[Any] = [autoscaling_state, autoscaling_policy]
    real = [module.time for module in modules]
    for module in modules:
        module.time = clock
    try:
        yield
    finally:
        for module, time in zip(modules, real, strict=True):
            module.time = time


class Autoscaler:
    """One deployment's autoscaler; it scales on the reports of a single proxy."""

    def __init__(self, settings: Mapping[str, Any], clock: Clock) -> None:
        config = AutoscalingConfig(**settings)
        self._clock = clock
        self._deployment = DeploymentID(name="generation", app_name="generation")
        self._look_back = config.look_back_period_s
        self._record_every = min(
            config.look_back_period_s * RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR,
            config.metrics_interval_s,
        )
        self._push_every = config.metrics_interval_s
        self._next_record = self._record_every
        self._next_push = self._push_every
        self._points = InMemoryMetricsStore()
        self._state = DeploymentAutoscalingState(self._deployment)
        info = DeploymentInfo(
            deployment_config=DeploymentConfig(autoscaling_config=config),
            replica_config=ReplicaConfig.create(_deployed),
            start_time_ms=0,
            deployer_job_id="simulation",
        )
        initial = config.min_replicas if config.initial_replicas is None else 0
        self.target = self._state.register(info, initial)  # desired number of replicas

    def observe(self, running: Mapping[int, float], queued: float) -> None:
        """Record the proxy's requests and, when due, report them.

        Args:
            running: ongoing requests, or work in their place, by replica number, for replicas that
                accept requests.
            queued: of requests not assigned to a replica.
        """
        now = self._clock.now
        if now >= self._next_record:
            self._next_record += self._record_every
            points: dict[Hashable, float] = {QUEUED: queued}
            points.update({replica: float(load) for replica, load in running.items()})
            self._points.add_metrics_point(points, now)
        if now >= self._next_push:
            self._next_push += self._push_every
            self._points.prune_keys_and_compact_data(now - self._look_back)
            self._state.record_request_metrics_for_handle(self._report(running))

    def decide(self, running: Mapping[int, float]) -> int:
        """The new desired number of replicas, by Ray's policy."""
        self._state.update_running_replica_ids([self._id(number) for number in running])
        self.target = self._state.get_decision_num_replicas(self.target)
        return self.target

    def _report(self, running: Mapping[int, float]) -> HandleMetricReport:
        series = {number: self._points.data.get(number, []) for number in running}
        return HandleMetricReport(
            deployment_id=self._deployment,
            handle_id="proxy",
            actor_id="proxy",
            handle_source=DeploymentHandleSource.PROXY,
            queued_requests=list(self._points.data.get(QUEUED, [])),
            metrics={
                RUNNING_REQUESTS_KEY: {
                    self._id(number).to_full_id_str(): list(points)
                    for number, points in series.items()
                    if points
                }
            },
            timestamp=self._clock.now,
        )

    def _id(self, number: int) -> ReplicaID:
        return ReplicaID(str(number), self._deployment)


def _deployed() -> None:
    """Stands in for the deployment's class, which the autoscaler never calls."""

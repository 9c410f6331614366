"""Two replicas behind Serve's proxy: requests go where their beginning, or adapter, is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_cluster import serving

from gptj_bench.local_service import configuration, save_model
from gptj_local.processes import HOST

pytestmark = pytest.mark.slow

ADAPTERS = 4
PREFIXES, REQUESTS = 24, 3  # so many that both replicas get some
WORDS = "The tower, a river, and nobody reads the book. " * 6
Sample = dict[tuple[str, str], float]  # by replica, and adapter if it has one


@dataclass(frozen=True)
class Service:
    address: str
    metrics: str

    def ask(self, prompt: str, model: str | None = None) -> int:
        """The prompt's tokens."""
        body = {"model": model, "prompt": prompt, "max_tokens": 1}
        reply = httpx.post(f"{self.address}/v1/completions", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        tokens: int = reply.json()["usage"]["prompt_tokens"]
        return tokens

    def read(self, name: str) -> Sample:
        found: Sample = {}
        for family in text_string_to_metric_families(httpx.get(self.metrics, timeout=30).text):
            for each in family.samples:
                if each.name == f"ray_gptj_{name}_total":
                    found[each.labels["replica"], each.labels.get("adapter", "")] = each.value
        return found

    def wait(self, name: str, condition: Callable[[Sample], bool]) -> Sample:
        """The metric, as soon as the condition holds: Ray reports every second."""
        deadline = time.monotonic() + 60
        while not condition(found := self.read(name)):
            assert time.monotonic() < deadline, found
            time.sleep(0.3)
        return found


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("routing")
    save_model(folder, ADAPTERS)
    config = configuration(folder, replicas=2, adapters=ADAPTERS, one_per_node=False)
    (application,) = config["applications"]
    application["args"]["cache_tokens"] = 16384
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        with serving(config, folder) as (address, node):
            service = Service(address, f"http://{HOST}:{node.metrics_port}/metrics")

            # Serve answers as soon as one replica runs, and then has only that to choose.
            def both(found: Sample) -> bool:
                service.ask("x")
                return sum(value > 0 for value in found.values()) == 2

            service.wait("engine_prefix_tokens_asked", both)
            yield service


def test_a_shared_prefix_is_computed_once(service: Service) -> None:
    """By the replica that the first request chose, whichever it was; and both were chosen."""
    asked, hit = (service.read(f"engine_prefix_tokens_{kind}") for kind in ("asked", "hit"))
    base = httpx.get(f"{service.address}/v1/models", timeout=30).json()["data"][0]["id"]
    tokens = 0
    for number in range(PREFIXES * REQUESTS):
        model = base if number // PREFIXES == 1 else None  # which is the same
        tokens += service.ask(f"{number % PREFIXES} {WORDS}{number}", model)
    due = sum(asked.values()) + tokens
    now = service.wait("engine_prefix_tokens_asked", lambda found: sum(found.values()) >= due)
    assert all(now[replica] - asked[replica] >= 2 * tokens / PREFIXES for replica in asked)
    later = tokens * (REQUESTS - 1) / REQUESTS
    least = sum(hit.values()) + 0.9 * later  # a last page that is not full is not cached
    now = service.wait("engine_prefix_tokens_hit", lambda found: sum(found.values()) >= least)
    assert sum(now.values()) <= sum(hit.values()) + later


def test_an_adapters_requests_stay_on_one_replica(service: Service) -> None:
    for number in range(ADAPTERS * REQUESTS):
        service.ask(f"{number}", model=f"adapter-{number % ADAPTERS}")
    now = service.wait("adapter_requests", lambda found: sum(found.values()) == ADAPTERS * REQUESTS)
    used = sorted(adapter for (_, adapter), value in now.items() if value)
    assert used == [f"adapter-{number}" for number in range(ADAPTERS)], now

"""Two replicas, many prompts that begin alike: the prefix cache's hits with each router."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from serve_cluster import SERVE_CONFIG, save_all, serving
from serving_models import Models

from gptj_local.processes import HOST

pytest_plugins = ["serving_fixtures"]
pytestmark = pytest.mark.slow

PREFIXES, REQUESTS = 10, 4
WORDS = "The tower stands in Paris, and the river runs past it. " * 8


def prefix_tokens(address: str, kind: str) -> dict[str, float]:
    """The engines' numbers by application."""
    found: dict[str, float] = {}
    name = f"ray_gptj_engine_prefix_tokens_{kind}_total"
    for family in text_string_to_metric_families(httpx.get(address, timeout=30).text):
        for sample in family.samples:
            if sample.name == name:
                application = sample.labels["application"]
                found[application] = found.get(application, 0) + sample.value
    return found


def test_prompts_that_begin_alike_reach_the_replica_that_knows_them(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One replica computes each prefix once: all later requests find it. By default half miss."""
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    monkeypatch.setenv("GPTJ_PREFIX_SESSIONS", "1")
    config = yaml.safe_load(SERVE_CONFIG.read_text())
    del config["applications"][1:]
    save_all(config, models, str(tmp_path / "models"))
    (default,) = config["applications"]
    default |= {"name": "default", "route_prefix": "/default"}
    default["args"]["cache_tokens"] = 16384
    deployment = default["deployments"][0]
    deployment["autoscaling_config"] |= {"min_replicas": 2, "max_replicas": 2}
    deployment["ray_actor_options"] = {"num_cpus": 0.3}
    by_prefix = copy.deepcopy(default) | {"name": "prefix", "route_prefix": "/prefix"}
    by_prefix["deployments"][0]["request_router_config"] = {
        "request_router_class": "deployments.prefix_router.PrefixRouter"
    }
    config["applications"].append(by_prefix)
    with serving(config, tmp_path) as (address, node):
        asked = 0.0
        for number in range(PREFIXES * REQUESTS):
            body = {"prompt": f"{number % PREFIXES} {WORDS}{number}", "max_tokens": 1}
            for application in ("default", "prefix"):
                url = f"{address}/{application}/v1/completions"
                reply = httpx.post(url, json=body, timeout=60)
                assert reply.status_code == 200, reply.text
            asked += reply.json()["usage"]["prompt_tokens"]
        metrics = f"http://{HOST}:{node.metrics_port}/metrics"
        deadline = time.monotonic() + 60
        while prefix_tokens(metrics, "asked").get("prefix", 0) < asked:
            assert time.monotonic() < deadline, prefix_tokens(metrics, "asked")
            time.sleep(0.5)
        hits = {app: hit / asked for app, hit in prefix_tokens(metrics, "hit").items()}
    print(hits)
    best = (REQUESTS - 1) / REQUESTS
    assert 0.9 * best < hits["prefix"] <= best
    assert hits["default"] < hits["prefix"] - 0.1

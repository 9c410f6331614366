"""What a running service tells of itself, against what its clients see.

Its metrics, as Prometheus, the dashboards and `gptj status` read them; its traces and logs.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import k8s_metrics
import pytest
import torch
import yaml
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from otlp_collector import Collector, collecting
from prometheus_client.parser import text_string_to_metric_families
from prometheus_server import prometheus
from serve_cluster import SERVE_CONFIG, serving
from serving_models import SENTENCES

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj_cli.status import TARGETS_PATH
from gptj_local.processes import HOST
from gptj_local.ray import LocalRay

pytestmark = pytest.mark.slow
CANARY = "xyzzy canary phrase"
PROMPT_WORDS = 10
NEW_TOKENS = 40


@dataclass(frozen=True)
class Service:
    address: str
    metrics: str
    sessions: Path
    node: LocalRay
    collector: Collector

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """All of ours, by name and those of their labels that are ours too."""
        text = httpx.get(self.metrics, timeout=30).text
        values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_gptj"):
                    ours = {k: v for k, v in sample.labels.items() if k in OURS}
                    key = (sample.name, tuple(sorted(ours.items())))
                    values[key] = values.get(key, 0) + sample.value
        return values

    def wait(self, condition: Callable[[dict], bool]) -> dict:
        """The samples, as soon as the condition holds: Ray reports every few seconds."""
        deadline = time.monotonic() + 60
        while not condition(samples := self.samples()):
            assert time.monotonic() < deadline, samples
            time.sleep(0.5)
        return samples


OURS = ("route", "status", "le")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("metrics")
    tokenizer = GPTJTokenizer.train(SENTENCES, vocab_size=300)
    torch.manual_seed(0)
    # So large that the engine's work, and not the proxy's or the client's, is what takes time.
    shape = {
        "vocab_size": len(tokenizer),
        "n_positions": 512,
        "n_embd": 512,
        "n_layer": 8,
        "n_head": 8,
    }
    model = GPTJForCausalLM(GPTJConfig(**shape, rotary_dim=16))
    with torch.no_grad():  # whole characters only: text that is not yet certain is not sent
        for token in range(len(tokenizer)):
            if not tokenizer.decode([token]).isascii():
                model.lm_head.bias[token] = -100
    model.save_pretrained(str(folder / "model"), tokenizer=tokenizer)
    config = yaml.safe_load(SERVE_CONFIG.read_text())
    config["applications"] = config["applications"][:1]
    config["applications"][0]["args"] = {
        "checkpoint": str(folder / "model"),
        "dtype": "float32",
        "cache_tokens": 4096,
    }
    config["logging_config"]["encoding"] = "JSON"
    with pytest.MonkeyPatch.context() as patch, collecting() as collector:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        exporter = "deployments.tracing:exporter"
        patch.setenv("RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH", exporter)
        patch.setenv("RAY_SERVE_TRACING_SAMPLING_RATIO", "1")
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
        with serving(config, folder) as (address, node):
            metrics = f"http://{HOST}:{node.metrics_port}/metrics"
            yield Service(address, metrics, folder, node, collector)


@dataclass(frozen=True)
class Times:
    first: float
    end: float
    tokens: int


def ask(client: httpx.Client, number: int) -> Times:
    body = {
        "prompt": f"{number} {CANARY}" + " abcdefghijklmnopqrstuvwxyz" * PROMPT_WORDS,
        "max_tokens": NEW_TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    first, tokens = 0.0, 0
    with client.stream("POST", "/v1/completions", json=body) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {") and not first:
                first = time.perf_counter() - start
            if f'"completion_tokens":{NEW_TOKENS}' in line:
                tokens = NEW_TOKENS
    return Times(first, time.perf_counter() - start, tokens)


def percentile(samples: dict, name: str, share: float, **labels: str) -> float:
    """As Prometheus's histogram_quantile: linear within a bucket."""
    buckets = []
    for (sample, tags), value in samples.items():
        given = dict(tags)
        bound = given.pop("le", None)
        if sample == f"{name}_bucket" and given == labels and bound is not None:
            buckets.append((math.inf if bound == "+Inf" else float(bound), value))
    buckets.sort()
    wanted = share * buckets[-1][1]
    lower, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted:
            return lower + (bound - lower) * (wanted - below) / (count - below)
        lower, below = bound, count
    raise AssertionError("no bucket has it")


@pytest.mark.parametrize(
    "requests", [12, pytest.param(50, marks=[pytest.mark.nightly, pytest.mark.alone])]
)
def test_metrics_agree_with_the_clients_measurements(service: Service, requests: int) -> None:
    """Their sums, which a busy machine changes little.

    Each night, with nothing beside it, percentiles as well: within 10 %, and 10 ms for the proxy
    and the client, which ours do not see.
    """
    before = service.samples()
    # One client for all: to make one takes longer than a request's first token.
    with (
        httpx.Client(base_url=service.address, timeout=60) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        times = list(pool.map(lambda number: ask(client, number), range(requests)))
    assert all(each.tokens == NEW_TOKENS for each in times)
    route = "/v1/completions"
    tokens_out = requests * NEW_TOKENS

    def since(now: dict, name: str, **labels: str) -> float:
        key = (name, tuple(labels.items()))
        return float(now.get(key, 0) - before.get(key, 0))

    samples = service.wait(
        lambda now: (
            since(now, "ray_gptj_request_seconds_count", route=route) == requests
            and since(now, "ray_gptj_engine_tokens_out_total") >= tokens_out
        )
    )
    assert since(samples, "ray_gptj_requests_total", route=route, status="200") == requests
    for name, values, labels in (
        ("ray_gptj_request_seconds", [each.end for each in times], {"route": route}),
        ("ray_gptj_time_to_first_token_seconds", [each.first for each in times], {}),
        (
            "ray_gptj_time_per_output_token_seconds",
            [(each.end - each.first) / (each.tokens - 1) for each in times],
            {},
        ),
    ):
        assert 0.3 < since(samples, f"{name}_sum", **labels) / sum(values) < 3, name
        # The 99th of 50 lies between the two slowest.
        slowest = sorted(values)
        for share, least, most in (
            (0.5, statistics.median(values), statistics.median(values)),
            (0.99, slowest[-2], slowest[-1]),
        ):
            if requests >= 50:
                ours = percentile(samples, name, share, **labels)
                assert 0.9 * least - 0.01 < ours < 1.1 * most + 0.01, (name, share)
    assert since(samples, "ray_gptj_engine_tokens_out_total") == tokens_out
    assert since(samples, "ray_gptj_engine_tokens_in_total") > requests * PROMPT_WORDS
    assert samples["ray_gptj_engine_running", ()] == 0
    assert samples["ray_gptj_engine_pages_used", ()] == 0
    assert samples["ray_gptj_engine_pages_total", ()] == 4096 / 16
    assert since(samples, "ray_gptj_queue_seconds_count") == requests


def test_a_repeated_prompt_counts_as_cached(service: Service) -> None:
    before = service.samples().get(("ray_gptj_engine_prefix_tokens_hit_total", ()), 0)
    body = {"prompt": "The same beginning of both. " * 3, "max_tokens": 1}
    for _ in range(2):
        httpx.post(f"{service.address}/v1/completions", json=body, timeout=30)
    service.wait(
        lambda now: now.get(("ray_gptj_engine_prefix_tokens_hit_total", ()), 0) >= before + 16
    )


def test_every_reply_has_a_request_id_or_echoes_the_clients(service: Service) -> None:
    url = f"{service.address}/v1/completions"
    body = {"prompt": CANARY, "max_tokens": 2}
    for status, content in (
        (200, body),
        (400, {**body, "n": 2, "best_of": 1}),
        (422, {"promt": 1}),
    ):
        reply = httpx.post(url, json=content, headers={"X-Request-Id": "my-id.1"}, timeout=30)
        assert (reply.status_code, reply.headers["x-request-id"]) == (status, "my-id.1")
    assert httpx.get(f"{service.address}/nothing").headers["x-request-id"]
    reply = httpx.post(url, json=body, timeout=30)
    assert reply.json()["id"] == f"cmpl-{reply.headers['x-request-id']}"
    strange = httpx.post(url, json=body, headers={"X-Request-Id": "id," * 100}, timeout=30)
    assert re.fullmatch("cmpl-[0-9a-f]{32}", strange.json()["id"])
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=30) as streamed:
        lines = list(streamed.iter_lines())
    assert f'"id":"cmpl-{streamed.headers["x-request-id"]}"' in lines[0]


def test_errors_are_counted_by_route_and_status(service: Service) -> None:
    httpx.post(f"{service.address}/v1/completions", json={"prompt": 1.5})
    httpx.get(f"{service.address}/v1/models/another")
    for path in ("/one", "/two"):
        httpx.get(service.address + path)
    name = "ray_gptj_requests_total"

    def counted(samples: dict) -> bool:
        return (
            samples.get((name, (("route", "/v1/completions"), ("status", "422"))), 0) >= 1
            and samples.get((name, (("route", "/v1/models/{model_id}"), ("status", "404")))) == 1
            # Made-up paths share one label.
            and samples.get((name, (("route", "unknown"), ("status", "404"))), 0) >= 2
        )

    service.wait(counted)


def test_a_disconnected_client_is_counted_and_its_pages_are_freed(service: Service) -> None:
    body = {"prompt": CANARY, "max_tokens": 200, "ignore_eos": True, "stream": True}
    for _ in range(3):
        with httpx.stream("POST", f"{service.address}/v1/completions", json=body) as reply:
            next(reply.iter_lines())
    service.wait(
        lambda now: (
            now.get(("ray_gptj_engine_cancellations_total", ()), 0) == 3
            and now["ray_gptj_engine_pages_used", ()] == 0
        )
    )


def test_a_trace_goes_from_the_client_through_the_proxy_to_the_engine(service: Service) -> None:
    trace, other = "4bf92f3577b34da6a3ce929d0e0e4736", "4bf92f3577b34da6a3ce929d0e0e4737"
    parent = "00f067aa0ba902b7"
    body = {"prompt": CANARY, "max_tokens": 3, "ignore_eos": True}
    url = f"{service.address}/v1/completions"
    for given, sampled in ((other, 0), (trace, 1)):
        headers = {"traceparent": f"00-{given}-{parent}-0{sampled}"}
        httpx.post(url, json=body, headers=headers, timeout=30)

    def found() -> list[Span]:
        return [each for each in service.collector.spans if each.trace_id.hex() == trace]

    model = httpx.get(f"{service.address}/v1/models", timeout=30).json()["data"][0]["id"]
    names = {"POST", f"text_completion {model}", "queue", "prefill", "decode"}
    spans: dict[str, Span] = {}
    deadline = time.monotonic() + 60
    while True:
        spans = {each.name: each for each in found()}
        there = {each.span_id for each in spans.values()} | {bytes.fromhex(parent)}
        # Processes send what has ended every five seconds: parents come after their children.
        if names <= spans.keys() and {each.parent_span_id for each in spans.values()} <= there:
            break
        assert time.monotonic() < deadline, spans.keys()
        time.sleep(0.2)
    assert other not in {each.trace_id.hex() for each in service.collector.spans}
    by_id = {each.span_id: each for each in spans.values()}
    path, each = [], spans["decode"]
    while each.parent_span_id in by_id:
        path.append(each.name)
        each = by_id[each.parent_span_id]
    assert path[:2] == ["decode", f"text_completion {model}"]  # Serve's own follow
    assert (each.name, each.parent_span_id.hex()) == ("POST", parent)
    assert len([each for each in found() if each.name == "POST"]) == 1
    assert service.collector.services == {"gptj"}


def test_each_request_has_one_json_log_line_with_its_id(
    service: Service,
) -> None:
    url = f"{service.address}/v1/completions"
    body = {"prompt": CANARY, "max_tokens": 3, "ignore_eos": True}
    replica = httpx.post(url, json=body, headers={"X-Request-Id": "line.1"}, timeout=30)
    headers = {"X-Request-Id": "line.2", "X-Request-Timeout-Seconds": "0.001"}
    proxy = httpx.post(url, json=body, headers=headers, timeout=30)
    assert (replica.status_code, proxy.status_code) == (200, 408)
    logs = service.node.logs / "serve"
    (line,) = lines_with(logs, "replica_*.log", '"request_id": "line.1"')
    one = json.loads(line)
    assert one["status"] == 200 and one["route"] == "/v1/completions"
    assert one["completion_tokens"] == 3 and one["application"] == "generation"
    assert one["seconds"] > one["first_token_seconds"] > 0
    # `serve run` does not pass the setting on to the proxies.
    assert lines_with(logs, "proxy_*.log", "line.2", "POST /v1/completions 408")


def lines_with(folder: Path, files: str, *texts: str) -> list[str]:
    """The lines with all the texts, as soon as there are any: they are written after the answer."""
    deadline = time.monotonic() + 20
    while True:
        lines = [line for path in folder.glob(files) for line in path.read_text().splitlines()]
        found = [line for line in lines if all(text in line for text in texts)]
        if found:
            return found
        assert time.monotonic() < deadline, lines[-20:]
        time.sleep(0.1)


def test_every_panel_of_the_dashboards_has_data_and_the_status_agrees(
    service: Service, tmp_path: Path
) -> None:
    """By a real Prometheus, which is what Grafana asks.

    Data at any time of the test, as a panel shows it, and not at its end: Ray forgets a gauge two
    report intervals after its last value, here 2 seconds, and has a node's memory every 5.
    """
    # Of which there are none here: errors, full proxies, GPUs, preemptions, drafts.
    quiet = (
        *('status=~"5.."', "proxy_refusals", "ray_node_gpus_"),
        *("engine_preemptions_total", "spec_decode"),
    )
    target = service.metrics.removeprefix("http://").removesuffix("/metrics")
    with prometheus(tmp_path, target, pod="local") as address:
        wanted = [*k8s_metrics.panels("serving"), *k8s_metrics.panels("engine")]
        start = time.time()
        deadline = time.monotonic() + 480
        while True:
            with httpx.Client(base_url=service.address, timeout=60) as client:
                ask(client, 0)
                body = {"prompt": CANARY, "max_tokens": 200, "ignore_eos": True, "stream": True}
                with client.stream("POST", "/v1/completions", json=body) as left:
                    next(left.iter_lines())
            empty = [each for each in wanted if not has_data(address, each.text, start)]
            if all(any(name in each.text for name in quiet) for each in empty):
                break
            left_out = [each for each in empty if not any(name in each.text for name in quiet)]
            assert time.monotonic() < deadline, left_out
        targets = {each for group in service.node._get(TARGETS_PATH) for each in group["targets"]}
        assert targets  # and not at Ray's fixed ports, which another cluster here may have taken
        assert not [each for each in targets if each.endswith((":44217", ":44227"))]
        there = status_of(service, tmp_path, "--prometheus", address)
        here = status_of(service, tmp_path)
    for found in (here, there):
        assert found["problems"] == []
        (application,) = found["applications"]
        numbers = application["numbers"]
        assert application["status"] == "RUNNING" and numbers["running"] is not None
        assert numbers["cache_pages_total"] == 4096 / 16
        assert numbers["first_token_seconds"] is not None
        (replica,) = application["replicas"]
        assert replica["state"] == "RUNNING" and replica["numbers"] == numbers


def status_of(service: Service, folder: Path, *words: str) -> dict[str, Any]:
    """What `gptj status` says, in JSON; a process of its own, since Ray reads its token once."""
    command = [sys.executable, "-m", "gptj_cli", "status", "--json", "--seconds=0", *words]
    result = subprocess.run(
        command,
        env={**os.environ, **service.node.environment()},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def has_data(prometheus: str, query: str, start: float) -> bool:
    """Whether a series of the query's answer had a number in a second since `start`."""
    query = query.replace("$__rate_interval", "30s")
    within = {"start": start, "end": time.time(), "step": 1}
    reply = httpx.get(
        f"{prometheus}/api/v1/query_range", params={"query": query, **within}, timeout=30
    )
    found = reply.raise_for_status().json()["data"]["result"]
    return not all(math.isnan(float(value)) for series in found for _, value in series["values"])


def test_prompts_are_never_logged(service: Service) -> None:
    logs = [*service.sessions.rglob("*.log"), *service.node.logs.rglob("*.log")]
    assert any(path.name.startswith("replica_generation") for path in logs)
    for path in logs:
        assert CANARY not in path.read_text(errors="replace"), path

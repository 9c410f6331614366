"""`gptj status`: its numbers from Serve's status and metrics, and their display."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from gptj_cli.app import app, main
from gptj_cli.status import Percentiles, Reading, Status, parsed, status
from gptj_cli.status_table import rendered

# Of pages, probes, and what does not run the model.
OTHERS = [
    *("/playground", "/playground/main.js", "/docs", "/docs/start.js", "/openapi.json", "unknown"),
    *("/health", "/v1/models", "/v1/models/{model_id}", "/tokenize", "/tokenizer_info"),
]


def export(
    replica: str,
    *,
    requests: int,
    tokens: int,
    used: int,
    slow: int = 0,
    prefix: str = "",
    work: str = "/v1/completions",
) -> str:
    """As Ray exports a replica's metrics: half its requests take 0.1 s, the slow ones 2 s."""
    own = f'application="generation",deployment="generation",replica="{replica}"'
    route = f'route="{(prefix + work).rstrip("/") or "/"}"'
    quick = requests - slow
    others = [f'{own},route="{each if each == "unknown" else prefix + each}"' for each in OTHERS]
    return "\n".join(
        [
            "# TYPE ray_gptj_requests_total counter",
            f'ray_gptj_requests_total{{{own},{route},status="200"}} {requests}',
            *(f'ray_gptj_requests_total{{{each},status="200"}} {9 * requests}' for each in others),
            f"ray_gptj_engine_running{{{own}}} 3",
            f"ray_gptj_engine_waiting{{{own}}} 1",
            f"ray_gptj_engine_tokens_out_total{{{own}}} {tokens}",
            f"ray_gptj_engine_pages_used{{{own}}} {used}",
            f"ray_gptj_engine_pages_total{{{own}}} 100",
            f'ray_gptj_request_seconds_bucket{{{own},{route},le="0.1"}} {quick}',
            f'ray_gptj_request_seconds_bucket{{{own},{route},le="2.0"}} {requests}',
            f'ray_gptj_request_seconds_bucket{{{own},{route},le="+Inf"}} {requests}',
            *(
                f'ray_gptj_request_seconds_bucket{{{each},le="{bound}"}} {9 * requests}'
                for each in others
                for bound in ("0.1", "2.0", "+Inf")
            ),
            "something_else 1",
        ]
    )


def details(
    *replicas: str, status: str = "RUNNING", message: str = "", prefix: str = "/"
) -> dict[str, Any]:
    """As the dashboard describes Serve."""
    found = [
        {"replica_id": each, "state": "RUNNING", "node_ip": f"10.0.0.{number}"}
        for number, each in enumerate(replicas, 1)
    ]
    deployment = {"replicas": found, "target_num_replicas": 2}
    application = {
        "route_prefix": prefix,
        "status": status,
        "message": message,
        "deployments": {"generation": deployment},
        "deployed_app_config": {"args": {"checkpoint": "s3://gptj/reviews/model"}},
    }
    proxies = {"node": {"node_ip": "10.0.0.1", "status": "HEALTHY"}}
    return {"applications": {"generation": application}, "proxies": proxies}


def reading(time: float, *exports: str, **described: Any) -> Reading:
    return Reading(time, details("one", "two", **described), parsed("\n".join(exports)))


def shown(found: Status) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(rendered(found))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_an_applications_numbers_are_its_replicas_totals() -> None:
    before = reading(
        0.0,
        export("one", requests=10, tokens=100, used=0),
        export("two", requests=10, tokens=100, used=0),
        export("gone", requests=500, tokens=9000, used=90),  # a replica of the past
    )
    now = reading(
        10.0,
        export("one", requests=60, tokens=1100, used=20, slow=0),
        export("two", requests=60, tokens=600, used=40, slow=20),
    )
    found = status(now, before)
    (application,) = found.applications
    together, (one, two) = application.numbers, [each.numbers for each in application.replicas]
    assert (together.running, together.waiting) == (6, 2)
    assert together.requests_per_second == 10 and together.tokens_per_second == 150
    assert (one.tokens_per_second, two.tokens_per_second) == (100, 50)
    assert together.cache_share == 60 / 200 and two.cache_share == 0.4
    # In the window one answered 50 quickly; two 30 quickly and 20 slowly.
    assert one.request_seconds == pytest.approx(Percentiles(0.05, 0.099))
    assert two.request_seconds is not None and two.request_seconds.p99 > 1.9
    assert together.first_token_seconds is None
    assert found.seconds == 10
    text = shown(found)
    assert re.search(r"^generation / +RUNNING 2/2 +6 +2 +10.0 +150 +30% +- ", text, re.MULTILINE)
    assert "one on 10.0.0.1" in text and "of the last 10 s" in text
    assert re.search(r"^generation .*\n  s3://gptj/reviews/model *$", text, re.MULTILINE)


@pytest.mark.parametrize("prefix", ["/", "/own/classification"])
@pytest.mark.parametrize("work", ["/", "/v1/completions", "/v1/chat/completions"])
def test_only_requests_that_run_the_model_are_counted(prefix: str, work: str) -> None:
    where: dict[str, Any] = {"prefix": prefix.rstrip("/"), "work": work}
    before, now = (
        reading(seconds, export("one", requests=requests, tokens=0, used=0, **where), prefix=prefix)
        for seconds, requests in ((0.0, 10), (10.0, 60))
    )
    one = status(now, before).applications[0].numbers
    assert one.requests_per_second == 5
    assert one.request_seconds == pytest.approx(Percentiles(0.05, 0.099))


def test_one_reading_has_no_rates_and_percentiles_since_the_start() -> None:
    now = reading(5.0, export("one", requests=10, tokens=10, used=5))
    found = status(now, now)
    one = found.applications[0].replicas[0].numbers
    assert one.tokens_per_second is None
    assert one.request_seconds == pytest.approx(Percentiles(0.05, 0.099))
    assert "since the start" in shown(found)


def test_problems_are_shown_and_unknown_numbers_are_not_zero() -> None:
    message = "Traceback:\n  File x\nValueError: no such checkpoint"
    now = Reading(
        1.0,
        details("one", status="DEPLOY_FAILED", message=message),
        [],
        ["the node's metrics at 10.0.0.1:8080: timed out"],
    )
    text = shown(status(now, now))
    assert "DEPLOY_FAILED 1/2" in text and "generation: ValueError: no such checkpoint" in text
    assert "not read: the node's metrics at 10.0.0.1:8080: timed out" in text
    assert " 0 " not in text


@contextmanager
def answering(replies: dict[str, str]) -> Iterator[str]:
    """An HTTP server with these replies by path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = replies.get(self.path.partition("?")[0])
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write((body or "").encode())

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


VERSION = json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": "x"})


def test_json_from_the_nodes_and_from_prometheus_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = export("one", requests=10, tokens=10, used=5)
    found = [
        {"metric": {"__name__": each.name, **each.labels}, "value": [1.0, str(each.value)]}
        for each in parsed(text)
    ]
    replies = {
        "/api/ray/version": VERSION,
        "/api/serve/applications/": json.dumps(details("one")),
        "/metrics": text,
        "/api/v1/query": json.dumps({"data": {"result": found}}),
    }
    with answering(replies) as address:
        targets = [{"labels": {}, "targets": [address.removeprefix("http://"), "127.0.0.1:9"]}]
        replies["/api/prometheus/sd"] = json.dumps(targets)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
        words = ["status", "--json", "--seconds", "0"]
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        nodes = json.loads(result.stdout)
        result = CliRunner().invoke(app, [*words, "--prometheus", address], catch_exceptions=False)
        prometheus = json.loads(result.stdout)
    assert nodes["applications"][0]["numbers"]["cache_pages_used"] == 5
    assert nodes["applications"] == prometheus["applications"]
    assert prometheus["problems"] == []
    assert len(nodes["problems"]) == 1 and "127.0.0.1:9" in nodes["problems"][0]


def test_a_cluster_that_serves_nothing_is_an_error_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = json.dumps({"applications": {}, "proxies": {}})
    with answering({"/api/ray/version": VERSION, "/api/serve/applications/": empty}) as address:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
        with pytest.raises(SystemExit, match=f"{address} serves nothing; remedy: gptj serve"):
            main(["status", "--once"])
    with pytest.raises(SystemExit, match="Failed to connect to Ray"):
        main(["status", "--once"])

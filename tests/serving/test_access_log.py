"""Each request's log line: its content, and what it never contains."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import ray
from ray._common.formatters import JSONFormatter
from serving_client import CLASSIFICATION, COMPLETIONS
from serving_models import KEY
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from deployments.logs import ToServe, follow_serve
from gptj.serving import access_log
from gptj.serving.entry.admission import Admission, Gate
from gptj.serving.entry.failover import Failover
from gptj.serving.entry.request_ids import RequestIds

pytest_plugins = ["serving_fixtures"]
CANARY = "quixotic canary"
LOGGER = "gptj.serving.access_log"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, LOGGER):
        yield caplog


def of(log: pytest.LogCaptureFixture, id_: str) -> dict[str, Any]:
    """The only line of a request, as the JSON formatter of Serve's log prints it."""
    deadline = time.monotonic() + 10
    while not named(log, id_) and time.monotonic() < deadline:
        time.sleep(0.01)  # the line follows the reply's end
    (record,) = named(log, id_)
    fields: dict[str, Any] = json.loads(JSONFormatter().format(record))
    return fields


def named(log: pytest.LogCaptureFixture, id_: str) -> list[logging.LogRecord]:
    return [each for each in log.records if getattr(each, "request_id", None) == id_]


def ask(url: str, id_: str, body: dict[str, Any], key: str = KEY) -> httpx.Response:
    headers = {"X-Request-Id": id_, "Authorization": f"Bearer {key}"}
    return httpx.post(url, json=body, headers=headers, timeout=60)


@pytest.mark.parametrize("stream", [False, True])
def test_a_completions_line_has_its_tokens_times_and_keys_name(
    service: str, log: pytest.LogCaptureFixture, stream: bool
) -> None:
    body = {"prompt": CANARY, "max_tokens": 5, "ignore_eos": True, "stream": stream}
    url = f"{service}/guarded{COMPLETIONS}"
    assert ask(url, f"one-{stream}", body).status_code == 200
    fields = of(log, f"one-{stream}")
    assert (fields["method"], fields["status"]) == ("POST", 200)
    assert fields["route"].endswith(COMPLETIONS)
    assert fields["completion_tokens"] == 5 and fields["prompt_tokens"] > 0
    assert 0 <= fields["queue_seconds"] <= fields["first_token_seconds"] <= fields["seconds"]
    assert fields["key"] == "key-2"
    assert "key key-2" in fields["message"] and "5 tokens" in fields["message"]


def test_refusals_and_other_services_have_their_line_too(
    service: str, log: pytest.LogCaptureFixture
) -> None:
    url = f"{service}/guarded{COMPLETIONS}"
    ask(url, "wrong-key", {"prompt": CANARY}, key="wrong-" + CANARY.replace(" ", "-"))
    ask(url, "wrong-shape", {"promt": CANARY})
    ask(service + CLASSIFICATION, "labels", {"inputs": CANARY})
    httpx.get(f"{service}/health", headers={"X-Request-Id": "probe"})
    assert of(log, "wrong-key")["status"] == 401 and "key" not in of(log, "wrong-key")
    assert of(log, "wrong-shape")["status"] == 422 and of(log, "wrong-shape")["key"] == "key-2"
    assert of(log, "labels")["status"] == 200
    assert not named(log, "probe")
    everything = "".join(JSONFormatter().format(each) for each in log.records)
    assert "canary" not in everything and KEY not in everything


def test_the_proxy_logs_its_own_replies_and_counts_refusals_by_the_second(
    log: pytest.LogCaptureFixture,
) -> None:
    now, reported = 0.0, list[int]()

    async def replica(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/gone":
            return  # as if the replica had died
        status = 404 if scope["path"] == "/nothing" else 200
        media = "text/plain" if status == 404 else "application/json"
        body = '{"/fine": "an application"}'  # as from /-/routes
        await PlainTextResponse(body, status, media_type=media)(scope, receive, send)

    async def run() -> None:
        nonlocal now
        gate = Gate(clock=lambda: now, on_refusals=reported.append)
        app = RequestIds(Admission(Failover(replica), gate))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            for path in ("fine", "nothing"):
                await client.get(f"http://x/{path}", headers={"X-Request-Id": path})
            gate._max_in_flight = 0
            for second in (1.0, 1.1, 1.2, 2.5, 2.6):
                now = second
                assert (await client.get("http://x/full")).status_code == 429
            gate._max_in_flight, now = 1, 4.0
            await client.get("http://x/fine", headers={"X-Request-Id": "fine"})

    asyncio.run(run())
    assert of(log, "nothing")["status"] == 404  # Serve's own; a replica logs its answers itself
    assert not named(log, "fine")
    refused = [each.getMessage() for each in log.records if "refused" in each.getMessage()]
    assert refused == [
        "the service is full: 1 requests refused",
        "the service is full: 3 requests refused",
        "the service is full: 1 requests refused",
    ]
    assert reported == [1, 3, 1]


@pytest.mark.parametrize(
    "path", ["/x\nPOST /v1/completions 200", "/x\u2028y", "/x\x1b[2J", "/x\x85y"]
)
def test_client_input_cannot_break_log_lines(log: pytest.LogCaptureFixture, path: str) -> None:
    """Paths reach the application decoded, and ids may contain any non-ASCII byte."""
    access_log.write(access_log.Entry(), "GET", path, 404, 0.1, "id\x85x")
    (record,) = log.records
    assert record.getMessage().isprintable()
    assert vars(record)["route"].isprintable() and vars(record)["request_id"].isprintable()


def test_our_loggers_write_to_whatever_handlers_serve_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve, ours = logging.getLogger("ray.serve"), logging.getLogger("gptj")
    before = ours.handlers, ours.propagate, ours.level, serve.handlers, serve.level
    seen: list[str] = []

    class Seen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(f"{record.levelname} {record.getMessage()}")

    follow_serve()
    assert (ours.handlers, ours.propagate) == before[:2], "outside a cluster nothing changes"
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    try:
        follow_serve()
        follow_serve()
        serve.handlers = [Seen()]
        serve.setLevel(logging.INFO)
        logging.getLogger("gptj.engine.x").info("one")
        serve.setLevel(logging.WARNING)
        logging.getLogger("gptj.engine.x").info("two")
        logging.getLogger("deployments.x").warning("three")
        assert seen == ["INFO one", "WARNING three"]
        assert [type(each) for each in ours.handlers] == [ToServe]
    finally:
        ours.handlers, ours.propagate, level, serve.handlers, serve_level = before
        ours.setLevel(level)
        serve.setLevel(serve_level)
        other = logging.getLogger("deployments")
        other.handlers, other.propagate = [], True
        other.setLevel(logging.NOTSET)

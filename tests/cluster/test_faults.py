"""Parts of a running service are killed, and no request is lost by it: see gptj_bench.faults."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from serving_client import assert_error

from gptj.serving.keys.keyring import digest
from gptj_bench import faults
from gptj_bench.faults import ANSWERED, measure
from gptj_bench.local_service import LocalService, local_service

FAULTS = ["replica", "controller", "upgrade", "bad-upgrade"]
pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    folder = tmp_path_factory.mktemp("faults")
    keys = folder / "keys.json"
    entries = [
        {"name": "open", "sha256": digest(b"open")},
        {"name": "limited", "sha256": digest(b"limited"), "requests_per_minute": 40},
    ]
    keys.write_text(json.dumps({"keys": entries}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTJ_KEYS_FILE", str(keys))
        with local_service(folder, key="open") as service:
            yield service


def test_a_limit_holds_across_replicas(service: LocalService) -> None:
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: ask_limited(service), range(60)))
    assert sum(reply.status_code == 200 for reply in replies) == 40
    refused = [reply for reply in replies if reply.status_code != 200]
    assert_error(refused[0], 429, "40 requests a minute")


def test_requests_are_answered_while_the_ledger_is_down(service: LocalService) -> None:
    (ledger,) = service.processes("Counts").values()
    os.kill(ledger, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while set(service.processes("Counts").values()) <= {ledger}:  # Ray may not know yet
        assert ask_limited(service).status_code in (200, 429)
        assert time.monotonic() < deadline


def ask_limited(service: LocalService) -> httpx.Response:
    body = {"prompt": "x", "max_tokens": 1}
    headers = {"Authorization": "Bearer limited"}
    return httpx.post(f"{service.url}/v1/completions", json=body, headers=headers, timeout=60)


@pytest.mark.parametrize(
    "kinds",
    [FAULTS, pytest.param(["upgrade", "rollback"], marks=pytest.mark.nightly)],
    ids=",".join,
)
def test_no_request_is_lost_when_a_replica_or_the_controller_dies(
    service: LocalService, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor when others are deployed. Streams go on elsewhere; all texts are as undisturbed ones."""
    monkeypatch.setattr(faults, "QUIET_SECONDS", 1.5)

    async def results() -> None:
        async for result in measure(service, kinds, clients=6):
            assert result.outcomes.keys() == {ANSWERED}, result
            assert result.requests > 6 and math.isfinite(result.replaced_seconds), result

    asyncio.run(results())


def test_serves_own_replies_have_our_body(service: LocalService) -> None:
    headers = {"Authorization": "Bearer open", "X-Request-Timeout-Seconds": "0.001"}
    url = f"{service.url}/v1/completions"
    reply = httpx.post(url, json={"prompt": "x"}, headers=headers, timeout=30)
    assert_error(reply, 408, "0.001 seconds")
    assert reply.headers["x-request-id"]


def test_a_hung_replica_is_killed_and_its_requests_are_answered(service: LocalService) -> None:
    victim = next(iter(service.processes("ServeReplica").values()))
    os.kill(victim, signal.SIGSTOP)
    headers = {"Authorization": "Bearer open"}
    body = {"prompt": "x", "max_tokens": 2}

    def ask(_: int) -> int:
        url = f"{service.url}/v1/completions"
        return httpx.post(url, json=body, headers=headers, timeout=120).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(16))) == {200}
    deadline = time.monotonic() + 60
    while Path(f"/proc/{victim}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)

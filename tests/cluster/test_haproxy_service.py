"""The generation service with HAProxy in place of Serve's proxies."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator

import httpx
import pytest
from serving_client import assert_error

from deployments import drain
from gptj_bench import faults
from gptj_bench.faults import ANSWERED, measure
from gptj_bench.local_service import LocalService, local_service
from gptj_local.ray import HAPROXY_SWITCH

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HAPROXY_SWITCH, "1")
        with local_service(tmp_path_factory.mktemp("haproxy")) as service:
            yield service


def test_serves_own_replies_have_our_body(service: LocalService) -> None:
    assert service.haproxies()
    assert service.processes("HAProxyManager") and "HAProxyManager" in drain.SERVES
    url = f"{service.url}/v1/completions"
    headers = {"X-Request-Timeout-Seconds": "0.001"}
    reply = httpx.post(url, json={"prompt": "x"}, headers=headers, timeout=30)
    assert_error(reply, 408, "0.001 seconds")
    assert reply.headers["x-request-id"]
    assert_error(httpx.post(f"{service.url}/v1/nothing", json={}), 404, "/docs")


def test_only_streams_end_when_a_replica_dies_and_haproxy_is_replaced(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "QUIET_SECONDS", 1.5)

    async def results() -> None:
        async for result in measure(service, ["replica", "haproxy"], clients=6):
            assert result.outcomes[ANSWERED] > 6, result
            assert math.isfinite(result.replaced_seconds), result
            if result.fault == "replica":
                assert result.outcomes.keys() <= {ANSWERED, "stream cut off"}, result

    asyncio.run(results())
    assert service.answers()
    deadline = time.monotonic() + 60
    while len(service.haproxies()) > 1:  # those that reloads have replaced end
        assert time.monotonic() < deadline
        time.sleep(0.5)

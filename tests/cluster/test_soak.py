"""A minute of gptj_bench.soak, each night."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gptj_bench.local_service import local_service
from gptj_bench.soak import report, soak


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.alone
def test_nothing_grows_under_load(tmp_path: Path) -> None:
    with local_service(tmp_path, replicas=1) as service:
        found = asyncio.run(soak(service, 60, clients=4))
    assert found.faults() == [], report(found)
    assert found.result.requests > 20 and found.left > 5

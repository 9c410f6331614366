"""gptj_bench.http_load: what it measures of a stream."""

from __future__ import annotations

import asyncio
import json

import pytest
from http_server import listening
from starlette.types import Receive, Scope, Send

from gptj_bench.http_load import Load

pytestmark = pytest.mark.slow

TOKENS = 6
PAUSE_SECONDS = 0.5


async def pausing(scope: Scope, receive: Receive, send: Send) -> None:
    """A stream that stops once, as while a long prompt is computed."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for number in range(TOKENS):
        if number == 3:
            await asyncio.sleep(PAUSE_SECONDS)
        usage = {"completion_tokens": TOKENS} if number == TOKENS - 1 else None
        event = json.dumps({"choices": [{"text": "x"}], "usage": usage})
        body = f"data: {event}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body"})


def test_one_long_gap_shows_in_the_percentiles_but_hardly_in_the_mean() -> None:
    with listening(pausing) as service:
        row = Load(service, "model", 1, 4, TOKENS, 100).run(1)
    assert row["requests"] == 1, row
    assert row["gap_p99_ms"] >= 1000 * PAUSE_SECONDS * 0.9
    assert row["gap_p50_ms"] < row["tpot_p50_ms"] < row["gap_p99_ms"]

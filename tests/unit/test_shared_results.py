"""Several requests wait for one result, and may leave."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import gptj.serving
from gptj.serving.results import shared_result


def test_an_error_after_all_have_left_is_not_reported_as_lost() -> None:
    lost: list[dict[str, Any]] = []

    async def check() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: lost.append(context))
        future: Future[int] = Future()
        future.set_running_or_notify_cancel()
        gone = [asyncio.ensure_future(shared_result(future)) for _ in range(2)]
        late = asyncio.wait_for(shared_result(future), 0.01)
        with pytest.raises(TimeoutError):
            await late
        for each in gone:
            each.cancel()
        await asyncio.wait(gone)
        assert all(each.cancelled() for each in gone) and not future.done()
        future.set_exception(RuntimeError("refused"))
        with pytest.raises(RuntimeError, match="refused"):
            await shared_result(future)
        await asyncio.sleep(0)

    asyncio.run(check())
    gc.collect()
    assert not lost


def test_services_shield_no_other_futures() -> None:
    for path in Path(gptj.serving.__file__).parent.rglob("*.py"):
        assert path.name == "results.py" or "shield(" not in path.read_text(), path

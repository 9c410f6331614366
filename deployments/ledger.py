"""One ledger of keys for a whole cluster: a small actor that all replicas ask.

It lives in Serve's namespace, takes no CPU of its own, and is started again where it dies, with an
empty window of a minute. While it does not answer, each replica counts for itself: a key may then
have its limit once in each.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from functools import cache
from typing import Any

import ray
from ray.exceptions import RayError

from gptj.serving.keys.keyring import FILE_VARIABLE
from gptj.serving.keys.ledger import Counts, Ledger, Limits, LocalLedger, Standing

logger = logging.getLogger(__name__)

NAME, NAMESPACE = "gptj-key-ledger", "serve"
START_SECONDS = 60.0
ANSWER_SECONDS = 1.0
WITHOUT_SECONDS = 5.0  # until it is asked again, after it did not answer


class ClusterLedger:
    """A Ledger whose counts are an actor's, or this replica's while that does not answer."""

    def __init__(self) -> None:
        self._actor: Any = None
        self._local = LocalLedger()
        self._without_until = 0.0
        # The first requests must find it there. On a thread: this one may have an event loop.
        starting = threading.Thread(target=self._start, name="key-ledger", daemon=True)
        starting.start()
        starting.join(START_SECONDS)

    def _start(self) -> None:
        try:
            actor = _actor()
            ray.get(actor.__ray_ready__.remote(), timeout=START_SECONDS)
            self._actor = actor
        except RayError as error:
            logger.warning("the ledger of keys has not started: %s", error)

    async def begin(self, key: str, limits: Limits, request: str) -> Standing:
        standing: Standing | None = await self._ask("begin", key, limits, request)
        return standing or await self._local.begin(key, limits, request)

    async def reserve(self, key: str, limits: Limits, request: str, tokens: int) -> Standing:
        standing: Standing | None = await self._ask("reserve", key, limits, request, tokens)
        return standing or await self._local.reserve(key, limits, request, tokens)

    async def end(self, key: str, request: str, tokens: int) -> None:
        # Of whichever began it; the other knows nothing of it.
        await self._local.end(key, request, tokens)
        await self._ask("end", key, request, tokens)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """What the actor says; None if it does not."""
        if time.monotonic() < self._without_until:
            return None
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(_actor)
            call = getattr(self._actor, method).remote(*arguments)
            return await asyncio.wait_for(call, ANSWER_SECONDS)
        except (RayError, TimeoutError, ValueError) as error:
            self._actor = None
            self._without_until = time.monotonic() + WITHOUT_SECONDS
            logger.warning(
                "the ledger of keys does not answer; this replica counts for itself: %s", error
            )
            return None


def _actor() -> Any:
    """The cluster's, started if it is not there."""
    return (
        ray.remote(Counts)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
        )
        .remote()
    )


@cache
def cluster_ledger() -> Ledger:
    """This process's way to it; where no key can have a limit, there is no actor."""
    return ClusterLedger() if FILE_VARIABLE in os.environ else LocalLedger()

"""One ledger of keys for the whole cluster: a small actor that all replicas call.

It lives in Serve's namespace and reserves no CPU. If it dies, Ray restarts it with an empty window.
While it does not answer, each replica counts for itself: a key has its limits once per replica.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import uuid
from functools import cache
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from gptj.serving.keys.keyring import FILE_VARIABLE
from gptj.serving.keys.ledger import Counts, Ledger, Limits, LocalLedger, Standing

logger = logging.getLogger(__name__)

# An actor outlives its replicas' code: a change of its methods needs another name. While replicas
# are replaced, the old and the new ones count apart.
NAME, NAMESPACE = "gptj-key-ledger-2", "serve"
START_SECONDS = 60.0
ANSWER_SECONDS = 1.0
WITHOUT_SECONDS = 5.0  # until it is called again after it did not answer
RENEW_SECONDS = 5.0  # several within the ledger's LEASE_SECONDS
MAX_PENDING = 10_000  # calls per replica: bounds memory while it hangs


class ClusterLedger:
    """A Ledger kept by an actor, or by this replica while the actor does not answer."""

    def __init__(self) -> None:
        self._actor: Any = None
        self._local = LocalLedger()
        self._holder = uuid.uuid4().hex  # this process
        self._running: set[tuple[str, str]] = set()  # keys and requests
        # Held while the actor is told, so that it hears of a request's end after its renewals.
        self._telling = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._renew, name="key-leases", daemon=True).start()
        self._without_until = 0.0
        self._connecting = self._connect()
        self._connecting.join(START_SECONDS)  # ready for the first requests

    def _connect(self) -> threading.Thread:
        """Find or start the actor on a thread: Ray blocks, and the caller may run an event loop."""
        thread = threading.Thread(target=self._start, name="key-ledger", daemon=True)
        thread.start()
        return thread

    def _start(self) -> None:
        try:
            actor = _actor()
            ray.get(actor.__ray_ready__.remote(), timeout=START_SECONDS)
            self._actor = actor
        except (RayError, ValueError) as error:
            logger.warning("the ledger of keys has not started: %s", error)
        finally:
            if self._actor is None:  # whatever was raised: avoid a thread per request
                self._without_until = time.monotonic() + WITHOUT_SECONDS

    def close(self) -> None:
        self._ended.set()

    async def begin(self, key: str, limits: Limits, request: str) -> Standing:
        standing: Standing | None = await self._ask("begin", key, limits, request, self._holder)
        standing = standing or await self._local.begin(key, limits, request)
        if standing.refused is None:
            with self._telling:
                self._running.add((key, request))
        return standing

    async def reserve(self, key: str, limits: Limits, request: str, tokens: int) -> Standing:
        standing: Standing | None = await self._ask("reserve", key, limits, request, tokens)
        return standing or await self._local.reserve(key, limits, request, tokens)

    async def end(self, key: str, request: str, tokens: int) -> None:
        # Tell both: a begin that was not answered in time may be counted in either. Tell the actor
        # even if it does not answer now: otherwise its running requests would never go down.
        await self._local.end(key, request, tokens)
        with self._telling:
            self._running.discard((key, request))
            self._tell("end", key, request, tokens)

    def _renew(self) -> None:
        """Renew the lease of this process's requests, also if its event loop is busy."""
        while not self._ended.wait(RENEW_SECONDS):
            try:
                with self._telling:
                    self._tell("renew", self._holder, list(self._running))
            except Exception:  # a thread that ends would let live requests stop counting
                logger.exception("cannot renew the requests in the ledger of keys")

    def _tell(self, method: str, *arguments: Any) -> None:
        """Without waiting for an answer."""
        actor = self._actor  # which another thread may set to None
        if actor is None:
            return
        try:
            getattr(actor, method).remote(*arguments)
        except RayError as error:
            logger.warning("cannot tell the ledger of keys (%s): %s", method, error)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """The actor's answer; None on timeout or error."""
        if time.monotonic() < self._without_until:
            return None
        if self._actor is None:
            if not self._connecting.is_alive():
                self._connecting = self._connect()
            return None
        try:
            call = getattr(self._actor, method).remote(*arguments)
            return await asyncio.wait_for(call, ANSWER_SECONDS)
        except (RayError, TimeoutError) as error:
            if isinstance(error, ActorDiedError):
                self._actor = None
            self._without_until = time.monotonic() + WITHOUT_SECONDS
            logger.warning(
                "the ledger of keys does not answer; this replica counts for itself: %r", error
            )
            return None


def _actor() -> Any:
    """The cluster's actor, started if there is none."""
    return (
        ray.remote(Counts)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_pending_calls=MAX_PENDING,
        )
        .remote()
    )


@cache
def cluster_ledger() -> Ledger:
    """This process's ledger. Only a keys file sets limits, which need the actor."""
    return ClusterLedger() if FILE_VARIABLE in os.environ else LocalLedger()

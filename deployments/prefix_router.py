"""Routes requests that begin alike, or use the same adapter, to the replica that has computed them.

In a deployment's options:

    request_router_config:
      request_router_class: deployments.prefix_router.PrefixRouter
      request_router_kwargs: { characters_per_request: 256, adapter_requests: 4 }

The layer in Serve's proxy (gptj.serving.entry.prefix_keys) gives each request the keys of its
prompt's beginnings; the router remembers which replicas were sent which. A request goes to the
replica with the longest known beginning, unless that is busier than the least busy one by more than
the beginning is worth: one request for each `characters_per_request` of it, and `adapter_requests`
for the adapter. Others go to the less busy of two replicas: one by the hash of their first key, so
that proxies agree without talking to each other, and a random one. Serve's preference for replicas
on the proxy's own node is not followed: a hop costs less than computing a prompt.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from gptj.serving.entry.prefix_keys import BLOCK_CHARACTERS, model_key

MAX_KEYS = 2**15  # about 6 MB; the blocks of a million tokens


@dataclass(frozen=True)
class Weights:
    """What a replica's knowledge is worth, in requests that it may have more than another."""

    characters_per_request: int = 256
    adapter_requests: int = 4

    def __post_init__(self) -> None:
        for name, least in (("characters_per_request", 1), ("adapter_requests", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be {least} or more, got {value!r}")

    def worth(self, blocks: int, *, adapter: bool) -> float:
        text = blocks * BLOCK_CHARACTERS / self.characters_per_request
        return text + self.adapter_requests * adapter


class PrefixTable:
    """Which replicas were sent which beginnings, by key.

    The least recently used key is forgotten first, and a prompt's last key before its first.
    """

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._holders: OrderedDict[str, tuple[ReplicaID, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def known(self, keys: Sequence[str]) -> dict[ReplicaID, int]:
        """How many of the first keys each replica was sent; without those that know none."""
        found: dict[ReplicaID, int] = {}
        for number, key in enumerate(keys, 1):
            holders = self._holders.get(key)
            if not holders:
                break
            for replica in holders:
                found[replica] = number
        return found

    def add(self, keys: Sequence[str], replica: ReplicaID) -> None:
        for key in reversed(keys):
            holders = self._holders.setdefault(key, ())
            if replica not in holders:
                self._holders[key] = (*holders, replica)
            self._holders.move_to_end(key)
        while len(self._holders) > self._max_keys:
            self._holders.popitem(last=False)

    def forget(self, replicas: set[ReplicaID]) -> None:
        for key, holders in list(self._holders.items()):
            if replicas.isdisjoint(holders):
                continue
            if left := tuple(each for each in holders if each not in replicas):
                self._holders[key] = left
            else:
                del self._holders[key]


class PrefixRouter(RequestRouter):
    """Without FIFOMixin, which would give a replica to another request than it was chosen for."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Serve with request_router_kwargs. TypeError or ValueError for wrong ones."""
        self._weights = Weights(**kwargs)
        self._table = PrefixTable()
        self._base_models: set[str] = set()  # their keys: all replicas have them

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Replicas to try, best first; of two in a list Serve takes the less busy."""
        if pending_request is None:
            return [_two_of(candidate_replicas, "")]
        pending_request.routing_context.should_backoff = True
        adapter, keys = self._keys(pending_request)
        two = _two_of(candidate_replicas, keys[0] if keys else "")
        best = self._best(candidate_replicas, self._table.known(keys), bool(adapter))
        return [two] if best is None else [[best], two]

    def _best(
        self, candidates: Sequence[RunningReplica], known: Mapping[ReplicaID, int], adapter: bool
    ) -> RunningReplica | None:
        """The replica whose knowledge outweighs its load most, if it does."""
        if not known:
            return None
        loads = [self.replica_queue_len_cache.get(each.replica_id) or 0 for each in candidates]
        best, most = None, float(-min(loads))
        for replica, load in zip(candidates, loads, strict=True):
            if (number := known.get(replica.replica_id)) is None:
                continue
            left = self._weights.worth(number - adapter, adapter=adapter) - load
            if left >= most:
                best, most = replica, left
        return best

    def _keys(self, request: PendingRequest) -> tuple[str, list[str]]:
        """The adapter's key, or empty; the keys of ever longer beginnings, the adapter's first."""
        model, *blocks = request.metadata.session_id.split(".")
        adapter = "" if model in self._base_models else model
        return adapter, [*([adapter] if adapter else ()), *(adapter + block for block in blocks)]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Called once a replica has accepted a request."""
        if replica_id in self.curr_replicas:  # it may have died since
            self._table.add(self._keys(pending_request)[1], replica_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        before = set(self.curr_replicas)
        super().update_replicas(replicas)
        if gone := before - self.curr_replicas.keys():
            self._table.forget(gone)
        names = (each.replica_metadata.get("model") for each in replicas)
        self._base_models = {model_key(name) for name in names if name is not None}

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._table.forget({replica_id})

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """It cannot be reached, but may live: do not insist on it."""
        super().on_replica_actor_unavailable(replica_id)
        self._table.forget({replica_id})


def _two_of(replicas: Sequence[RunningReplica], key: str) -> list[RunningReplica]:
    """Two replicas at random, or with a key the first by its hash; Serve takes it if tied."""
    if not key or len(replicas) < 2:
        return random.sample(replicas, min(2, len(replicas)))
    first = max(replicas, key=lambda each: _rank(key, each))
    return [first, random.choice([each for each in replicas if each is not first])]


def _rank(key: str, replica: RunningReplica) -> bytes:
    """Rendezvous hashing: when replicas come or go, few keys move."""
    return blake2b(f"{key} {replica.replica_id.unique_id}".encode(), digest_size=8).digest()

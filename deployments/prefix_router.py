"""Routes requests with a common prefix, or the same adapter, to the replica that has it cached.

The generation deployment uses it (see deployments.generation.build). In a deployment's options:

    request_router_config:
      request_router_class: deployments.prefix_router.PrefixRouter
      request_router_kwargs: { characters_per_request: 256, adapter_requests: 4 }

The layer in Serve's proxy (gptj.serving.entry.prefix_keys) gives each request the hashes of its
prompt's prefixes; the router remembers which ones each replica has been sent. A replica's score is
what it has (1 for each `characters_per_request` of the longest known prefix, `adapter_requests` for
the adapter) less its requests in progress. The highest score wins, unless the least busy replica,
whose load alone counts, scores higher. Other requests go to the less busy of two replicas: one
chosen by the hash of their first key, so that proxies agree without communicating, and a random
one. With N replicas, a prefix of more than 2/N of all requests, or half of them, such as a system
prompt, does not count: all replicas soon have it, and one of them would get all chats. Serve's
preference for replicas on the proxy's own node does not apply: a hop costs less than computing a
prompt.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from gptj.serving.entry.prefix_keys import BLOCK_CHARACTERS, MAX_CHARACTERS, model_key

MAX_KEYS = 2**15  # about 8 MB; the blocks of a million tokens
PRIOR = 16  # requests that a new key is assumed to be absent from, see PrefixTable.common


@dataclass(frozen=True)
class Weights:
    """How many requests more than the least busy replica one with the prefix may have."""

    characters_per_request: int = 256
    adapter_requests: int = 4

    def __post_init__(self) -> None:
        for name, least in (("characters_per_request", 1), ("adapter_requests", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

    def worth(self, blocks: int, *, adapter: bool) -> float:
        text = blocks * BLOCK_CHARACTERS / self.characters_per_request
        return text + self.adapter_requests * adapter


@dataclass(slots=True)
class Entry:
    """What is known of a key."""

    born: int  # the number of requests before its first
    uses: int = 0  # requests with it
    holders: tuple[str, ...] = ()  # replicas' unique ids, which compare faster than ReplicaIDs


class PrefixTable:
    """Which prefixes each replica has been sent, by key.

    The least recently used key is forgotten first, and a prompt's last key before its first.
    """

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._held: Counter[str] = Counter()  # entries by replica
        self._requests = 0

    def __len__(self) -> int:
        return len(self._entries)

    def known(self, keys: Sequence[str]) -> dict[str, int]:
        """How many of the first keys each replica has been sent; replicas sent none are omitted."""
        found: dict[str, int] = {}
        for number, key in enumerate(keys, 1):
            entry = self._entries.get(key)
            if entry is None:
                break
            for replica in entry.holders:
                found[replica] = number
        return found

    def common(self, keys: Sequence[str], share: float) -> int:
        """How many of the first keys are in more than this share of the requests since their first.

        PRIOR more requests without the key are assumed, so that a new key is not common at once.
        """
        for number, key in enumerate(keys):
            entry = self._entries.get(key)
            if entry is None or entry.uses <= share * (self._requests - entry.born + PRIOR):
                return number
        return len(keys)

    def add(self, keys: Sequence[str], replica: str) -> None:
        if not keys:
            return  # not a prompt, such as a probe of /health
        for key in reversed(keys):
            entry = self._entries.setdefault(key, Entry(self._requests))
            entry.uses += 1
            if replica not in entry.holders:
                entry.holders = (*entry.holders, replica)
                self._held[replica] += 1
            self._entries.move_to_end(key)
        self._requests += 1
        while len(self._entries) > self._max_keys:
            _, oldest = self._entries.popitem(last=False)
            self._held.subtract(oldest.holders)

    def forget(self, replicas: set[str]) -> None:
        """Quick for replicas that hold nothing: a lost one may be reported often."""
        if not sum(self._held.pop(each, 0) for each in replicas):
            return
        for key in list(self._entries):
            entry = self._entries[key]
            if replicas.isdisjoint(entry.holders):
                continue
            entry.holders = tuple(each for each in entry.holders if each not in replicas)
            if not entry.holders:
                del self._entries[key]


class PrefixRouter(RequestRouter):
    """Without FIFOMixin, which would assign the chosen replica to the oldest waiting request."""

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
        text = keys[1:] if adapter else keys
        # All replicas should have a prefix this common: one alone would get too many requests.
        common = self._table.common(text, min(0.5, 2 / max(1, len(candidate_replicas))))
        worths = self._worths(candidate_replicas, keys, common, bool(adapter))
        two = _two_of(candidate_replicas, adapter or next(iter(text[common:]), ""))
        if not worths:
            return [two]
        # Serve forgets a load after ten seconds, and then prefers a replica whose load it knows.
        if unknown := [each for each in {*worths, *two} if self._load(each) is None]:
            await self._probe_queue_lens(unknown, 0)
        best = self._best(candidate_replicas, worths)
        return [two] if best is None else [[best], two]

    def _worths(
        self, candidates: Sequence[RunningReplica], keys: Sequence[str], common: int, adapter: bool
    ) -> dict[RunningReplica, float]:
        """What the replicas have that counts."""
        known = self._table.known(keys)
        found = {}
        for replica in candidates:
            number = known.get(replica.replica_id.unique_id, 0)
            blocks = max(0, number - adapter - common)
            if worth := self._weights.worth(blocks, adapter=adapter and number > 0):
                found[replica] = worth
        return found

    def _best(
        self, candidates: Sequence[RunningReplica], worths: Mapping[RunningReplica, float]
    ) -> RunningReplica | None:
        """The replica whose worth exceeds its load most, if it is not too busy for that."""
        best, most = None, float(-min(self._load(each) or 0 for each in candidates))
        for replica, worth in worths.items():
            load = self._load(replica)
            if load is None or load >= replica.max_ongoing_requests:
                continue
            if worth - load >= most:
                best, most = replica, worth - load
        return best

    def _load(self, replica: RunningReplica) -> int | None:
        """Its requests in progress, as far as this proxy knows."""
        return self.replica_queue_len_cache.get(replica.replica_id)

    def _keys(self, request: PendingRequest) -> tuple[str, list[str]]:
        """The adapter's key, or empty; the keys of ever longer prefixes, the adapter's first."""
        session = request.metadata.session_id
        if len(session) > MAX_CHARACTERS:
            return "", []  # not ours
        model, *blocks = session.split(".")
        adapter = "" if model in self._base_models else model
        return adapter, [*([adapter] if adapter else ()), *(adapter + block for block in blocks)]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Called once a replica has accepted a request."""
        if replica_id in self.curr_replicas:  # it may have died since
            self._table.add(self._keys(pending_request)[1], replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        before = set(self.curr_replicas)
        super().update_replicas(replicas)
        if gone := before - self.curr_replicas.keys():
            self._table.forget({each.unique_id for each in gone})
        names = (each.replica_metadata.get("model") for each in replicas)
        self._base_models = {model_key(name) for name in names if name is not None}

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._table.forget({replica_id.unique_id})

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """Unreachable, but possibly alive: stop preferring it."""
        super().on_replica_actor_unavailable(replica_id)
        self._table.forget({replica_id.unique_id})


def _two_of(replicas: Sequence[RunningReplica], key: str) -> list[RunningReplica]:
    """Two replicas at random, or with a key the first by its hash; Serve takes it if tied."""
    if not key or len(replicas) < 2:
        return random.sample(replicas, min(2, len(replicas)))
    first = max(replicas, key=lambda each: _rank(key, each))
    return [first, random.choice([each for each in replicas if each is not first])]


def _rank(key: str, replica: RunningReplica) -> bytes:
    """Rendezvous hashing: when replicas come or go, few keys move."""
    return blake2b(f"{key} {replica.replica_id.unique_id}".encode(), digest_size=8).digest()

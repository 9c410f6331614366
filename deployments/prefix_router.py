"""Routes requests that begin alike to one replica, which then finds their prefix in its cache.

In a deployment's options:

    request_router_config:
      request_router_class: deployments.prefix_router.PrefixRouter
      request_router_kwargs: { imbalance: 8 }

Serve's ConsistentHashRouter finds a session's replica; gptj.serving.entry.sessions names sessions,
in Serve's proxy, where GPTJ_PREFIX_SESSIONS=1 is set (see deployments.proxy). Unlike that router, a
replica that has `imbalance` requests more than another one counts as busy, and requests without a
session go to the less busy of two replicas.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica

IMBALANCE = 8


class PrefixRouter(ConsistentHashRouter):
    def initialize_state(self, imbalance: int = IMBALANCE, **kwargs: Any) -> None:
        """Called by Serve with request_router_kwargs. ValueError for a wrong one."""
        if not isinstance(imbalance, int) or imbalance < 1:
            raise ValueError(f"imbalance must be 1 or more, got {imbalance!r}")
        super().initialize_state(**kwargs)
        self._imbalance = imbalance

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Replicas to try, best first; of several in a list Serve takes the less busy."""
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is None or not candidate_replicas:
            return ranks
        two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if not pending_request.metadata.session_id or not ranks:
            return [two]
        least = min(map(self._ongoing, candidate_replicas))
        return [two] if self._ongoing(ranks[0][0]) >= least + self._imbalance else ranks

    def _ongoing(self, replica: RunningReplica) -> int:
        """Requests that a replica works on, as far as this proxy knows."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0

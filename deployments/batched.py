"""What replicas of models that compute whole batches have in common."""

# No `from __future__ import annotations`, as in the deployments: Serve reads annotations.

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch
from fastapi import FastAPI

from deployments.device import replica_device
from deployments.ledger import cluster_ledger
from deployments.loading import BatchArguments, freeze_loaded, loading_turn
from deployments.logs import follow_serve
from deployments.metrics import serve_metrics
from gptj.serving.metrics import Recorder


class BatchedService(Protocol):
    def alive(self, within_seconds: float) -> bool: ...
    def close(self) -> None: ...


Service = TypeVar("Service", bound=BatchedService)
Arguments = TypeVar("Arguments", bound=BatchArguments)


class BatchedReplica(Generic[Service, Arguments]):
    """A service of a checkpoint, its HTTP application, and its health.

    Args:
        load: makes the service on a device, with a recorder of its metrics.
        new_app: makes the application of the service, `_alive`, the recorder, the ledger of limits
            and the HTTP options.
    """

    def __init__(
        self,
        arguments: Arguments,
        load: Callable[[Arguments, torch.device | None, Recorder], Service],
        new_app: Callable[..., FastAPI],
    ) -> None:
        follow_serve()
        with loading_turn(arguments):
            self._service = load(arguments, replica_device(), serve_metrics())
        freeze_loaded()
        self._new_app = new_app
        self._stalled_seconds = arguments.stalled_seconds
        self._http_options = arguments.http_options()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._new_app(
            self._service, self._alive, serve_metrics(), cluster_ledger(), self._http_options
        )

    async def check_health(self) -> None:
        """For Serve, which replaces a replica whose model hangs or has stopped."""
        if not self._alive():
            raise RuntimeError(f"the model made no step in {self._stalled_seconds} seconds")

    def _alive(self) -> bool:
        return self._service.alive(self._stalled_seconds)

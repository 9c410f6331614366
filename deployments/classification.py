"""Text classification behind Hugging Face Inference's protocol, as a Ray Serve application.

    POST /classification
    {"inputs": "A fine film", "parameters": {"top_k": 2}}
    -> [[{"label": "positive", "score": 0.98}, {"label": "negative", "score": 0.02}]]

Also `GET /classification/health`. The prefix is the application's `route_prefix`.
"""

# No `from __future__ import annotations`: Serve reads the annotation of build's argument.

from typing import cast

from fastapi import FastAPI
from ray import serve
from ray.serve import Application, Deployment

from deployments.device import replica_device
from deployments.ledger import cluster_ledger
from deployments.loading import BatchArguments as Arguments
from deployments.loading import load, loading_turn
from deployments.logs import follow_serve
from deployments.metrics import serve_metrics
from deployments.preflight import check_before_deploying
from gptj import GPTJForSequenceClassification
from gptj.serving.classification import ClassificationService, classification_app


@serve.deployment(name="classification")
@serve.ingress()
class Classification:
    def __init__(self, arguments: Arguments) -> None:
        follow_serve()
        with loading_turn(arguments):
            model, tokenizer = load(GPTJForSequenceClassification, arguments, replica_device())
        self._service = ClassificationService(
            model, tokenizer, max_batch=arguments.max_batch, max_queued=arguments.max_queued
        )
        self._stalled_seconds = arguments.stalled_seconds
        self._http_options = arguments.http_options()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return classification_app(
            self._service, self._alive, serve_metrics(), cluster_ledger(), self._http_options
        )

    async def check_health(self) -> None:
        """For Serve, which replaces a replica whose model hangs or has stopped."""
        if not self._alive():
            raise RuntimeError(f"the model made no step in {self._stalled_seconds} seconds")

    def _alive(self) -> bool:
        return self._service.alive(self._stalled_seconds)


def build(args: Arguments) -> Application:
    check_before_deploying(GPTJForSequenceClassification, args)
    deployment = cast(Deployment, Classification)  # which the decorator's types do not say
    return deployment.bind(args)

"""Text embeddings behind OpenAI's embeddings API, as a Ray Serve application.

    POST /v1/embeddings
    {"input": ["It rains", "The ground is wet"]}
    -> {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.01, …]}, …],
        "model": "gpt-j-6b", "usage": {"prompt_tokens": 7, "total_tokens": 7}}

Also `GET /v1/embeddings/health`. The prefix is the application's `route_prefix`, which leaves the
rest of /v1 to the generation application.
"""

# No `from __future__ import annotations`: Serve reads the annotation of build's argument.

from typing import cast

from fastapi import FastAPI
from ray import serve
from ray.serve import Application, Deployment

from deployments.device import replica_device
from deployments.ledger import cluster_ledger
from deployments.loading import BatchArguments, load, loading_turn, name_of
from deployments.logs import follow_serve
from deployments.metrics import serve_metrics
from deployments.preflight import check_before_deploying
from gptj import GPTJModel
from gptj.serving.embeddings import EmbeddingsService, Pooling, embeddings_app


class Arguments(BatchArguments):
    """The checkpoint may have any head, or none: embeddings come from its hidden states."""

    model_name: str | None = None  # what clients call it; default: by its address
    # Over a text's hidden states: all (mean), the last, or all weighted by their position, as the
    # public GPT-J embedding models (SGPT) are trained. It must match the model's training.
    pooling: Pooling = "weighted_mean"
    normalize: bool = True  # vectors of length 1, like OpenAI's: their dot products are cosines


@serve.deployment(name="embeddings")
@serve.ingress()
class Embeddings:
    def __init__(self, arguments: Arguments) -> None:
        follow_serve()
        with loading_turn(arguments):
            model, tokenizer = load(GPTJModel, arguments, replica_device())
        self._service = EmbeddingsService(
            model,
            tokenizer,
            arguments.model_name or name_of(arguments.checkpoint),
            pooling=arguments.pooling,
            normalize=arguments.normalize,
            max_batch=arguments.max_batch,
            max_queued=arguments.max_queued,
        )
        self._stalled_seconds = arguments.stalled_seconds
        self._http_options = arguments.http_options()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return embeddings_app(
            self._service, self._alive, serve_metrics(), cluster_ledger(), self._http_options
        )

    async def check_health(self) -> None:
        """For Serve, which replaces a replica whose model hangs or has stopped."""
        if not self._alive():
            raise RuntimeError(f"the model made no step in {self._stalled_seconds} seconds")

    def _alive(self) -> bool:
        return self._service.alive(self._stalled_seconds)


def build(args: Arguments) -> Application:
    check_before_deploying(GPTJModel, args)
    deployment = cast(Deployment, Embeddings)  # which the decorator's types do not say
    return deployment.bind(args)

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

import torch
from ray import serve
from ray.serve import Application, Deployment

from deployments.batched import BatchedReplica
from deployments.loading import BatchArguments, load, name_of
from deployments.preflight import check_before_deploying
from gptj import GPTJConfig, GPTJModel, GPTJTokenizer
from gptj.checkpoints.folder import CONFIG, ModelFolder
from gptj.serving.embeddings import EmbeddingsService, Pooling, embeddings_app
from gptj.serving.metrics import Recorder
from gptj.serving.sentence_transformers import FILES, pooling_of


class Arguments(BatchArguments):
    """The checkpoint may have any head, or none: embeddings come from its hidden states."""

    model_name: str | None = None  # what clients call it; default: by its address
    # Over a text's hidden states: all (mean), the last, or all weighted by their position, as the
    # public GPT-J embedding models (SGPT) are trained. Default: a sentence-transformers folder's
    # own, from which it must not differ, and otherwise weighted_mean.
    pooling: Pooling | None = None
    normalize: bool = True  # vectors of length 1, like OpenAI's: their dot products are cosines

    def check_others(self, config: GPTJConfig, tokenizer: GPTJTokenizer) -> None:
        self.model_pooling()

    def model_pooling(self) -> Pooling:
        """Raises ValueError if the folder's pooling is not supported, or differs from `pooling`."""
        with ModelFolder.open(
            self.checkpoint, revision=self.revision, files=(CONFIG, *FILES)
        ) as folder:
            own = pooling_of(folder)
        if None not in (own, self.pooling) and own != self.pooling:
            raise ValueError(
                f"pooling={self.pooling} contradicts {self.checkpoint}, trained with {own}: "
                f"leave it out"
            )
        return self.pooling or own or "weighted_mean"


@serve.deployment(name="embeddings")
@serve.ingress()
class Embeddings(BatchedReplica[EmbeddingsService, Arguments]):
    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments, load_service, embeddings_app)


def load_service(
    arguments: Arguments, device: torch.device | None, recorder: Recorder | None = None
) -> EmbeddingsService:
    pooling = arguments.model_pooling()
    model, tokenizer = load(GPTJModel, arguments, device)
    return EmbeddingsService(
        model,
        tokenizer,
        arguments.model_name or name_of(arguments.checkpoint),
        arguments.batching(),
        recorder,
        pooling=pooling,
        normalize=arguments.normalize,
    )


def build(args: Arguments) -> Application:
    check_before_deploying(GPTJModel, args)
    deployment = cast(Deployment, Embeddings)  # which the decorator's types do not say
    return deployment.bind(args)

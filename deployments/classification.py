"""Text classification behind Hugging Face Inference's protocol, as a Ray Serve application.

    POST /classification
    {"inputs": "A fine film", "parameters": {"top_k": 2}}
    -> [[{"label": "positive", "score": 0.98}, {"label": "negative", "score": 0.02}]]

Also `GET /classification/health`. The prefix is the application's `route_prefix`.
"""

# No `from __future__ import annotations`: Serve reads the annotation of build's argument.

from typing import cast

import torch
from ray import serve
from ray.serve import Application, Deployment

from deployments.batched import BatchedReplica
from deployments.loading import BatchArguments as Arguments
from deployments.loading import load
from deployments.preflight import check_before_deploying
from gptj import GPTJForSequenceClassification
from gptj.serving.classification import ClassificationService, classification_app
from gptj.serving.metrics import Recorder


@serve.deployment(name="classification")
@serve.ingress()
class Classification(BatchedReplica[ClassificationService, Arguments]):
    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments, load_service, classification_app)


def load_service(
    arguments: Arguments, device: torch.device | None, recorder: Recorder | None = None
) -> ClassificationService:
    model, tokenizer = load(GPTJForSequenceClassification, arguments, device)
    return ClassificationService(model, tokenizer, arguments.batching(), recorder)


def build(args: Arguments) -> Application:
    check_before_deploying(GPTJForSequenceClassification, args)
    deployment = cast(Deployment, Classification)  # which the decorator's types do not say
    return deployment.bind(args)

"""Question answering behind Hugging Face Inference's protocol, as a Ray Serve application.

    POST /question-answering
    {"inputs": {"question": "Where is it?", "context": "It is in Rome."},
     "parameters": {"top_k": 1, "max_answer_len": 15, "handle_impossible_answer": false}}
    -> {"answer": "Rome", "start": 9, "end": 13, "score": 0.91}

Also `GET /question-answering/health`. The prefix is the application's `route_prefix`.
"""

# No `from __future__ import annotations`: Serve reads the annotation of build's argument.

from typing import Annotated, cast

import torch
from pydantic import Field
from ray import serve
from ray.serve import Application, Deployment

from deployments.batched import BatchedReplica
from deployments.loading import BatchArguments, load_from, open_checkpoint
from deployments.preflight import check_before_deploying
from gptj import GPTJForQuestionAnswering
from gptj.serving.metrics import Recorder
from gptj.serving.question_answering import (
    DEFAULT_STRIDE,
    DEFAULT_WINDOW,
    QuestionAnsweringService,
    question_answering_app,
)


class Arguments(BatchArguments):
    """`window` and `stride` default to training's if known, else to 384 and 128."""

    window: Annotated[int, Field(ge=2)] | None = None  # tokens of question and context together
    stride: Annotated[int, Field(ge=0)] | None = None  # tokens that neighbouring windows share


@serve.deployment(name="question-answering")
@serve.ingress()
class QuestionAnswering(BatchedReplica[QuestionAnsweringService, Arguments]):
    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments, load_service, question_answering_app)


def load_service(
    arguments: Arguments, device: torch.device | None, recorder: Recorder | None = None
) -> QuestionAnsweringService:
    with open_checkpoint(arguments, GPTJForQuestionAnswering, device) as folder:
        model, tokenizer = load_from(folder, GPTJForQuestionAnswering, arguments, device)
        trained = folder.read_training_data()
    stride = arguments.stride
    return QuestionAnsweringService(
        model,
        tokenizer,
        arguments.batching(),
        recorder,
        window=arguments.window or trained.get("sequence_length", DEFAULT_WINDOW),
        stride=trained.get("stride", DEFAULT_STRIDE) if stride is None else stride,
    )


def build(args: Arguments) -> Application:
    check_before_deploying(GPTJForQuestionAnswering, args)
    deployment = cast(Deployment, QuestionAnswering)  # which the decorator's types do not say
    return deployment.bind(args)

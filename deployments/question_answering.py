"""Question answering behind Hugging Face Inference's protocol, as a Ray Serve application.

    POST /question-answering
    {"inputs": {"question": "Where is it?", "context": "It is in Rome."},
     "parameters": {"top_k": 1, "max_answer_len": 15, "handle_impossible_answer": false}}
    -> {"answer": "Rome", "start": 9, "end": 13, "score": 0.91}

Also `GET /question-answering/health`. The prefix is the application's `route_prefix`.
"""

# No `from __future__ import annotations`: Serve reads the annotation of build's argument.

from typing import Annotated, cast

from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve import Application, Deployment

from deployments.device import replica_device
from deployments.ledger import cluster_ledger
from deployments.loading import BatchArguments, load_from, loading_turn, open_checkpoint
from deployments.logs import follow_serve
from deployments.metrics import serve_metrics
from deployments.preflight import check_before_deploying
from gptj import GPTJForQuestionAnswering
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
class QuestionAnswering:
    def __init__(self, arguments: Arguments) -> None:
        follow_serve()
        with loading_turn(arguments), open_checkpoint(arguments) as folder:
            model, tokenizer = load_from(
                folder, GPTJForQuestionAnswering, arguments, replica_device()
            )
            trained = folder.read_training_data()
        window = arguments.window or trained.get("sequence_length", DEFAULT_WINDOW)
        stride = arguments.stride
        self._service = QuestionAnsweringService(
            model,
            tokenizer,
            window=window,
            stride=trained.get("stride", DEFAULT_STRIDE) if stride is None else stride,
            max_batch=arguments.max_batch,
            max_queued=arguments.max_queued,
        )
        self._stalled_seconds = arguments.stalled_seconds
        self._http_options = arguments.http_options()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return question_answering_app(
            self._service, self._alive, serve_metrics(), cluster_ledger(), self._http_options
        )

    async def check_health(self) -> None:
        """For Serve, which replaces a replica whose model hangs or has stopped."""
        if not self._alive():
            raise RuntimeError(f"the model made no step in {self._stalled_seconds} seconds")

    def _alive(self) -> bool:
        return self._service.alive(self._stalled_seconds)


def build(args: Arguments) -> Application:
    check_before_deploying(GPTJForQuestionAnswering, args)
    deployment = cast(Deployment, QuestionAnswering)  # which the decorator's types do not say
    return deployment.bind(args)

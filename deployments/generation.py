"""Text generation behind OpenAI's completions API, as a Ray Serve application.

    POST /v1/completions
    {"prompt": "In a shocking finding, scientists", "max_tokens": 16, "temperature": 0}
    -> {"id": "cmpl-…", "object": "text_completion", "created": …, "model": "gpt-j-6b",
        "choices": [{"index": 0, "text": " …", "logprobs": null, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 6, "completion_tokens": 16, "total_tokens": 22}}

Also `GET /v1/models`, `GET /v1/models/{id}`, vLLM's `POST /tokenize`, `POST /detokenize` and
`GET /tokenizer_info`, and `GET /health`.
"""

# No `from __future__ import annotations`: Ray sends the class, but not the names in such strings.

import asyncio
import time
from typing import Annotated, Any, Self

from fastapi.responses import Response, StreamingResponse
from pydantic import Field, model_validator
from ray import serve
from ray.serve import Application

from deployments.loading import Arguments as LoadingArguments
from deployments.loading import load, loading_turn, name_of
from deployments.metrics import EngineReporter, serve_metrics
from deployments.preflight import check_before_deploying
from gptj import GPTJForCausalLM
from gptj.engine.cache_size import cache_tokens
from gptj.engine.choice import Quantization, best_runner
from gptj.engine.engine import Engine
from gptj.serving.app import health, new_app
from gptj.serving.completion_service import CompletionService, server_sent
from gptj.serving.completions import Completion, CompletionRequest, ModelCard, ModelList
from gptj.serving.errors import NotFoundError
from gptj.serving.tokenize import (
    DetokenizeReply,
    DetokenizeRequest,
    TokenizeReply,
    TokenizeRequest,
    detokenize,
    tokenize,
    tokenizer_info,
)
from gptj.serving.vocabulary import Vocabulary

app = new_app("GPT-J text generation", serve_metrics)


class Arguments(LoadingArguments):
    model_name: str | None = None  # what clients call it; default: by its address
    quantization: Quantization = "none"  # int8: weights in 8 bits, faster and smaller on a CPU
    max_running: Annotated[int, Field(ge=1)] = 64  # outputs that are generated together
    step_tokens: Annotated[int, Field(ge=1)] = 256  # new ones of a step: bounds others' pauses
    prefix_caching: bool = True  # prompts that begin alike are computed once
    # The cache of keys and values: so many tokens, or else a share of the device's free memory
    # (default: 0.3 on a CPU, 0.9 on a GPU), and no more than max_running requests can use.
    cache_tokens: Annotated[int, Field(ge=16)] | None = None
    cache_share: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _one_cache_size(self) -> Self:
        if self.cache_tokens is not None and self.cache_share is not None:
            raise ValueError("cache_tokens and cache_share both state the cache's size: leave one")
        if self.step_tokens < self.max_running:
            raise ValueError(
                f"step_tokens={self.step_tokens} must not be below max_running={self.max_running}: "
                f"each running output takes one of a step"
            )
        return self


# Above the class, which Ray sends with what the module has when it is decorated.
def cache_size(model: GPTJForCausalLM, arguments: Arguments) -> int:
    """Tokens that the cache has room for."""
    if arguments.cache_tokens is not None:
        return arguments.cache_tokens
    return cache_tokens(
        model.config,
        share=arguments.cache_share or (0.9 if model.device.type == "cuda" else 0.3),
        device=model.device,
        element_size=model.dtype.itemsize,
        most=arguments.max_running * model.config.n_positions,
    )


@serve.deployment(name="generation")
@serve.ingress(app)
class Generation:
    def __init__(self, arguments: Arguments) -> None:
        with loading_turn(arguments):
            model, tokenizer = load(GPTJForCausalLM, arguments)
            runner = best_runner(
                model,
                cache_size(model, arguments),
                quantization=arguments.quantization,
                release=True,  # one copy of the weights
            )
        eos = model.config.eos_token_id
        vocabulary = Vocabulary.of(tokenizer, model.config.vocab_size)
        context = model.config.n_positions
        self._engine = Engine(
            runner,
            eos_ids=[] if eos is None else [eos] if isinstance(eos, int) else eos,
            banned_ids=vocabulary.unused_ids,
            max_running=arguments.max_running,
            max_waiting=arguments.max_waiting,
            step_tokens=arguments.step_tokens,
            prefix_caching=arguments.prefix_caching,
        )
        name = arguments.model_name or name_of(arguments.checkpoint)
        self._tokenizer = tokenizer
        self._service = CompletionService(
            self._engine, tokenizer, vocabulary, name, serve_metrics()
        )
        self._reporter = EngineReporter(self._engine.stats)
        self._stalled_seconds = arguments.stalled_seconds
        self._card = ModelCard(
            id=name,
            created=int(time.time()),
            root=arguments.checkpoint,
            max_model_len=context,
        )

    @app.post("/v1/completions", response_model=Completion)
    async def complete(self, request: CompletionRequest) -> Response:
        self._check_model(request.model)
        if request.stream:
            chunks = await self._service.stream(request)
            return StreamingResponse(
                server_sent(chunks),
                media_type="text/event-stream",
                # A buffering proxy would make it no stream.
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        reply = await self._service.complete(request)
        # As text at once: FastAPI would check and convert it again, on the event loop.
        content = await asyncio.to_thread(reply.model_dump_json)
        return Response(content, media_type="application/json")

    @app.get("/v1/models")
    async def models(self) -> ModelList:
        return ModelList(data=[self._card])

    @app.get("/v1/models/{model_id:path}")
    async def model(self, model_id: str) -> ModelCard:
        self._check_model(model_id)
        return self._card

    @app.post("/tokenize", response_model_exclude_none=True)
    async def tokenize(self, request: TokenizeRequest) -> TokenizeReply:
        self._check_model(request.model)
        return await asyncio.to_thread(tokenize, self._tokenizer, request, self._card.max_model_len)

    @app.post("/detokenize")
    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeReply:
        self._check_model(request.model)
        return await asyncio.to_thread(detokenize, self._tokenizer, request)

    @app.get("/tokenizer_info")
    async def tokenizer_info(self) -> dict[str, Any]:
        return await asyncio.to_thread(tokenizer_info, self._tokenizer, self._card.max_model_len)

    @app.get("/health")
    async def health(self) -> dict[str, str]:
        return health(self._alive(), "the engine makes no progress")

    async def check_health(self) -> None:
        """For Serve, which replaces a replica whose engine hangs or has ended."""
        if not self._alive():
            raise RuntimeError(f"the engine made no step in {self._stalled_seconds} seconds")

    def _alive(self) -> bool:
        return self._engine.alive(self._stalled_seconds)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._card.id:
            raise NotFoundError(
                f"there is no model {name!r:.200} here, but {self._card.id!r}",
                param="model",
                code="model_not_found",
            )


def build(args: Arguments) -> Application:
    check_before_deploying(GPTJForCausalLM, args)
    return Generation.bind(args)

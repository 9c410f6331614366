"""OpenAI's embeddings API: texts or token ids in, one vector each out.

{"input": ["It rains", "The ground is wet"]}
-> {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.01, …]}, …],
    "model": "…", "usage": {"prompt_tokens": 7, "total_tokens": 7}}
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, PlainValidator, WithJsonSchema
from torch import Tensor

from gptj.model import GPTJModel
from gptj.serving.app import DEFAULTS, HTTPOptions, add_health, new_app
from gptj.serving.batched_rows import BatchedRows, Batching
from gptj.serving.completions.schemas import as_prompts
from gptj.serving.completions.vocabulary import Vocabulary
from gptj.serving.errors import InvalidRequestError, ModelError, NotFoundError, check_length
from gptj.serving.keys.account import reserve_tokens
from gptj.serving.keys.ledger import Ledger
from gptj.serving.metrics import Recorder
from gptj.serving.openapi import errors
from gptj.serving.reply_threads import in_reply_thread
from gptj.serving.requests import MAX_IDS, RequestModel, bounds, examples
from gptj.serving.text_threads import in_text_thread
from gptj.tokenizer import GPTJTokenizer

MAX_INPUTS = 2048  # OpenAI's
TEXT = {"type": "string", "minLength": 1}
IDS = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0},
    "minItems": 1,
    "maxItems": MAX_IDS,
}

# How a text's hidden states become one vector. weighted_mean weights the n-th token by n, since
# later tokens have seen more of the text (Muennighoff, "SGPT", 2022,
# https://arxiv.org/abs/2202.08904, section 4.1).
Pooling = Literal["mean", "last", "weighted_mean"]


class EmbeddingsRequest(RequestModel):
    model_config = ConfigDict(
        json_schema_extra=examples(
            {"input": "The food was delicious"},
            {"input": ["It rains", "The ground is wet"], "encoding_format": "base64"},
            {"input": [[40, 262], [40]]},
        )
    )

    input: Annotated[
        list[str | list[int]],
        PlainValidator(as_prompts),
        WithJsonSchema(
            {
                "anyOf": [
                    TEXT,
                    {"type": "array", "items": TEXT, "minItems": 1, "maxItems": MAX_INPUTS},
                    IDS,
                    {"type": "array", "items": IDS, "minItems": 1, "maxItems": MAX_INPUTS},
                ]
            }
        ),
    ]
    model: str | None = None  # default: this service's only model
    encoding_format: Literal["float", "base64"] = "float"  # base64: of fp32, little-endian
    # Only the model's own number: GPT-J's vectors cannot be shortened.
    dimensions: Annotated[int | None, bounds(minimum=1)] = None
    # Keep only this many of an input's first tokens; -1: as many as the context holds.
    truncate_prompt_tokens: Annotated[int | None, bounds(minimum=-1, **{"not": {"const": 0}})] = (
        None
    )
    user: str = ""  # ignored


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


class EmbeddingsService:
    """Embeds the inputs of concurrent requests together.

    Args:
        model_name: in replies.
        normalize: scale vectors to unit length, so that dot products are cosines.
    """

    def __init__(
        self,
        model: GPTJModel,
        tokenizer: GPTJTokenizer,
        model_name: str,
        batching: Batching,
        recorder: Recorder | None = None,
        *,
        pooling: Pooling = "weighted_mean",
        normalize: bool = True,
    ) -> None:
        self.model_name = model_name
        self._model = model
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary.of(tokenizer, model.config.vocab_size)
        self._pooling: Pooling = pooling
        self._normalize = normalize
        self._max_inputs = min(MAX_INPUTS, batching.max_queued)
        self._rows: BatchedRows[Tensor] = BatchedRows(
            "embeddings", model, self._vectors, batching, recorder, last_only=pooling == "last"
        )

    async def embed(self, request: EmbeddingsRequest) -> Embeddings:
        """Each input's vector, in order. Cancelling the call withdraws waiting inputs.

        Raises APIError, QueueFullError or ClosedError.
        """
        self._check(request)
        # Long texts take a while: not on the event loop.
        rows = await in_text_thread(sum(map(len, request.input)), self._encode, request)
        tokens = sum(map(len, rows))
        await reserve_tokens(tokens)
        vectors = await self._rows.results(rows)
        if not all(bool(vector.isfinite().all()) for vector in vectors):
            raise ModelError(
                f"the model's output is not finite: its weights are damaged, or too large for "
                f"{self._model.dtype}"
            )
        # A million numbers take a while: not on the event loop.
        numbers = sum(vector.numel() for vector in vectors)
        data = await in_reply_thread(numbers, _data, vectors, request.encoding_format)
        usage = EmbeddingsUsage(prompt_tokens=tokens, total_tokens=tokens)
        return Embeddings.model_construct(data=data, model=self.model_name, usage=usage)

    def alive(self, within_seconds: float) -> bool:
        return self._rows.alive(within_seconds)

    def close(self) -> None:
        self._rows.close()

    def _check(self, request: EmbeddingsRequest) -> None:
        """Raises APIError."""
        if request.model not in (None, self.model_name):
            raise NotFoundError(
                f"model {request.model!r:.200} does not exist; this service has "
                f"{self.model_name!r}",
                param="model",
                code="model_not_found",
            )
        width = self._model.config.n_embd
        if request.dimensions not in (None, width):
            raise InvalidRequestError(
                f"this model's embeddings have {width} dimensions, not {request.dimensions}, and "
                f"cannot be shortened: leave dimensions out",
                param="dimensions",
            )
        keep = request.truncate_prompt_tokens
        if keep is not None and keep != -1 and keep < 1:
            raise InvalidRequestError(
                f"truncate_prompt_tokens must be 1 or more, or -1, got {keep}",
                param="truncate_prompt_tokens",
            )
        if len(request.input) > self._max_inputs:
            raise InvalidRequestError(
                f"input may have {self._max_inputs} texts, got {len(request.input)}: send several "
                f"requests",
                param="input",
            )

    def _encode(self, request: EmbeddingsRequest) -> Sequence[list[int]]:
        context = self._model.config.n_positions
        keep = request.truncate_prompt_tokens
        rows = []
        for number, each in enumerate(request.input):
            which = f"input[{number}]" if len(request.input) > 1 else "input"
            if not each:
                raise InvalidRequestError(f"{which} is empty", param=which)
            if isinstance(each, str):
                if keep is None:  # reject far too long texts without tokenizing them
                    least = self._vocabulary.least_tokens(each)
                    self._check_length(which, "at least ", least)
                ids = self._tokenizer.encode(each)
            else:
                try:
                    ids = self._tokenizer.check_ids(each)
                except ValueError as error:
                    raise InvalidRequestError(f"{which}: {error}", param=which) from error
            if keep is not None:
                ids = ids[: context if keep == -1 else keep]
            self._check_length(which, "", len(ids))
            rows.append(ids)
        return self._rows.checked(rows)

    def _check_length(self, which: str, known: str, length: int) -> None:
        remedy = "shorten it, or set truncate_prompt_tokens"
        check_length(which, known, length, self._model.config.n_positions, remedy)

    def _vectors(self, states: list[Tensor]) -> list[Tensor]:
        """(D) of each row's (W, D), in fp32 on the CPU."""
        vectors_BD = torch.stack([pooled(each, self._pooling) for each in states])
        if self._normalize:
            vectors_BD = torch.nn.functional.normalize(vectors_BD, dim=-1)
        return list(vectors_BD.cpu())


def pooled(hidden_LD: Tensor, pooling: Pooling) -> Tensor:
    """Pool a row's hidden states to one vector: (D) fp32."""
    hidden_LD = hidden_LD.float()  # half precision cannot hold sums over thousands of tokens
    if pooling == "last":
        return hidden_LD[-1]
    if pooling == "mean":
        return hidden_LD.mean(dim=0)
    weights_L = torch.arange(1.0, len(hidden_LD) + 1, device=hidden_LD.device)
    return (weights_L / weights_L.sum()) @ hidden_LD


def embeddings_app(
    service: EmbeddingsService,
    alive: Callable[[], bool],
    recorder: Recorder | None = None,
    ledger: Ledger | None = None,
    options: HTTPOptions = DEFAULTS,
) -> FastAPI:
    """Routes of a service."""
    app = new_app(
        "GPT-J embeddings",
        recorder,
        application="embeddings",
        ledger=ledger,
        options=options,
    )
    add_health(app, alive, "the model makes no progress")

    @app.post("/", response_model=Embeddings, responses=errors(404, 429, 500, 503))
    async def embed(request: EmbeddingsRequest) -> Response:
        """Embed texts or token ids, as OpenAI's embeddings API does."""
        reply = await service.embed(request)
        # Serialized here: FastAPI would validate it again, on the event loop.
        numbers = sum(0 if isinstance(v := each.embedding, str) else len(v) for each in reply.data)
        content = await in_reply_thread(numbers, reply.model_dump_json)
        return Response(content, media_type="application/json")

    return app


def _data(
    vectors: Sequence[Tensor], encoding_format: Literal["float", "base64"]
) -> list[Embedding]:
    return [
        Embedding(index=index, embedding=_encoded(vector, encoding_format))
        for index, vector in enumerate(vectors)
    ]


def _encoded(vector: Tensor, encoding_format: Literal["float", "base64"]) -> list[float] | str:
    if encoding_format == "float":
        numbers: list[float] = vector.tolist()
        return numbers
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()

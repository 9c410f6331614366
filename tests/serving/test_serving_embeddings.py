"""Embeddings by OpenAI's client: transformers' hidden states, sentence-transformers' pooling."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import transformers
from serving_client import EMBEDDINGS, assert_error
from serving_models import CONTEXT, PROMPTS, SENTENCES, Models
from torch import Tensor

from gptj import GPTJModel
from gptj.serving.batched_rows import Batching
from gptj.serving.embeddings import EmbeddingsRequest, EmbeddingsService, Pooling, pooled

pytest_plugins = ["serving_fixtures"]

POOLINGS: list[Pooling] = ["mean", "last", "weighted_mean"]


@pytest.fixture(scope="module")
def embedder(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language model's checkpoint."""
    address = tmp_path_factory.mktemp("embedder") / "model"
    models.generation.save_pretrained(address, tokenizer=models.tokenizer)
    return address


@pytest.fixture(scope="module")
def theirs(embedder: Path) -> transformers.GPTJModel:
    return transformers.GPTJModel.from_pretrained(embedder).eval()


@torch.inference_mode()
def reference(theirs: Any, rows: list[list[int]], pooling: Pooling, normalize: bool) -> Tensor:
    """(B, D), each row alone: transformers' hidden states, pooled as sentence-transformers does.

    The formulas are those of its Pooling module (pooling_mode_mean_tokens, _lasttoken and
    _weightedmean_tokens) and Normalize.
    """
    vectors = []
    for ids in rows:
        token_embeddings = theirs(torch.tensor([ids])).last_hidden_state
        mask = torch.ones(1, len(ids), 1).expand(token_embeddings.size())
        if pooling == "last":
            vector = token_embeddings[:, -1]
        else:
            if pooling == "weighted_mean":
                weights = torch.arange(1, len(ids) + 1).unsqueeze(0).unsqueeze(-1)
                mask = mask * weights.expand(token_embeddings.size()).float()
            vector = (token_embeddings * mask).sum(1) / torch.clamp(mask.sum(1), min=1e-9)
        vectors.append(torch.nn.functional.normalize(vector, p=2, dim=1) if normalize else vector)
    return torch.cat(vectors)


@contextmanager
def embedding(
    models: Models, model: GPTJModel, pooling: Pooling, normalize: bool, max_batch: int = 16
) -> Iterator[EmbeddingsService]:
    """A service, for the length of a block."""
    service = EmbeddingsService(
        model,
        models.tokenizer,
        "embedder",
        Batching(max_batch, 256),
        pooling=pooling,
        normalize=normalize,
    )
    try:
        yield service
    finally:
        service.close()


def embedded(service: EmbeddingsService, rows: list[list[int]]) -> Tensor:
    """(B, D) of token ids."""
    reply = asyncio.run(service.embed(EmbeddingsRequest(input=rows)))
    return torch.tensor([each.embedding for each in reply.data])


def test_openais_client_gets_the_reference_vectors(
    client: openai.OpenAI, models: Models, theirs: transformers.GPTJModel
) -> None:
    """Both of its formats: it asks for base64 unless it is told otherwise."""
    ids = [models.tokenizer.encode(text) for text in PROMPTS]
    expected = reference(theirs, ids, "weighted_mean", normalize=True)
    for given in (PROMPTS, ids):
        for fields in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            reply = client.embeddings.create(model="embedder", input=given, **fields)
            assert [each.index for each in reply.data] == list(range(len(PROMPTS)))
            found = [each.embedding for each in reply.data]
            if fields.get("encoding_format") == "base64":
                found = [struct.unpack("<32f", base64.b64decode(each)) for each in found]
            # The order of summation differs, and rows are padded.
            torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)
            assert reply.usage.prompt_tokens == reply.usage.total_tokens == sum(map(len, ids))
            assert (reply.object, reply.model) == ("list", "embedder")
    one = client.embeddings.create(model="embedder", input=PROMPTS[0], dimensions=32)
    same = client.embeddings.create(model="embedder", input=ids[0])
    assert one.data[0].embedding == same.data[0].embedding


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_poolings_equal_the_references(
    models: Models, theirs: transformers.GPTJModel, pooling: Pooling, normalize: bool
) -> None:
    ids = [models.tokenizer.encode(text) for text in SENTENCES]
    rows = [row[:length] for row in ids for length in (1, 2, len(row))]
    with embedding(models, models.generation.transformer, pooling, normalize) as service:
        found = embedded(service, rows)
    expected = reference(theirs, rows, pooling, normalize)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_sums_of_half_precision_do_not_overflow(models: Models) -> None:
    hidden = torch.full((2048, 4), 60.0, dtype=torch.float16)
    found = pooled(hidden, "weighted_mean")
    torch.testing.assert_close(found, torch.full((4,), 60.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(
    models: Models, embedder: Path, theirs: transformers.GPTJModel, dtype: torch.dtype
) -> None:
    rows = [models.tokenizer.encode(text) for text in SENTENCES]
    model = GPTJModel.from_pretrained(str(embedder), dtype=dtype)  # of a language model's folder
    assert model.dtype == dtype
    with embedding(models, model, "weighted_mean", True) as service:
        found = embedded(service, rows)
    cosines = (found * reference(theirs, rows, "weighted_mean", True)).sum(dim=1)
    assert float(cosines.min()) > 0.999


def test_inputs_are_answered_in_order(models: Models) -> None:
    rows = [models.tokenizer.encode(SENTENCES[0])[:length] for length in (9, 1, 8, 2, 7, 3, 9, 1)]
    with embedding(models, models.generation.transformer, "mean", False, max_batch=3) as service:
        found = embedded(service, rows)
        alone = torch.cat([embedded(service, [row]) for row in rows])
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"input": ""}, 400, "input is empty"),
        ({"input": ["a", ""]}, 400, "input[1] is empty"),
        ({"input": [1, 9999]}, 400, "id 9999 is not in the vocabulary"),
        ({"input": "x" * 2 * CONTEXT}, 400, f"but this model's context is {CONTEXT}: shorten it"),
        ({"input": ["x"] * 257}, 400, "input may have 256 texts, got 257"),
        ({"input": "x", "dimensions": 16}, 400, "have 32 dimensions, not 16"),
        ({"input": "x", "truncate_prompt_tokens": 0}, 400, "must be 1 or more, or -1, got 0"),
        ({"input": "x", "model": "other"}, 404, "this service has 'embedder'"),
        ({"input": []}, 422, "must not be an empty list"),
        ({"input": ["x", [1]]}, 422, "and not a mixture"),
        ({"input": "x", "encoding_format": "int8"}, 422, "encoding_format"),
        ({"input": "x", "unknown": 1}, 422, "unknown field"),
        ({}, 422, "input"),
    ],
)
def test_invalid_inputs_are_refused(
    service: str, body: dict[str, Any], status: int, reason: str
) -> None:
    assert_error(httpx.post(service + EMBEDDINGS, json=body, timeout=30), status, reason)


def test_long_inputs_are_truncated_if_requested(service: str, models: Models) -> None:
    ids = models.tokenizer.encode(" ".join(SENTENCES))
    long = "x" * 2 * CONTEXT
    for text, keep, same in (
        (" ".join(SENTENCES), 5, ids[:5]),
        (long, -1, models.tokenizer.encode(long)[:CONTEXT]),
    ):
        body = {"input": text, "truncate_prompt_tokens": keep}
        replies = [
            httpx.post(service + EMBEDDINGS, json=fields, timeout=60).json()
            for fields in (body, {"input": same})
        ]
        assert replies[0] == replies[1]


def test_routes_do_not_collide_with_the_generation_services(service: str) -> None:
    assert httpx.get(f"{service}{EMBEDDINGS}/health").json() == {"status": "ok"}
    assert httpx.get(f"{service}/v1/models").json()["data"][0]["id"] == "generation"

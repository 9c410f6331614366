"""Text classification, by Hugging Face's client and by plain HTTP."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
import transformers
from huggingface_hub import InferenceClient
from serving_client import CLASSIFICATION, assert_error
from serving_models import PROMPTS, SENTENCES, SHORT_CONTEXT, Models
from tokenizers import Encoding

from deployments.loading import BatchArguments
from gptj.serving.classification import ClassificationService
from gptj.tokenizer import rows
from gptj.workers.errors import QueueFullError

pytest_plugins = ["serving_fixtures"]


def scores(models: Models, text: str) -> dict[str, float]:
    """Each label's probability by the model alone."""
    return scores_of_ids(models, models.tokenizer.encode(text))


def scores_of_ids(models: Models, ids: list[int]) -> dict[str, float]:
    probabilities = models.classification(torch.tensor([ids])).logits[0].softmax(dim=-1).tolist()
    return dict(zip(models.classification.config.id2label.values(), probabilities, strict=True))


@pytest.mark.usefixtures("online")
def test_hugging_faces_client_classifies(service: str, models: Models) -> None:
    client = InferenceClient(model=f"{service}/classification")
    found = client.text_classification(PROMPTS[1])
    expected = sorted(scores(models, PROMPTS[1]).items(), key=lambda each: -each[1])
    assert [each.label for each in found] == [label for label, _ in expected]
    assert [each.score for each in found] == pytest.approx([s for _, s in expected], abs=1e-5)
    (best,) = client.text_classification(PROMPTS[1], top_k=1, function_to_apply="sigmoid")
    assert best.label == expected[0][0]
    assert best.score != pytest.approx(expected[0][1])


@pytest.mark.slow
def test_concurrent_texts_are_classified_as_alone(service: str, models: Models) -> None:
    texts = [sentence[:length] for sentence in SENTENCES for length in range(1, 14)]

    def ask(text: str) -> dict[str, float]:
        reply = httpx.post(f"{service}/classification", json={"inputs": text}, timeout=30)
        (labels,) = reply.json()
        return {each["label"]: each["score"] for each in labels}

    together = httpx.post(f"{service}/classification", json={"inputs": texts}, timeout=30).json()
    with ThreadPoolExecutor(16) as pool:
        for text, found, listed in zip(texts, pool.map(ask, texts), together, strict=True):
            expected = scores(models, text)
            assert found == pytest.approx(expected, abs=1e-5)
            assert {e["label"]: e["score"] for e in listed} == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def theirs(
    models: Models, tmp_path_factory: pytest.TempPathFactory
) -> transformers.PreTrainedTokenizerFast:
    """Transformers' tokenizer with the models' vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizer")
    models.tokenizer.save_pretrained(folder)
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(Path(folder, "tokenizer.json")))


@pytest.mark.parametrize("lengths", [(1, 1), (30, 3), (3, 30), (40, 40), (80, 2), (2, 80)])
def test_pairs_are_tokenized_like_in_transformers(
    service: str, models: Models, theirs: transformers.PreTrainedTokenizerFast, lengths: list[int]
) -> None:
    text, pair = (" ".join(["Paris"] * length) for length in lengths)
    body = {
        "inputs": [{"text": text, "text_pair": pair}, PROMPTS[0]],
        "parameters": {"truncation": True},
    }
    found, alone = httpx.post(f"{service}{CLASSIFICATION}", json=body, timeout=30).json()
    ids = theirs(text, pair, truncation="longest_first", max_length=SHORT_CONTEXT)["input_ids"]
    expected = scores_of_ids(models, ids)
    assert {e["label"]: e["score"] for e in found} == pytest.approx(expected, abs=1e-5)
    expected = scores(models, PROMPTS[0])
    assert {e["label"]: e["score"] for e in alone} == pytest.approx(expected, abs=1e-5)


def test_a_single_pair_needs_no_list(service: str) -> None:
    pair = {"text": "Paris", "text_pair": "Anna"}
    replies = [
        httpx.post(f"{service}{CLASSIFICATION}", json={"inputs": inputs}, timeout=30).json()
        for inputs in (pair, [pair], {"text": "ParisAnna", "text_pair": None})
    ]
    assert replies[0] == replies[1] == replies[2]


@pytest.mark.parametrize(
    ("inputs", "status", "reason"),
    [
        ({"text": "a", "text_pair": "b" * 100}, 400, "inputs has 101 tokens"),
        ({"text": "a" * 2000, "text_pair": "b" * 2000}, 400, "inputs has at least"),
        ([{"text": "a"}, {"text": "a", "text_pair": ""}], 400, "inputs[1] is empty"),
        ({"text_pair": "b"}, 422, "must be a string, {"),
        ({"text": "a", "text_pair": 1}, 422, "must be a string, {"),
        ({"text": "a", "pair": "b"}, 422, "must be a string, {"),
        ([["a", "b"]], 422, "must be a string, {"),
    ],
)
def test_invalid_pairs_are_refused(service: str, inputs: object, status: int, reason: str) -> None:
    reply = httpx.post(f"{service}{CLASSIFICATION}", json={"inputs": inputs}, timeout=30)
    assert_error(reply, status, reason)


def test_two_long_texts_only_make_the_rows_that_are_used(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of one with each of the other would be millions, and fill the memory."""
    made = 0

    class Counted(rows.Window):
        def __init__(self, *encodings: Encoding) -> None:
            nonlocal made
            made += 1
            super().__init__(*encodings)

    monkeypatch.setattr(rows, "Window", Counted)
    long = "It rains! " * 10_000
    body = {"inputs": {"text": long, "text_pair": long}, "parameters": {"truncation": True}}
    assert httpx.post(service + CLASSIFICATION, json=body, timeout=60).status_code == 200
    assert made == 1


def test_rows_that_would_wait_longer_than_the_setting_are_refused(models: Models) -> None:
    arguments = BatchArguments(
        checkpoint="model", max_batch=1, max_queued=5000, max_queue_seconds=1e-4
    )
    batching = replace(arguments.batching(), release=False)
    service = ClassificationService(models.classification, models.tokenizer, batching)

    async def refusal() -> str:
        await service._rows.results([[5]] * 50)  # by which the pace is known
        first = asyncio.create_task(service._rows.results([[5]] * 2000))
        await asyncio.sleep(0)  # until they are queued
        try:
            await service._rows.results([[5]])
        except QueueFullError as error:
            return str(error)
        finally:
            first.cancel()
        return "none"

    try:
        assert "more than the limit of 0.0001 s" in asyncio.run(refusal())
    finally:
        service.close()

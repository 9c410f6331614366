"""Text classification, by Hugging Face's client and by plain HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from huggingface_hub import InferenceClient
from serving_models import PROMPTS, SENTENCES, Models

pytest_plugins = ["serving_fixtures"]


def scores(models: Models, text: str) -> dict[str, float]:
    """Each label's probability by the model alone."""
    ids = torch.tensor([models.tokenizer.encode(text)])
    probabilities = models.classification(ids).logits[0].softmax(dim=-1).tolist()
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

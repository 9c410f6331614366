"""Question answering, by Hugging Face's client and by plain HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import InferenceClient
from serving_client import assert_alike
from serving_models import SENTENCES, Models

from gptj.data.spans import best_spans
from gptj.data.windows import windows
from gptj.data.words import Words

pytest_plugins = ["serving_fixtures"]


@pytest.mark.usefixtures("online")
def test_hugging_faces_client_gets_the_best_span_over_all_windows(
    service: str, models: Models
) -> None:
    client = InferenceClient(model=f"{service}/question-answering")
    question, context = "Who wrote it?", " ".join(SENTENCES)
    parts = windows(models.tokenizer, question, context, 40, 8)
    assert len(parts) > 2
    outputs = [models.question_answering(torch.tensor([part.input_ids])) for part in parts]
    spans = best_spans(
        parts,
        [output.start_logits[0] for output in outputs],
        [output.end_logits[0] for output in outputs],
        top_k=3,
        max_answer_tokens=7,
        handle_impossible_answer=True,
    )
    asked = {"max_seq_len": 40, "doc_stride": 8, "max_answer_len": 7, "align_to_words": False}
    found = client.question_answering(
        question=question, context=context, top_k=3, handle_impossible_answer=True, **asked
    )
    assert isinstance(found, list)
    for answer, span in zip(found, spans, strict=True):
        assert (answer.start, answer.end) == (span.start, span.end)
        assert answer.answer == context[span.start : span.end]
        assert answer.score == pytest.approx(span.score, abs=1e-5)
    best = client.question_answering(question=question, context=context, **asked)
    assert best.answer == context[best.start : best.end]


def answers(service: str, question: str, context: str, **parameters: Any) -> list[dict[str, Any]]:
    body = {"inputs": {"question": question, "context": context}, "parameters": parameters}
    reply = httpx.post(f"{service}/question-answering", json=body, timeout=30)
    assert reply.status_code == 200, reply.text
    found = reply.json()
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize(
    ("question", "context"),
    [
        ("Who is it?", "Angelina Merkelson was it."),
        ("Was?", "cafe\u0301 — 東京, O'Neil 1,000"),
        ("Who?", "नमस्ते दुनिया 😀"),
    ],
)
def test_each_answer_comes_once_with_the_probability_of_all_its_spans(
    service: str, question: str, context: str
) -> None:
    """Up to so many answers as there are, and none twice."""
    spans = answers(service, question, context, top_k=100, align_to_words=False, max_answer_len=3)
    assert len(spans) < 100, "these should be all, to be added up"
    words = Words(context)
    expected: dict[tuple[int, int], float] = {}
    for span in spans:
        place = words.widen(span["start"], span["end"])
        expected[place] = expected.get(place, 0) + span["score"]
    assert len(expected) < len(spans)
    ranked = sorted(expected, key=lambda place: -expected[place])
    for top_k in (1, 2, len(expected), 100):
        found = answers(service, question, context, top_k=top_k, max_answer_len=3)
        assert [(each["start"], each["end"]) for each in found] == ranked[:top_k]
        for each in found:
            place = each["start"], each["end"]
            assert each["score"] == pytest.approx(expected[place], rel=1e-4)
            assert each["answer"] == context[slice(*place)]


def test_the_requested_number_of_answers_is_returned(service: str) -> None:
    question = "Who is the chancellor of Germany?"
    context = "Angelina Merkelson was the chancellor of Germany."
    found = answers(service, question, context, top_k=20, max_seq_len=64)
    assert len({(each["start"], each["end"]) for each in found}) == len(found) == 20
    scores = [each["score"] for each in found]
    assert scores == sorted(scores, reverse=True)


def test_the_empty_answer_stays_empty(service: str) -> None:
    """The empty answer takes part once, where it may, and stays empty."""
    found = answers(service, "Who?", SENTENCES[0], top_k=100, handle_impossible_answer=True)
    assert [each["answer"] for each in found].count("") == 1
    assert len({(each["start"], each["end"]) for each in found}) == len(found)
    assert sum(each["score"] for each in found) <= 1
    without = answers(service, "Who?", SENTENCES[0], top_k=100)
    assert "" not in [each["answer"] for each in without]


@pytest.mark.usefixtures("online")
def test_question_length_can_be_limited(service: str) -> None:
    client = InferenceClient(model=f"{service}/question-answering")
    context = " ".join(SENTENCES)
    long = client.question_answering(
        question="Where " * 50, context=context, max_question_len=1, align_to_words=False
    )
    limited = client.question_answering(
        question="Where", context=context, max_question_len=1, align_to_words=False
    )
    assert long.score == pytest.approx(limited.score, abs=1e-5)


@pytest.mark.slow
def test_concurrent_questions_are_answered_as_alone(service: str) -> None:
    bodies = [
        {"inputs": {"question": question, "context": " ".join(SENTENCES)[start:]}}
        for question in ("Who?", "Where is the tower?")
        for start in range(8)
    ]

    def ask(body: dict[str, Any]) -> dict[str, Any]:
        reply = httpx.post(f"{service}/question-answering", json=body, timeout=30)
        assert reply.status_code == 200, reply.text
        return reply.json()

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, bodies))
    assert_alike(together, [ask(body) for body in bodies])

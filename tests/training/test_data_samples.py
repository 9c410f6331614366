"""The built-in sample data is reproducible, split without overlap, and correct."""

from __future__ import annotations

import hashlib
import json

import pytest

from gptj.data.sources import Row, read_rows
from gptj.training.tasks import TASKS


def rows(address: str) -> list[Row]:
    task = {"documentation": "causal-lm", "reviews": "classification"}.get(
        address.partition("/")[0], "question-answering"
    )
    return list(read_rows(f"sample://{address}", TASKS[task].row_kinds[0]))


@pytest.mark.parametrize("name", ["documentation", "reviews", "questions"])
def test_training_and_evaluation_samples_are_disjoint(name: str) -> None:
    column = "context" if name == "questions" else "text"
    train = [row.text(column) for row in rows(name)]
    evaluation = [row.text(column) for row in rows(f"{name}/evaluation")]
    assert len(evaluation) >= len(train) / 10
    assert len({*train, *evaluation}) == len(train) + len(evaluation)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("reviews", "40a2ce1f6ef49ae5"),
        ("questions", "bae87a6827771672"),
    ],
)
def test_synthetic_rows_are_reproducible(name: str, digest: str) -> None:
    content = json.dumps([row.values for row in rows(name) + rows(f"{name}/evaluation")])
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == digest


def test_documentation_is_all_of_pythons_language_reference() -> None:
    from pydoc_data.topics import topics

    texts = [row.text("text") for row in rows("documentation") + rows("documentation/evaluation")]
    assert sorted(texts) == sorted(set(topics.values()))


def test_reviews_are_balanced() -> None:
    labels = [row.value("label") for row in rows("reviews")]
    assert set(labels) == {"positive", "negative"}
    assert 0.45 < labels.count("positive") / len(labels) < 0.55


def test_each_question_has_one_true_answer_in_its_context() -> None:
    for row in rows("questions") + rows("questions/evaluation"):
        context, answers = row.text("context"), row.value("answers")
        (text,), (start,) = answers["text"], answers["answer_start"]
        assert context[start : start + len(text)] == text
        assert context.count(f" {text}") == 1, row
    asked = {row.text("question").split()[0] for row in rows("questions")}
    assert asked == {"Where", "What", "Which", "When"}

"""Scores of a classifier's classes, beside scikit-learn's definition counted out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from gptj.data.labels import LabelSet
from gptj.training.class_scores import class_scores


def test_single_labels_have_scores_and_a_confusion_matrix() -> None:
    guesses, targets = np.array([0, 0, 1, 1, 1, 0]), np.array([0, 1, 1, 1, 2, 0])
    labels = LabelSet(("a", "b", "c", "d"), "single_label_classification")
    found = class_scores(np.eye(4)[guesses], targets, labels)
    assert found["labels"] == ["a", "b", "c", "d"]
    assert found["confusion_matrix"] == [[2, 0, 0, 0], [1, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert found["classes"]["a"] == pytest.approx(
        {"precision": 2 / 3, "recall": 1, "f1": 0.8, "support": 2}
    )
    assert found["classes"]["b"] == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3}
    )
    assert found["classes"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    assert found["classes"]["d"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}


def test_several_labels_have_scores_and_no_matrix() -> None:
    logits, targets = np.array([[1.0, -1], [1, 1], [-1, 1]]), np.array([[1.0, 0], [0, 1], [1, 1]])
    found = class_scores(logits, targets, LabelSet(("a", "b"), "multi_label_classification"))
    assert found == {
        "classes": {
            "a": {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2},
            "b": {"precision": 1, "recall": 1, "f1": 1, "support": 2},
        }
    }


def test_regressions_have_no_class_scores() -> None:
    labels = LabelSet(("a",), "regression")
    assert class_scores(np.array([[1.0]]), np.array([1.0]), labels) == {}

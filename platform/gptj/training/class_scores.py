"""A classifier's per-class scores: logits and targets in, metrics by label out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptj.data.labels import MULTI_LABEL, REGRESSION, LabelSet

Array = np.ndarray[Any, Any]


def class_scores(logits_BC: Array, targets: Array, labels: LabelSet) -> dict[str, Any]:
    """`classes`: `precision`, `recall`, `f1` and `support` (rows that have it) by label.

    Single-label tasks also get `confusion_matrix`: [i][j] counts rows of label i predicted as
    label j, in the order of `labels`. 0/0 counts as 0, as in scikit-learn. Empty for a regression.
    """
    if labels.problem_type == REGRESSION:
        return {}
    count = len(labels.names)
    if labels.problem_type == MULTI_LABEL:
        predicted, true = logits_BC > 0, targets > 0.5  # a probability above one half
        return {"classes": _by_label(predicted, true, labels.names)}
    guesses = logits_BC.argmax(axis=1)
    confusion = np.zeros((count, count), dtype=np.int64)
    np.add.at(confusion, (targets, guesses), 1)
    one_hot = np.eye(count, dtype=bool)
    return {
        "classes": _by_label(one_hot[guesses], one_hot[targets], labels.names),
        "labels": list(labels.names),
        "confusion_matrix": confusion.tolist(),
    }


def _by_label(
    predicted_BC: Array, true_BC: Array, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    hits = (predicted_BC & true_BC).sum(axis=0)
    predicted, true = predicted_BC.sum(axis=0), true_BC.sum(axis=0)
    return {
        name: {
            "precision": _share(hits[c], predicted[c]),
            "recall": _share(hits[c], true[c]),
            "f1": _share(2 * hits[c], predicted[c] + true[c]),
            "support": int(true[c]),
        }
        for c, name in enumerate(names)
    }


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else 0.0

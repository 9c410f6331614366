"""Labels by name, by number, several at once, or measured: read as they look, or as is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptj import GPTJConfig, GPTJForSequenceClassification, GPTJTokenizer
from gptj.data.classification import ClassificationData, LabelSet
from gptj.data.sources import DataError, Row, read_rows
from gptj.training.settings import COLUMNS

TEXTS = [
    "good and fine",
    "bad",
    "so so, neither good nor bad, and rather long for a review",
    "fine",
]


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train(TEXTS, 270)


def rows(*labels: Any) -> list[Row]:
    return [
        Row({"text": TEXTS[i % len(TEXTS)], "label": label}, "f.jsonl", i + 1)
        for i, label in enumerate(labels)
    ]


SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


@pytest.mark.parametrize(
    ("labels", "problem_type", "names", "targets"),
    [
        (["b", "a", "b"], SINGLE, ("a", "b"), [1, 0, 1]),
        ([0, 2, 1, 1], SINGLE, ("LABEL_0", "LABEL_1", "LABEL_2"), [0, 2, 1, 1]),
        ([True, False], SINGLE, ("LABEL_0", "LABEL_1"), [1, 0]),
        ([["x", "y"], [], ["z"]], MULTI, ("x", "y", "z"), [[1, 1, 0], [0, 0, 0], [0, 0, 1]]),
        ([0.5, 2, -1.5], REGRESSION, ("LABEL_0",), [0.5, 2.0, -1.5]),
        ([[0.5, 1], [2, 3]], REGRESSION, ("LABEL_0", "LABEL_1"), [[0.5, 1.0], [2.0, 3.0]]),
    ],
)
def test_labels_are_read_as_they_look(
    labels: list[Any],
    problem_type: str,
    names: tuple[str, ...],
    targets: list[Any],
    tokenizer: GPTJTokenizer,
) -> None:
    data = ClassificationData(rows(*labels), tokenizer, 32)
    assert data.labels == LabelSet(names, problem_type)
    batch = data.collate([data[i] for i in range(len(data))])
    assert batch["labels"].tolist() == targets
    assert batch["labels"].dtype == (torch.int64 if problem_type == SINGLE else torch.float32)


def test_names_can_be_given_in_an_order_of_their_own(tokenizer: GPTJTokenizer) -> None:
    data = ClassificationData(
        rows("low", "high"), tokenizer, 32, label_names=["low", "mid", "high"]
    )
    assert data.targets.tolist() == [0, 2]
    assert data.labels.id2label == {0: "low", 1: "mid", 2: "high"}
    data = ClassificationData(rows(1, 1), tokenizer, 32, label_names=["low", "high"])
    assert data.targets.tolist() == [1, 1]


def test_ratings_in_whole_numbers_can_be_regressed_on(tokenizer: GPTJTokenizer) -> None:
    data = ClassificationData(rows(1, 5, 4), tokenizer, 32, problem_type=REGRESSION)
    assert data.labels.problem_type == REGRESSION
    assert data.targets.tolist() == [1.0, 5.0, 4.0]


def test_evaluation_data_takes_the_labels_of_training(tokenizer: GPTJTokenizer) -> None:
    labels = ClassificationData(rows("c", "a", "b"), tokenizer, 32).labels
    data = ClassificationData(rows("c", "c"), tokenizer, 32, labels)
    assert data.labels is labels
    assert data.targets.tolist() == [2, 2]
    with pytest.raises(
        DataError, match="f.jsonl, row 2, column 'label': 'd' is not one of .* a, b"
    ):
        ClassificationData(rows("c", "d"), tokenizer, 32, labels)
    with pytest.raises(ValueError, match="give no label_names"):
        ClassificationData(rows("c"), tokenizer, 32, labels, label_names=["c", "d"])


@pytest.mark.parametrize("labels", [["b", "a"], [["x"], ["y", "x"]], [0.5, 1.5], [[1.0, 2.0]]])
def test_a_models_configuration_gives_the_labels_back(
    labels: list[Any], tokenizer: GPTJTokenizer
) -> None:
    found = ClassificationData(rows(*labels), tokenizer, 32).labels
    config = GPTJConfig(id2label=found.id2label, problem_type=found.problem_type)
    assert LabelSet.of(GPTJConfig.from_dict(config.to_dict())) == found


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", 1], "row 2, column 'label': is 1, but that of f.jsonl, row 1 is 'a'"),
        ([1, 0, "a"], "row 3, column 'label': is 'a', but that of f.jsonl, row 1 is 1"),
        ([["a"], "a"], "row 2, column 'label': is 'a', but"),
        ([["a"], [1]], r"row 2, column 'label': is \[1\], but"),
        ([1.5, None], "row 2, column 'label': is None, but"),
        ([None, "a"], "row 1, column 'label': must be a name"),
        ([{"a": 1}], "row 1, column 'label': must be a name"),
        ([0, 2], "class numbers must be 0 to n without a gap, got 0 to 2 without 1; remedy"),
        ([-1, 0], "class numbers must be 0 to n without a gap, got -1 to 0; remedy"),
        (["a", "a"], "all rows have the label 'a'"),
        ([[], []], "label names must be one or more"),
        ([0.5, float("nan")], "row 2, column 'label': must be a finite number, got nan"),
        ([[0.5, 1.5], [0.5]], r"row 2, column 'label': must be 2 numbers, got \[0.5\]"),
    ],
)
def test_a_label_that_does_not_fit_is_named(
    labels: list[Any], message: str, tokenizer: GPTJTokenizer
) -> None:
    with pytest.raises(DataError, match=message):
        ClassificationData(rows(*labels), tokenizer, 32)


def test_an_empty_text_is_named(tokenizer: GPTJTokenizer) -> None:
    bad = Row({"text": "", "label": "a"}, "f.jsonl", 4)
    with pytest.raises(DataError, match="f.jsonl, row 4, column 'text': is empty"):
        ClassificationData([*rows("a", "b"), bad], tokenizer, 32)
    with pytest.raises(DataError, match="no rows"):
        ClassificationData([], tokenizer, 32)


def test_a_long_text_keeps_its_beginning(tokenizer: GPTJTokenizer) -> None:
    data = ClassificationData(rows("a", "b", "a", "b"), tokenizer, 5)
    for index, text in enumerate(TEXTS):
        assert data[index].input_ids.tolist() == tokenizer.encode(text)[:5]
    batch = data.collate([data[i] for i in range(4)])
    assert batch["input_ids"].shape == (4, 5)  # not 8: that is more than max_length
    assert data.count_items(batch) == 4
    assert data.count_tokens(batch) == sum(len(data[i].input_ids) for i in range(4))


@pytest.mark.parametrize("labels", [["b", "a", "b"], [["x"], [], ["x", "y"]], [0.5, 2.5, 1.0]])
def test_the_model_takes_a_batch_and_sees_no_padding(
    labels: list[Any], tokenizer: GPTJTokenizer
) -> None:
    data = ClassificationData(rows(*labels), tokenizer, 64)
    torch.manual_seed(0)
    model = GPTJForSequenceClassification(
        GPTJConfig(
            vocab_size=len(tokenizer),
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            rotary_dim=8,
            id2label=data.labels.id2label,
            problem_type=data.labels.problem_type,
        )
    ).eval()
    output = model(**data.collate([data[i] for i in range(3)]))
    assert output.loss.isfinite()
    for index in range(3):
        alone = model(torch.from_numpy(data[index].input_ids).long()[None])
        torch.testing.assert_close(output.logits[index], alone.logits[0], rtol=0, atol=1e-5)


def test_sst2_has_two_labels(tokenizer: GPTJTokenizer, shared_data: Path) -> None:
    data = ClassificationData(
        read_rows(str(shared_data / "sst2_dev.jsonl"), COLUMNS["classification"]), tokenizer, 64
    )
    assert data.labels.names == ("negative", "positive")
    assert 0.4 < data.targets.mean() < 0.6

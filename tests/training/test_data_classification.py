"""Labels as names, numbers, several at once, or regression targets: inferred, or as set."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj import GPTJConfig, GPTJForSequenceClassification, GPTJTokenizer
from gptj.data.classification import ClassificationData, LabelSet
from gptj.data.examples import TOKENIZED_AT_ONCE
from gptj.data.labels import check_label, read_labels
from gptj.data.sources import DataError, Row, find_columns, read_rows
from gptj.training.sections import DataSettings
from gptj.training.settings import SettingsError
from gptj.training.tasks import TASKS

TEXTS = [
    "good and fine",
    "bad",
    "so so, neither good nor bad, and rather long for a review",
    "fine",
]


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train(TEXTS, 270)


def rows(*labels: Any, typed: bool = True) -> list[Row]:
    return [
        Row({"text": TEXTS[i % len(TEXTS)], "label": label}, "f.jsonl", i + 1, typed=typed)
        for i, label in enumerate(labels)
    ]


def cells(*labels: str) -> list[Row]:
    """As a CSV file has them."""
    return rows(*labels, typed=False)


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
def test_label_types_are_inferred(
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


def test_label_names_can_be_given_in_any_order(tokenizer: GPTJTokenizer) -> None:
    data = ClassificationData(
        rows("low", "high"), tokenizer, 32, label_names=["low", "mid", "high"]
    )
    assert data.targets.tolist() == [0, 2]
    assert data.labels.id2label == {0: "low", 1: "mid", 2: "high"}
    data = ClassificationData(rows(1, 0, 1), tokenizer, 32, label_names=["low", "high"])
    assert data.targets.tolist() == [1, 0, 1]


def test_integer_ratings_can_be_regression_targets(tokenizer: GPTJTokenizer) -> None:
    data = ClassificationData(rows(1, 5, 4), tokenizer, 32, problem_type=REGRESSION)
    assert data.labels.problem_type == REGRESSION
    assert data.targets.tolist() == [1.0, 5.0, 4.0]


def test_evaluation_data_uses_the_training_labels(tokenizer: GPTJTokenizer) -> None:
    labels = ClassificationData(rows("c", "a", "b"), tokenizer, 32).labels
    data = ClassificationData(rows("c", "c"), tokenizer, 32, labels)
    assert data.labels is labels
    assert data.targets.tolist() == [2, 2]
    with pytest.raises(
        DataError, match=r"f.jsonl, row 2, column 'label': 'd' is not one of .* a, b"
    ):
        ClassificationData(rows("c", "d"), tokenizer, 32, labels)
    with pytest.raises(ValueError, match="drop label_names"):
        ClassificationData(rows("c"), tokenizer, 32, labels, label_names=["c", "d"])


@pytest.mark.parametrize("labels", [["b", "a"], [["x"], ["y", "x"]], [0.5, 1.5], [[1.0, 2.0]]])
def test_labels_are_restored_from_a_models_configuration(
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
        (
            [3, 1, 2],
            r"got 1 to 3 without 0; remedy: data.label_names=\[1, 2, 3\] if they are names, "
            r"data.label_names=\{1: NAME, …\} to name them, or data.problem_type=regression",
        ),
        ([-1, 0], "class numbers must be 0 to n without a gap, got -1 to 0; remedy"),
        (["a", "a"], "all rows have the label 'a'"),
        ([[], []], "label names must be one or more"),
        ([0.5, float("nan")], "row 2, column 'label': must be a finite number, got nan"),
        ([[0.5, 1.5], [0.5]], r"row 2, column 'label': must be 2 numbers, got \[0.5\]"),
    ],
)
def test_an_invalid_label_is_named(
    labels: list[Any], message: str, tokenizer: GPTJTokenizer
) -> None:
    with pytest.raises(DataError, match=message):
        ClassificationData(rows(*labels), tokenizer, 32)


def test_an_empty_text_is_named(tokenizer: GPTJTokenizer) -> None:
    bad = Row({"text": "", "label": "a"}, "f.jsonl", 4)
    with pytest.raises(DataError, match=r"f.jsonl, row 4, column 'text': is empty"):
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
def test_the_model_takes_a_batch_and_ignores_padding(
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
        read_rows(str(shared_data / "sst2_dev.jsonl"), TASKS["classification"].row_kinds[0]),
        tokenizer,
        64,
    )
    assert data.labels.names == ("negative", "positive")
    assert 0.4 < data.targets.mean() < 0.6


@pytest.mark.parametrize(
    ("labels", "problem_type", "names", "targets"),
    [
        (["1", "0", "2"], SINGLE, ("LABEL_0", "LABEL_1", "LABEL_2"), [1, 0, 2]),
        (["0", "1", "unknown"], SINGLE, ("0", "1", "unknown"), [0, 1, 2]),
        (["002", "001"], SINGLE, ("001", "002"), [1, 0]),
        (["10:30", "09:15"], SINGLE, ("09:15", "10:30"), [1, 0]),
        (["2024-01-31", "2023-01-31"], SINGLE, ("2023-01-31", "2024-01-31"), [1, 0]),
        (["true", "false"], SINGLE, ("false", "true"), [1, 0]),
        (["+1", "-1"], SINGLE, ("+1", "-1"), [0, 1]),
        (["9" * 5000, "1"], REGRESSION, (), "must be a finite number"),
        (["0.5", "2", "-1.5e1"], REGRESSION, ("LABEL_0",), [0.5, 2.0, -15.0]),
        (["[0.5, 1]", "[2, 3]"], REGRESSION, ("LABEL_0", "LABEL_1"), [[0.5, 1.0], [2.0, 3.0]]),
        (['["b"]', "[]", '["a", "b"]'], MULTI, ("a", "b"), [[0, 1], [0, 0], [1, 1]]),
        (["[0, 1]", "[1, 1]"], MULTI, ("LABEL_0", "LABEL_1"), [[0, 1], [1, 1]]),
        (["[0, 1]", "['a']"], MULTI, (), r"row 2, column 'label': must be a list in JSON, such as"),
        (["a", ""], SINGLE, (), "row 2, column 'label': is empty"),
    ],
)
def test_the_type_of_text_cells_is_inferred_from_all_of_them(
    labels: list[str],
    problem_type: str,
    names: tuple[str, ...],
    targets: Any,
    tokenizer: GPTJTokenizer,
) -> None:
    if isinstance(targets, str):
        with pytest.raises(DataError, match=targets):
            ClassificationData(cells(*labels), tokenizer, 32)
        return
    data = ClassificationData(cells(*labels), tokenizer, 32)
    assert data.labels == LabelSet(names, problem_type)
    assert data.targets.tolist() == targets


MEASURED = [f"{number / 7:.2f}" for number in range(200)]


@pytest.mark.parametrize("odd", ["N/A", "nan", "-", "high", ".57", "+0.13", "0,57", "[1.5]"])
@pytest.mark.parametrize("place", [0, 120, 200])
def test_one_odd_cell_does_not_make_measured_values_names(
    odd: str, place: int, tokenizer: GPTJTokenizer
) -> None:
    labels = [*MEASURED[:place], odd, *MEASURED[place:]]
    message = (
        rf"row {place + 1}, column 'label': is '{re.escape(odd)}',.* most of the 201 different "
        r"labels are numbers, such as 0.\d\d; remedy: "
    )
    skip = "data.problem_type=regression .*with data.bad_rows=skip .*"
    message += ("write " if "," in odd else skip) + ".*data.problem_type=single_label"
    with pytest.raises(DataError, match=message):
        ClassificationData(cells(*labels), tokenizer, 32)
    named = ClassificationData(cells(*labels), tokenizer, 32, problem_type=SINGLE)
    assert len(named.labels.names) == 201


@pytest.mark.parametrize("odd", ["N/A", ".5", "+1", "007"])
def test_whole_numbers_count_beside_fractions(odd: str, tokenizer: GPTJTokenizer) -> None:
    stars = ["0.5", "1", "1.5", "2", "2.5", "3", "3.5", "4", "4.5", "5"]
    for numbers in (stars, ["1", "2", "3", "0.5"]):
        with pytest.raises(DataError, match=re.escape(repr(odd)) + ".*, such as 0.5; remedy"):
            ClassificationData(cells(*numbers * 3, odd, odd), tokenizer, 32)
        data = ClassificationData(cells(*numbers, odd), tokenizer, 32, problem_type=SINGLE)
        assert data.labels.names == tuple(sorted([*numbers, odd]))


@pytest.mark.parametrize("form", ["{:+.2f}", "{:.2f}"])
def test_numbers_that_are_all_written_otherwise_are_not_names_either(
    form: str, tokenizer: GPTJTokenizer
) -> None:
    texts = [form.format(number / 100).replace("0.", ".") for number in range(1, 40)]
    with pytest.raises(DataError, match=r"row 1, .* which is not written as 0.5 is, but most"):
        ClassificationData(cells(*texts), tokenizer, 32)
    data = ClassificationData(cells(*texts), tokenizer, 32, problem_type=REGRESSION)
    assert data.targets.tolist() == pytest.approx([number / 100 for number in range(1, 40)])


@pytest.mark.parametrize(
    ("labels", "odd", "such"),
    [
        (["0,5", "1,5", "2,5"], "0,5", ""),
        (["N/A", "0,5", "1,5"], "0,5", ""),
        (["1,000", "2,500", "500"], "1,000", ""),
        (["0.5", "1.5", "2.5", "N/A", "3,5"], "3,5", ", such as 0.5"),
        (["0.5", "999.5", "7", "1,000.50", "1,000,000"], "1,000.50", ", such as 0.5"),
    ],
)
def test_numbers_with_commas_are_to_be_written_otherwise(
    labels: list[str], odd: str, such: str, tokenizer: GPTJTokenizer
) -> None:
    """Not to be left out, which would leave few rows, or none."""
    points = r"remedy: write numbers with a decimal point and without commas, as 1\.5 or 1000, or "
    with pytest.raises(DataError, match=rf"is '{odd}'.* labels are numbers{such}; {points}") as no:
        ClassificationData(cells(*labels), tokenizer, 32)
    assert "bad_rows" not in str(no.value) and str(no.value).endswith(f"{SINGLE} for names")
    with pytest.raises(DataError, match=points):
        ClassificationData(cells(odd), tokenizer, 32, problem_type=REGRESSION)
    with pytest.raises(DataError, match=points):
        check_label(cells(odd)[0], None, REGRESSION)
    data = ClassificationData(cells(*labels), tokenizer, 32, problem_type=SINGLE)
    assert data.labels.names == tuple(sorted(labels))


@pytest.mark.parametrize(
    "labels",
    [
        ["1", "2", "3", "4", "other"],
        ["3.5", "4", "3.5-turbo", "4-turbo"],
        ["3.5", "3.5-turbo"],
        ["0.5", "high", "low"],
        ["1", "2", "1,2"],
        ["1.0.1", "1.2.0", "1.2"],
        ["10:30", "9.5", "x"],
        ["2024-01-31", "2023-01-31", "0.5"],
        ["0.5", *["N/A"] * 3, *["0.5"] * 9, "low"],  # each label counts once
    ],
)
def test_names_with_numbers_among_them_stay_names(
    labels: list[str], tokenizer: GPTJTokenizer
) -> None:
    data = ClassificationData(cells(*labels), tokenizer, 32)
    assert data.labels == LabelSet(tuple(sorted(set(labels))), SINGLE)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "label", [NAN, INFINITY, -INFINITY, 1e300, 10**400, [0.5, NAN], [1e39], ["a", NAN]]
)
@pytest.mark.parametrize("problem_type", [None, SINGLE, MULTI, REGRESSION])
def test_a_number_that_is_not_finite_is_a_bad_row(label: Any, problem_type: str | None) -> None:
    (row,) = rows(label)
    with pytest.raises(DataError, match=r"must be a finite number, got .*data.bad_rows=skip"):
        check_label(row, None, problem_type)


@pytest.mark.parametrize("label", ["a", "nan", "N/A", "0,5", "1e300", "[0.5, NaN]", '["a"]', "[]"])
@pytest.mark.parametrize("form", [rows, cells])
def test_what_is_no_number_is_a_bad_row_of_a_regression(form: Any, label: str) -> None:
    (row,) = form(label)
    with pytest.raises(DataError, match=r"must be a finite number, got .*data.bad_rows=skip"):
        check_label(row, None, REGRESSION)
    if "NaN" not in label or form is rows:
        check_label(row)
    for number in ("+0.5", ".5", "5.", "007", " 1e-3 ", "[0.5, 2]"):
        check_label(cells(number)[0], None, REGRESSION)


def test_settings_override_inferred_label_types(tokenizer: GPTJTokenizer) -> None:
    data = ClassificationData(cells("1", "5"), tokenizer, 32, problem_type=REGRESSION)
    assert data.targets.tolist() == [1.0, 5.0]
    data = ClassificationData(cells("1.5", "0.5"), tokenizer, 32, problem_type=SINGLE)
    assert data.labels.names == ("0.5", "1.5")
    data = ClassificationData(cells("1.5", "0.5"), tokenizer, 32, label_names=["1.5", "0.5"])
    assert data.targets.tolist() == [0, 1]
    assert data.labels.problem_type == SINGLE
    data = ClassificationData(cells("2.0", "1.0"), tokenizer, 32, label_names=["1", "2"])
    assert data.targets.tolist() == [1, 0]
    assert ClassificationData(cells("2.0"), tokenizer, 32, data.labels).targets.tolist() == [1]
    with pytest.raises(DataError, match="row 2, column 'label': must be a finite number, got 'x'"):
        ClassificationData(cells("1", "x"), tokenizer, 32, problem_type=REGRESSION)
    with pytest.raises(DataError, match="row 1, column 'label': must be a list of names or of 0"):
        ClassificationData(cells("a", "b"), tokenizer, 32, problem_type=MULTI)


def test_labels_of_digits_are_names_in_every_file(tmp_path: Path, tokenizer: GPTJTokenizer) -> None:
    """A file that happens to have only digits is read like the one that has a word as well."""
    (tmp_path / "train.csv").write_text("text,label\na,1\nb,2\nc,unknown\n")
    (tmp_path / "eval.csv").write_text("text,label\na,1\nb,2\n")
    (tmp_path / "eval.jsonl").write_text(
        '{"text": "a", "label": 1}\n{"text": "b", "label": "2"}\n{"text": "b", "label": 2.0}\n'
    )

    def read(name: str, labels: LabelSet | None = None) -> ClassificationData:
        found = read_rows(str(tmp_path / name), TASKS["classification"].row_kinds[0])
        return ClassificationData(found, tokenizer, 32, labels)

    train = read("train.csv")
    assert train.labels.names == ("1", "2", "unknown")
    assert read("eval.csv", train.labels).targets.tolist() == [0, 1]
    assert read("eval.jsonl", train.labels).targets.tolist() == [0, 1, 1]
    # A checkpoint has only the names.
    config = GPTJConfig(id2label=train.labels.id2label, problem_type=SINGLE)
    assert read("eval.csv", LabelSet.of(config)).targets.tolist() == [0, 1]
    assert train.summary() == (
        "3 rows, single_label_classification, labels by name: 1: 1, 2: 1, unknown: 1"
    )


@pytest.mark.parametrize("form", [rows, cells])
def test_names_that_are_digits_are_matched_by_name(form: Any, tokenizer: GPTJTokenizer) -> None:
    labels = [str(n) if form is cells else n for n in (1, 2, 1, 3)]
    data = ClassificationData(form(*labels), tokenizer, 32, label_names=["1", "2", "3"])
    assert data.targets.tolist() == [0, 1, 0, 2]
    assert data.labels == LabelSet(("1", "2", "3"), SINGLE)
    data = ClassificationData(form(*labels), tokenizer, 32, label_names=["3", "2", "1"])
    assert data.targets.tolist() == [2, 1, 2, 0]
    zero = "0" if form is cells else 0
    with pytest.raises(
        DataError, match=r"row 2, column 'label': '?0'? is not one of the labels 1, "
    ):
        ClassificationData(form(labels[0], zero), tokenizer, 32, label_names=["1", "2"])


@pytest.mark.parametrize("form", [rows, cells])
def test_class_numbers_from_one_can_be_mapped(form: Any, tokenizer: GPTJTokenizer) -> None:
    """AG News: 1 to 4, whose names stand in a file beside it."""
    names = ["World", "Sports", "Business", "Sci/Tech"]
    labels = [str(n) if form is cells else n for n in (3, 1, 2, 4)]
    with pytest.raises(DataError, match=r"got 1 to 4 without 0; remedy: data.label_names=\[1, 2, "):
        ClassificationData(form(*labels), tokenizer, 32)
    given = {str(number): name for number, name in enumerate(names, 1)}
    data = ClassificationData(form(*labels), tokenizer, 32, label_names=given)
    assert data.labels == LabelSet(tuple(names), SINGLE)
    assert data.targets.tolist() == [2, 0, 1, 3]
    assert "labels as data.label_names has them: World: 1, Sports: 1, " in data.summary()
    held_out = ClassificationData(form(labels[0], labels[0]), tokenizer, 32, data.labels)
    assert held_out.targets.tolist() == [2, 2]
    # Silently shifted, if the last class is not there.
    for few in (labels, labels[:3]):
        with pytest.raises(DataError) as error:
            ClassificationData(form(*few), tokenizer, 32, label_names=names)
        assert "{1: World, 2: Sports, 3: Business, 4: Sci/Tech}" in str(error.value)
    trained = LabelSet.of(GPTJConfig(id2label=dict(enumerate(names)), problem_type=SINGLE))
    for part in (labels[:1], labels[1:3]):  # indices, too, if the first class is not there
        with pytest.raises(DataError) as error:
            ClassificationData(form(*part), tokenizer, 32, trained)
        assert "from 0 or from 1; remedy: say which, data.label_names={0: World" in str(error.value)
        assert " or data.label_names={1: World, 2: Sports, 3: Bus" in str(error.value)
    with pytest.raises(
        DataError, match=r"numbers count from 0; remedy: .*data.label_names={1: World, 2: "
    ):
        ClassificationData(form(*labels[1:]), tokenizer, 32, trained)
    held_out = ClassificationData(form(*labels[1:3]), tokenizer, 32, trained.translated(given))
    assert held_out.targets.tolist() == [0, 1]
    with pytest.raises(ValueError, match="translates to 'Weather', which is not one of the labels"):
        trained.translated({"1": "Weather"})


@pytest.mark.parametrize("form", [rows, cells])
def test_a_row_with_a_number_beyond_the_names_says_how_to_map_it(form: Any) -> None:
    """As it is read alone, before all labels are known."""
    number = "4" if form is cells else 4
    (row,) = form(number)
    names = ["World", "Sports", "Business", "Sci/Tech"]
    with pytest.raises(
        DataError,
        match=r"count from 0; remedy: .*label_names={1: World, 2: Sports, 3: Business, 4: Sci/Tech",
    ):
        check_label(row, names)
    check_label(row, [*names, "Weather"])
    with pytest.raises(DataError, match=r"Sci/Tech$"):
        check_label(row, dict(zip("1235", names, strict=True)))
    with pytest.raises(DataError, match=r"one of the labels 1, 2$"):
        check_label(row, ["1", "2"])


def test_evaluation_labels_are_read_like_the_training_data(tokenizer: GPTJTokenizer) -> None:
    numbered = ClassificationData(rows(0, 1), tokenizer, 32, label_names=["low", "high"]).labels
    assert ClassificationData(rows(1, 1), tokenizer, 32, numbered).targets.tolist() == [1, 1]
    named = ClassificationData(rows("low", "high"), tokenizer, 32).labels
    with pytest.raises(DataError, match="0 is not one of the labels high, low"):
        ClassificationData(rows(0, 1), tokenizer, 32, named)
    nameless = ClassificationData(rows(0, 1), tokenizer, 32).labels
    for labels in (nameless, LabelSet(nameless.names, SINGLE)):
        assert ClassificationData(rows(1), tokenizer, 32, labels).targets.tolist() == [1]
        assert ClassificationData(cells("LABEL_1"), tokenizer, 32, labels).targets.tolist() == [1]
    ids = ClassificationData(rows([0], [1], [0, 1], []), tokenizer, 32).labels
    assert ClassificationData(rows([0, 1]), tokenizer, 32, ids).targets.tolist() == [[1, 1]]
    hot = ClassificationData(rows([0, 1], [1, 0]), tokenizer, 32).labels
    assert ClassificationData(rows([0, 1]), tokenizer, 32, hot).targets.tolist() == [[0, 1]]
    with pytest.raises(DataError, match=r"row 2.*must be a 0 or 1 for each of 2 labels, got \[1\]"):
        ClassificationData(rows([0, 1], [1]), tokenizer, 32, hot)


@pytest.mark.parametrize("form", [rows, cells])
@pytest.mark.parametrize(
    ("labels", "given", "part", "targets"),
    [
        ([0, 1], {"label_names": ["neg", "pos"]}, [1, 1], [1, 1]),
        ([0, 1, 2], {"label_names": ["a", "b", "c"]}, [2, 1], [2, 1]),
        ([0, 1, 2], {}, [1, 2], [1, 2]),
        ([1, 2], {"label_names": {"1": "neg", "2": "pos"}}, [1, 1], [0, 0]),
        (["n", "p"], {"label_names": {"n": "neg", "p": "pos"}}, ["p"], [1]),
        ([1, 2, 3], {"label_names": ["1", "2", "3"]}, [2, 1], [1, 0]),
        ([[0], [1], [0, 1], []], {}, [[0, 1]], [[1, 1]]),
        ([[0], [1, 2]], {"label_names": ["a", "b", "c"]}, [[1], [2]], [[0, 1, 0], [0, 0, 1]]),
        ([[0], [1, 2]], {"label_names": ["a", "b", "c"]}, [[0, 0, 1]], [[0, 0, 1]]),
        ([[0, 1], [1, 1]], {}, [[0, 1]], [[0, 1]]),
    ],
)
def test_part_of_the_labels_is_read_as_in_the_models_training(
    form: Any,
    labels: list[Any],
    given: dict[str, Any],
    part: list[Any],
    targets: list[Any],
    tokenizer: GPTJTokenizer,
) -> None:
    """By what training.json has; names are known to all models."""

    def formed(values: list[Any]) -> list[Row]:
        texts = [each if isinstance(each, str) else json.dumps(each) for each in values]
        return form(*(texts if form is cells else values))

    found = ClassificationData(formed(labels), tokenizer, 32, **given).labels
    record = json.loads(json.dumps(found.record()))
    config = GPTJConfig(id2label=found.id2label, problem_type=found.problem_type)
    trained = LabelSet.of(config, record)
    data = ClassificationData(formed(part), tokenizer, 32, trained)
    assert data.targets.tolist() == targets
    assert LabelSet.of(config, data.labels.record()).names == found.names
    names = [[name] for name in found.names]
    if found.problem_type == SINGLE:
        named = ClassificationData(rows(*found.names), tokenizer, 32, trained)
        assert named.targets.tolist() == list(range(len(names)))
    else:
        named = ClassificationData(rows(*names), tokenizer, 32, trained)
        assert named.targets.tolist() == torch.eye(len(names)).tolist()


@pytest.mark.parametrize("form", [rows, cells])
def test_names_written_otherwise_in_training_leave_class_numbers_readable(
    form: Any, tokenizer: GPTJTokenizer
) -> None:
    names = {"neg": "negative", "pos": "positive"}
    found = ClassificationData(form("neg", "pos"), tokenizer, 32, label_names=names).labels
    config = GPTJConfig(id2label=found.id2label, problem_type=SINGLE)
    trained = LabelSet.of(config, found.record())
    assert trained.may_count
    numbers = [0, 1, 1] if form is rows else ["0", "1", "1"]
    for values in (numbers, ["neg", "pos", "pos"], ["negative", "positive", "positive"]):
        data = ClassificationData(form(*values), tokenizer, 32, trained)
        assert data.targets.tolist() == [0, 1, 1]
        how = "by class number" if values is numbers else "as in the model's training"
        how = "by name" if values[0] == "negative" else how
        again = ClassificationData(form(*values), tokenizer, 32, data.labels)
        assert f"labels {how}: " in data.summary() and again.summary() == data.summary()
    with pytest.raises(DataError, match=r"2 is not one of the labels negative, positive"):
        ClassificationData(form(*numbers, numbers[0].__class__(2)), tokenizer, 32, trained)


def test_a_models_training_does_not_keep_other_data_from_being_named(
    tokenizer: GPTJTokenizer,
) -> None:
    config = GPTJConfig(id2label={0: "neg", 1: "pos"}, problem_type=SINGLE)
    mapped = LabelSet.of(config, {"written": {"neg": 0, "pos": 1, "1": 0, "2": 1}})
    data = ClassificationData(rows(1, 2), tokenizer, 32, mapped)
    assert "labels as in the model's training: neg: 1, pos: 1" in data.summary()
    given = ClassificationData(rows(1, 2), tokenizer, 32, label_names={"1": "neg", "2": "pos"})
    assert "labels as data.label_names has them: neg: 1, pos: 1" in given.summary()
    with pytest.raises(DataError, match=r"0 is not one of .*data.label_names={0: neg, 1: pos}"):
        ClassificationData(rows(0, 1), tokenizer, 32, mapped)
    named = mapped.translated({"0": "neg", "1": "pos"})
    assert ClassificationData(rows(0, 1), tokenizer, 32, named).targets.tolist() == [0, 1]
    words = LabelSet.of(config, {"written": {"neg": 0, "pos": 1, "false": 0, "true": 1}})
    with pytest.raises(DataError, match=r"1 is not one of the labels neg, pos"):
        ClassificationData(rows(1, 0), tokenizer, 32, words)
    by_name = LabelSet.of(config, {"written": {"neg": 0, "pos": 1}})
    assert ClassificationData(rows(0, 1), tokenizer, 32, by_name).targets.tolist() == [0, 1]
    other = LabelSet.of(config, {"written": {"0": 0, "1": 1, "2": 2}})  # of another head
    assert other.trained is None
    assert ClassificationData(rows(0.5, 1), tokenizer, 32).labels.record() is None


@pytest.mark.parametrize("form", [rows, cells])
@pytest.mark.parametrize(
    "names", [["neg", "pos"], {"0": "neg", "1": "pos"}, {"1": "pos", "0": "neg"}]
)
def test_whole_numbers_with_a_point_are_class_numbers_of_names(
    form: Any, names: Any, tokenizer: GPTJTokenizer
) -> None:
    """As pandas writes a column of whole numbers with a gap."""
    values = ("0.0", "1.0", "1.0") if form is cells else (0.0, 1.0, 1.0)
    labelled = form(*values)
    for row in labelled:
        check_label(row, names)
    found = ClassificationData(labelled, tokenizer, 32, label_names=names)
    assert found.labels.problem_type == SINGLE
    assert [found.labels.names[each] for each in found.targets] == ["neg", "pos", "pos"]
    with pytest.raises(DataError, match=r"2.0'? is not one of the labels"):
        check_label(form("2.0" if form is cells else 2.0)[0], names)


@pytest.mark.parametrize("form", [rows, cells])
def test_a_name_for_a_value_to_predict_is_none_of_the_values(
    form: Any, tokenizer: GPTJTokenizer
) -> None:
    measured = form("0.5", "1.5") if form is cells else form(0.5, 1.5)
    for row in measured:
        check_label(row, ["score"])
    found = ClassificationData(measured, tokenizer, 32, label_names=["score"])
    assert (found.labels.names, found.targets.tolist()) == (("score",), [0.5, 1.5])


NUMBERED = ("LABEL_0", "LABEL_1", "LABEL_2")
NUMBERS_AND_NAMES = {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


@pytest.mark.parametrize(
    ("written", "mapping", "names"),
    [
        (None, {"0": "a", "1": "b", "2": "c"}, ("a", "b", "c")),
        (None, {"2": "c", "0": "a", "1": "b"}, ("a", "b", "c")),
        (None, {"LABEL_1": "b", "LABEL_2": "c", "LABEL_0": "a"}, ("a", "b", "c")),
        (None, {"1": "a", "2": "b", "3": "c"}, ("a", "b", "c")),  # counted from 1
        (None, {"x": "a", "y": "b", "z": "c"}, ("a", "b", "c")),
        (None, {"x": "LABEL_2", "y": "LABEL_1", "z": "LABEL_0"}, NUMBERED),
        ({"1": 0, "2": 1, "3": 2}, {"3": "LABEL_2", "2": "LABEL_1", "1": "LABEL_0"}, NUMBERED),
        ({"1": 0, "2": 1, "3": 2}, {"3": "c", "2": "b", "1": "a"}, ("a", "b", "c")),
        ({"1": 0, "2": 1, "3": 2}, {"1": "a", "2": "b", "3": "c"}, ("a", "b", "c")),
        ({"1": 0, "2": 1, "3": 2}, {"x": "a", "y": "b", "z": "c"}, ("a", "b", "c")),
        ({"x": 2, "y": 1, "z": 0}, {"x": "a", "y": "b", "z": "c"}, ("c", "b", "a")),
        ({"1": 0, "2": 1, "3": 2}, {"0": "a", "1": "b", "2": "c"}, None),
        (None, {"0": "a", "1": "b", "2": "c", "LABEL_0": "b"}, None),
    ],
)
def test_a_mapping_names_the_outputs_that_its_keys_stand_for(
    written: dict[str, int] | None, mapping: dict[str, str], names: tuple[str, ...] | None
) -> None:
    """Whatever its order: the head is trained, and would have its names exchanged."""
    config = GPTJConfig(
        num_labels=3,
        problem_type=SINGLE,
        architectures=[GPTJForSequenceClassification.__name__],
    )
    record = None if written is None else {"written": {**NUMBERS_AND_NAMES, **written}}
    task, options = TASKS["classification"], DataSettings(label_names=mapping)
    if names is None:
        with pytest.raises(SettingsError, match="does not name each output of m once"):
            task.known_labels(config, "m", options, record)
        return
    found = task.known_labels(config, "m", options, record)
    assert found is not None and found.names == names


@pytest.mark.parametrize("form", [rows, cells])
def test_numbers_without_a_0_are_not_silently_indices_of_a_model_without_names(
    form: Any, tokenizer: GPTJTokenizer
) -> None:
    """Shifted by one if they count from 1, and without the last class all would be in range."""
    trained = LabelSet.of(GPTJConfig(num_labels=4, problem_type=SINGLE))
    one_two_three = form(*((str(n) for n in (3, 1, 2)) if form is cells else (3, 1, 2)))
    with pytest.raises(DataError) as error:
        ClassificationData(one_two_three, tokenizer, 32, trained)
    for remedy in (
        "data.label_names={0: LABEL_0, 1: LABEL_1, 2: LABEL_2, 3: LABEL_3} or ",
        "data.label_names={1: LABEL_0, 2: LABEL_1, 3: LABEL_2, 4: LABEL_3}",
    ):
        assert "whole numbers from 1 to 3, without 0" in str(error.value)
        assert remedy in str(error.value)
    for first, targets in ((0, [3, 1, 2]), (1, [2, 0, 1])):
        written = trained.translated({str(n + first): f"LABEL_{n}" for n in range(4)})
        data = ClassificationData(one_two_three, tokenizer, 32, written)
        assert data.targets.tolist() == targets


def test_lists_of_numbers_without_a_0_are_not_silently_indices_either(
    tokenizer: GPTJTokenizer,
) -> None:
    trained = LabelSet.of(GPTJConfig(num_labels=4, problem_type=MULTI))
    with pytest.raises(DataError, match="whole numbers from 1 to 3, without 0"):
        ClassificationData(rows([1, 2], [3]), tokenizer, 32, trained)


def test_names_that_a_model_without_names_does_not_know_have_a_remedy(
    tokenizer: GPTJTokenizer,
) -> None:
    trained = LabelSet.of(GPTJConfig(num_labels=2, problem_type=SINGLE))
    with pytest.raises(
        DataError,
        match=r"'good' is not one of the labels LABEL_0, LABEL_1.*labels \(bad, good\) stand for, "
        r"as in data.label_names={NAME: LABEL_0, …}",
    ):
        ClassificationData(rows("good", "bad"), tokenizer, 32, trained)
    with pytest.raises(DataError, match=r"labels stand for, as in data.label_names={NAME: "):
        check_label(rows("good")[0], trained.names)
    written = trained.translated({"bad": "LABEL_0", "good": "LABEL_1"})
    data = ClassificationData(rows("good", "bad"), tokenizer, 32, written)
    assert data.targets.tolist() == [1, 0]


@pytest.mark.parametrize("problem_type", [None, MULTI])
@pytest.mark.parametrize("label_names", [None, ["a", "b", "c"], ["0", "1", "2"]])
@pytest.mark.parametrize("kind", [int, float, bool])
def test_lists_of_a_0_or_1_for_each_label_are_multi_hot(
    kind: type, label_names: list[str] | None, problem_type: str | None, tokenizer: GPTJTokenizer
) -> None:
    labels = [[0, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]]
    data = ClassificationData(
        rows(*([kind(value) for value in each] for each in labels)),
        tokenizer,
        32,
        label_names=label_names,
        problem_type=problem_type,
    )
    assert data.labels == LabelSet(tuple(label_names or NUMBERED), MULTI)
    assert data.targets.tolist() == labels
    assert data.targets.dtype == "float32"
    assert data.summary().endswith(
        f"labels from lists of a 0 or 1 for each: {data.labels.names[0]}: 2, "
        f"{data.labels.names[1]}: 2, {data.labels.names[2]}: 1"
    )


@pytest.mark.parametrize(
    ("labels", "given", "names", "targets"),
    [
        ([[0, 2], [1]], {}, NUMBERED, [[1, 0, 1], [0, 1, 0]]),
        ([[0, 2], [1, 0]], {"problem_type": MULTI}, NUMBERED, [[1, 0, 1], [1, 1, 0]]),
        ([[0], [1]], {"problem_type": MULTI, "label_names": ["a", "b"]}, ("a", "b"),
         [[1, 0], [0, 1]]),
        ([[0], [1]], {"problem_type": MULTI, "label_names": ["a"]}, ("a",), [[0], [1]]),
        ([[1, 2], [3, 1]], {"label_names": ["1", "2", "3"]}, ("1", "2", "3"),
         [[1, 1, 0], [1, 0, 1]]),
        ([[1, 2], []], {"label_names": {"1": "a", "2": "b"}}, ("a", "b"), [[1, 1], [0, 0]]),
        ([[0, 1], [1, 0]], {"label_names": ["a", "b", "c"], "problem_type": MULTI},
         ("a", "b", "c"), [[1, 1, 0], [1, 1, 0]]),
    ],
)  # fmt: skip
def test_other_lists_of_numbers_are_class_numbers_or_names(
    labels: Any, given: Any, names: Any, targets: Any, tokenizer: GPTJTokenizer
) -> None:
    data = ClassificationData(rows(*labels), tokenizer, 32, **given)
    assert data.labels == LabelSet(names, MULTI)
    assert data.targets.tolist() == targets


@pytest.mark.parametrize(
    ("labels", "given", "message"),
    [
        ([[0, 2], [1, 3]], {}, "lists of 2 whole numbers in all rows, such as .0, 2., can be class "
         "numbers or values to predict; remedy: data.problem_type=multi_label_classification or "
         "data.problem_type=regression"),
        ([[0], [1]], {}, "can be class numbers or values to predict"),
        ([[0], [1]], {"problem_type": MULTI}, "one label, off or on, or the class numbers of two; "
         r"remedy: data.label_names=\[NAME\] or data.label_names=\[NAME, NAME\]"),
        ([[0, 1, 0], [1, 0]], {"problem_type": MULTI}, r"row 1.*\[0, 1, 0\] has 0 twice: it is "
         "neither a list of labels nor a list of a 0 or 1 for each of 2"),
        ([[0, 1, 0]], {"problem_type": MULTI, "label_names": ["a", "b"]}, "has 0 twice"),
        ([[0.5, 1]], {"problem_type": MULTI}, "0.5 is neither a name nor a class number"),
        ([["a"], [1]], {"problem_type": MULTI}, "'a' is neither a name nor a class number"),
        ([["a", "a"], ["b"]], {}, r"\['a', 'a'\] has 'a' twice"),
        ([0, 1], {"problem_type": MULTI}, "must be a list of names or of 0 and 1, got 0"),
        ([[0], [1]], {"problem_type": SINGLE}, r"row 1.*must be a name or a class number, got"),
        ([1e300], {"problem_type": REGRESSION}, "must be a finite number, got 1e"),
        ([10**400], {"problem_type": REGRESSION}, "must be a finite number, got 1000"),
        ([1.5], {"problem_type": REGRESSION, "label_names": {"a": "b"}}, "must be a list for a"),
    ],
)  # fmt: skip
def test_ambiguous_lists_are_refused(
    labels: Any, given: Any, message: str, tokenizer: GPTJTokenizer
) -> None:
    with pytest.raises(DataError, match=message):
        ClassificationData(rows(*labels), tokenizer, 32, **given)


SCALARS = st.one_of(
    st.sampled_from(["0", "1", "2", "a", "b", "001", "1.0", "1.5", "true", "[0, 1]", '["a"]', " "]),
    st.integers(-1, 3),
    st.sampled_from([0.0, 1.0, 2.0, 0.5]),
    st.booleans(),
    st.sampled_from([None, 10**400, float("nan"), 1e300]),
)
LABELS = st.one_of(
    st.lists(st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), min_size=1, max_size=4),
    *(
        st.lists(each, min_size=1, max_size=4)
        for kind in (st.sampled_from(["a", "b", "1"]), st.integers(0, 3), st.sampled_from([0, 1]))
        for each in (kind, st.lists(kind, max_size=3), st.lists(kind, min_size=2, max_size=2))
    ),
)


@pytest.mark.slow
def test_a_row_is_read_the_same_in_any_file() -> None:
    """Alone in a file as among the training rows, unless those are refused; both must happen."""
    read = refused = 0

    @settings(max_examples=500, derandomize=True, database=None)
    @given(
        labels=LABELS,
        typed=st.booleans(),
        names=st.sampled_from([None, ["a", "b"], ["0", "1", "2"], {"1": "a", "2": "b"}]),
        problem_type=st.sampled_from([None, SINGLE, MULTI, REGRESSION]),
    )
    def check(labels: list[Any], typed: bool, names: Any, problem_type: str | None) -> None:
        nonlocal read, refused
        found = rows(*(each if typed else str(each) for each in labels), typed=typed)
        try:
            train = read_labels(found, None, names, problem_type)
        except DataError as error:
            assert "column 'label'" in str(error) or "data.label_names" in str(error)
            refused += 1
            return
        read += 1
        for row, target in zip(found, train.targets, strict=True):
            alone = read_labels([row], train.labels).targets
            assert alone.tolist() == [target.tolist()]

    check()
    assert read > 100 and refused > 100, (read, refused)  # 151 and 349 when this was written


class Text(str):
    """One that weak references can be made to."""


def test_no_text_is_kept_with_a_label(tokenizer: GPTJTokenizer) -> None:
    texts: list[weakref.ref[Text]] = []

    def many() -> Iterator[Row]:
        for number in range(2 * TOKENIZED_AT_ONCE + 1):
            text = Text(f"good {number}")
            texts.append(weakref.ref(text))
            yield Row({"text": text, "label": number % 2}, "f.jsonl", number + 1)
        assert texts[0]() is None  # it goes with the texts that were tokenized with it

    assert len(ClassificationData(many(), tokenizer, 5)) == len(texts)


def test_a_summary_counts_the_labels(tokenizer: GPTJTokenizer) -> None:
    data = ClassificationData(rows("b", "a", "b"), tokenizer, 32)
    assert data.summary() == ("3 rows, single_label_classification, labels by name: a: 1, b: 2")
    data = ClassificationData(rows(0, 1), tokenizer, 32, label_names=["low", "high"])
    assert data.summary().endswith("labels by class number: low: 1, high: 1")
    data = ClassificationData(rows(0.5, 1.5), tokenizer, 32)
    assert data.summary() == "2 rows, regression, labels as numbers from 0.5 to 1.5"
    data = ClassificationData(rows(*map(str, range(30))), tokenizer, 32)
    assert data.summary().endswith("26: 1, and 10 more")


def test_pairs_are_read_if_their_column_exists(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    kinds = TASKS["classification"].row_kinds
    file = str(tmp_path / "pairs.csv")
    Path(file).write_text("text,hypothesis,label\ngood and fine,bad,no\nfine,good,yes\n")
    assert find_columns(file, kinds) == ("text", "label")
    names = {"text_pair": "hypothesis"}
    columns = find_columns(file, kinds, names)
    assert columns == ("text", "text_pair", "label")
    data = ClassificationData(read_rows(file, columns, names), tokenizer, 5)
    expected = tokenizer(
        ["good and fine", "fine"], ["bad", "good"], truncation="longest_first", max_length=5
    )
    assert [data[i].input_ids.tolist() for i in range(2)] == expected["input_ids"]
    assert tokenizer.decode(expected["input_ids"][1]) == "finegood"

    Path(file).write_text("text,text_pair,label\ngood,,no\n")
    columns = find_columns(file, kinds)
    assert columns == ("text", "text_pair", "label")
    with pytest.raises(DataError, match="row 1, column 'text_pair': is empty"):
        ClassificationData(read_rows(file, columns), tokenizer, 5)

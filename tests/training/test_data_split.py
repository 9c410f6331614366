"""Holding out: two disjoint parts that make up the whole, the same ones each time."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from slow_cases import slow

from gptj import GPTJTokenizer
from gptj.data.preparing import Plan, prepare
from gptj.data.rows import DataError, Row
from gptj.data.split import LONG_TEXT, Split, split_rows
from gptj.training.dataset import node_data
from gptj.training.settings import SettingsError, read_settings
from gptj.training.tasks import Data
from gptj.training.tokenizer import prepare_tokenizer


def rows(texts: Sequence[str]) -> list[Row]:
    return [Row({"text": text}, "data", number) for number, text in enumerate(texts, 1)]


def parts(texts: Sequence[str], share: float, seed: int = 0) -> tuple[list[str], list[str]]:
    both = (
        [row.text("text") for row in split_rows(rows(texts), Split(share, seed, held, "text"))]
        for held in (False, True)
    )
    train, evaluation = both
    return train, evaluation


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.3, 0.5])
@pytest.mark.parametrize("seed", [0, 7])
def test_the_parts_partition_the_data(share: float, seed: int) -> None:
    texts = [str(number) for number in range(1000)]
    train, evaluation = parts(texts, share, seed)
    assert Counter(train + evaluation) == Counter(texts)
    assert train == sorted(train, key=int) and evaluation == sorted(evaluation, key=int)
    assert len(evaluation) == pytest.approx(1000 * share, rel=0.1)


def test_only_the_seed_determines_the_rows() -> None:
    texts = [str(number) for number in range(200)]
    assert parts(texts, 0.1, 1) == parts(texts, 0.1, 1)
    assert parts(texts, 0.1, 1) != parts(texts, 0.1, 2)


def test_periodic_data_is_held_out_evenly() -> None:
    """Every tenth row is of one kind: its share among those held out is its share of all."""
    texts = [f"{'a' if number % 10 == 0 else 'b'}{number}" for number in range(2000)]
    _, evaluation = parts(texts, 0.1)
    assert 5 < sum(text.startswith("a") for text in evaluation) < 40


def test_the_end_of_a_book_is_held_out() -> None:
    book = "".join(f"line {number}\n" for number in range(LONG_TEXT // 5))
    train, evaluation = parts([book], 0.1)
    assert train[0] + evaluation[0] == book
    assert train[0].endswith("\n") and len(evaluation[0]) == pytest.approx(len(book) / 10, rel=0.01)


@pytest.mark.parametrize(("held_out", "what"), [(True, "evaluation"), (False, "training")])
def test_too_few_rows_are_refused(held_out: bool, what: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "alone"}\n')
    tokenizer = GPTJTokenizer.train(["alone"], 270)
    seed = next(seed for seed in range(9) if not parts(["alone"], 0.5, seed)[held_out])
    split = Split(0.5, seed, held_out)
    plan = Plan.of(str(tmp_path / "rows.jsonl"), tokenizer, names={}, split=split)
    with pytest.raises(DataError, match=rf"split=0.5 of .*jsonl leaves no row for {what}"):
        prepare(plan, str(tmp_path / "prepared"), tokenizer)


def test_a_run_trains_on_one_part_and_evaluates_on_the_other(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    lines = [f"text number {number},{'ab'[number % 2]}" for number in range(200)]
    file.write_text("\n".join(["text,label", *lines]))
    words = [f"data.train={file}", "task=classification", f"storage={tmp_path}"]
    settings = read_settings([*words, "data.evaluation_split=0.1"])
    tokenizer = prepare_tokenizer(settings)
    data = node_data(settings, tokenizer, tmp_path)
    assert data.evaluation is not None
    assert (len(data.train), len(data.evaluation)) == (180, 20)
    assert data.fingerprints["train"] != data.fingerprints["evaluation"]


# The labels of 40 rows but one, which is the rare one; and the names of all.
RARE: dict[str, tuple[list[Any], Any, tuple[str, ...]]] = {
    "name": (["c0", "c1", "c2"], "rare", ("c0", "c1", "c2", "rare")),
    "middle number": ([0, 2, 3], 1, ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")),
    "highest number": ([0, 1, 2], 3, ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")),
    "digits and one name": (["0", "1", "2"], "other", ("0", "1", "2", "other")),
    "list of names": ([["a"], ["a", "b"]], ["zz"], ("a", "b", "zz")),
    "list of numbers": ([[0], [0, 1]], [2], ("LABEL_0", "LABEL_1", "LABEL_2")),
}


@pytest.mark.parametrize("form", ["jsonl", *slow(["csv"])])
@pytest.mark.parametrize("kind", ["name", *slow(sorted({*RARE} - {"name"}))])
def test_a_rare_label_may_be_in_either_part(kind: str, form: str, tmp_path: Path) -> None:
    """Whatever the seed: the parts are one data set, and have the same labels."""
    common, rare, names = RARE[kind]
    labels = [rare if number == 7 else common[number % len(common)] for number in range(40)]
    file = tmp_path / f"rows.{form}"
    if form == "csv":
        with file.open("w", newline="") as opened:
            texts = [each if isinstance(each, str) else json.dumps(each) for each in labels]
            rows = [(f"text {number}", text) for number, text in enumerate(texts)]
            csv.writer(opened).writerows([("text", "label"), *rows])
    else:
        fields = [{"text": f"text {number}", "label": each} for number, each in enumerate(labels)]
        file.write_text("".join(json.dumps(row) + "\n" for row in fields))
    tokenizer = GPTJTokenizer.train(["text 0123456789"], 270)
    held_out = set()
    for seed in range(8):
        words = [f"data.train={file}", "task=classification", f"storage={tmp_path}"]
        settings = read_settings([*words, "data.evaluation_split=0.3", f"seed={seed}"])
        folder = tmp_path / f"examples-{seed}"
        folder.mkdir()
        data = node_data(settings, tokenizer, folder)
        assert data.train.labels is not None and data.evaluation is not None
        assert data.train.labels == data.evaluation.labels
        assert data.train.labels.names == names
        counts = [_of(data.train, names, rare), _of(data.evaluation, names, rare)]
        assert sorted(counts) == [0, 1]
        held_out.add(counts[1])
    assert held_out == {0, 1}


def _of(data: Data, names: Sequence[str], rare: Any) -> int:
    """Examples of the rare label."""
    (rare,) = rare if isinstance(rare, list) else [rare]
    number = rare if isinstance(rare, int) else names.index(rare)
    targets = [data[index].target for index in range(len(data))]
    return sum(bool(each[number] if each.ndim else each == number) for each in targets)


def test_a_label_of_separate_evaluation_data_must_be_one_of_the_training_data(
    tmp_path: Path,
) -> None:
    for name, labels in (("train", "ab"), ("evaluation", "abc")):
        rows = "".join(f"text,{label}\n" for label in labels)
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{rows}")
    settings = read_settings(
        [f"data.{name}={tmp_path}/{name}.csv" for name in ("train", "evaluation")]
        + ["task=classification", f"storage={tmp_path}"]
    )
    with pytest.raises(
        DataError, match=r"evaluation.csv, row 3, .* 'c' is not one of the labels a"
    ):
        node_data(settings, GPTJTokenizer.train(["text"], 270), tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train=a.csv", "data.evaluation=b.csv"], "give one of the two"),
        (["data.train=a.csv", "data.evaluation_split=0.6"], "less than or equal to 0.5"),
        ([], "on a sample, which has evaluation data of its own"),
    ],
)
def test_contradicting_settings_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_settings(["data.evaluation_split=0.1", *words])

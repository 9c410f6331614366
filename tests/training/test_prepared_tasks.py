"""Classification and question answering: prepared data gives the same results as raw data."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slow_cases import slow
from task_data import make_data

from gptj import GPTJConfig, GPTJTokenizer
from gptj.data import labels as label_rows
from gptj.data.batches import BatchOrder
from gptj.data.prepared import Prepared
from gptj.data.preparing import Plan, differences, prepare
from gptj.data.question_answering import QuestionAnsweringData
from gptj.data.rows import DataError, Row
from gptj.data.shards import TaskName
from gptj.data.sources import read_rows
from gptj.training.dataset import node_data, prepare_run_data, raw_plan
from gptj.training.loader import Loader
from gptj.training.settings import Settings, SettingsError
from gptj_cli.training import check_first_rows

WORDS = "the cat is old and the dog is new, so the house is so so"
LABELS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "names": (["b", "a", "c"], {}),
    "class numbers": ([1, 0, 2], {}),
    "numbers with names": ([1, 2], {"label_names": {"1": "World", "2": "Sports"}}),
    "lists of names": ([["a"], [], ["b", "a"]], {}),
    "multi-hot": ([[1, 0], [0, 1]], {}),
    "measured": ([0.5, 1.25, 3, 2.0], {}),
    "several measured": ([[0.5, 1.5], [2, 3]], {}),
    "ratings": ([1, 5, 3], {"problem_type": "regression"}),
}


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train([WORDS, "who? 0123456789"], 290)


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True)
    if name.endswith(".csv"):
        lines = [",".join(f'"{_cell(value)}"' for value in row.values()) for row in rows]
        content = "\n".join([",".join(rows[0]), *lines]) + "\n"
    else:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / name).write_text(content)
    return str(folder / name)


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace('"', '""')


def settings_of(folder: Path, task: TaskName, address: str, **data: Any) -> Settings:
    fields = {"train": address, "sequence_length": 24, **data}
    if task == "question-answering":
        fields["stride"] = 8
    return Settings(task=task, storage=str(folder / "runs"), data=fields)  # type: ignore[arg-type]


def prepared_at(
    folder: Path, task: TaskName, address: str, tokenizer: GPTJTokenizer, **more: Any
) -> str:
    """In many small shards."""
    plan = Plan.of(address, tokenizer, names={}, task=task, chunk_characters=300, **more)
    prepare(plan, str(folder), tokenizer)
    return str(folder)


def same(ours: Any, theirs: Any) -> None:
    """That two data sets give the same batches, and the same else."""
    assert len(ours) == len(theirs) and ours.summary() == theirs.summary()
    everything = range(len(ours))
    batches = [data.collate([data[index] for index in everything]) for data in (ours, theirs)]
    assert batches[0].keys() == batches[1].keys()
    for name, tensor in batches[0].items():
        assert tensor.dtype == batches[1][name].dtype and tensor.equal(batches[1][name])


@pytest.mark.parametrize("form", ["jsonl", *slow(["csv"])])
@pytest.mark.parametrize("kind", LABELS)
def test_prepared_labels_are_read_like_raw_ones(
    kind: str, form: str, tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    values, options = LABELS[kind]
    rows = [
        {"text": f"{n} {WORDS * (n % 3 + 1)}", "label": values[n % len(values)]} for n in range(40)
    ]
    address = write(tmp_path, f"rows.{form}", rows)
    names = {key: value for key, value in options.items() if key == "label_names"}
    folder = prepared_at(tmp_path / "prepared", "classification", address, tokenizer, **names)
    expected = make_data(settings_of(tmp_path, "classification", address, **options), tokenizer)
    settings = settings_of(tmp_path, "classification", folder, **options)
    found = node_data(settings, tokenizer, tmp_path)
    same(found.train, expected.train)
    assert found.train.labels == expected.train.labels
    assert len(Prepared.at(folder).index.shards) > 3  # type: ignore[union-attr]


@pytest.mark.parametrize("length", [5, 24, 200])
def test_prepared_text_pairs_are_truncated_like_raw_ones(
    length: int, tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    rows = [
        {"text": "old " * (n % 9 + 1), "text_pair": "new " * (n % 7 + 1), "label": n % 2}
        for n in range(40)
    ]
    address = write(tmp_path, "rows.jsonl", rows)
    folder = prepared_at(tmp_path / "prepared", "classification", address, tokenizer)
    options = {"sequence_length": length}
    expected = make_data(settings_of(tmp_path, "classification", address, **options), tokenizer)
    settings = settings_of(tmp_path, "classification", folder, **options)
    same(node_data(settings, tokenizer, tmp_path).train, expected.train)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
@pytest.mark.parametrize(
    ("labels", "bad", "options", "names"),
    [
        ([0.5, 1.5, 2.25], [float("nan"), 1e300], {"problem_type": "regression"}, ["LABEL_0"]),
        ([0.5, 1.5, 2.25], ["high", "nan"], {"problem_type": "regression"}, ["LABEL_0"]),
        ([[0.5, 1.5], [2, 3]], [[0.5, float("nan")]], {}, ["LABEL_0", "LABEL_1"]),
        ([[0.5, 1.5]], [[0.5, "a"]], {"problem_type": "regression"}, ["LABEL_0", "LABEL_1"]),
    ],
)
def test_labels_that_are_no_finite_numbers_are_bad_rows(
    labels: list[Any],
    bad: list[Any],
    options: dict[str, Any],
    names: list[str],
    form: str,
    tmp_path: Path,
    tokenizer: GPTJTokenizer,
) -> None:
    values = [*labels, bad[0], *labels, *bad[1:], *labels]
    rows = [{"text": f"{n} {WORDS}", "label": value} for n, value in enumerate(values)]
    address = write(tmp_path, f"rows.{form}", rows)
    with pytest.raises(
        DataError, match=rf"row {len(labels) + 1},.* must be a finite number, .*data.bad_rows=skip"
    ):
        node_data(settings_of(tmp_path, "classification", address, **options), tokenizer, tmp_path)
    settings = settings_of(tmp_path, "classification", address, bad_rows="skip", **options)
    prepared = prepare_run_data(settings, tokenizer, None, prepare)
    found = node_data(settings, tokenizer, tmp_path, prepared).train
    assert found.labels is not None and list(found.labels.names) == names
    assert [found[n].target.tolist() for n in range(len(found))] == 3 * labels
    assert Prepared.at(prepared["train"]).index.skipped == len(bad)  # type: ignore[union-attr]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_prepared_values_to_predict_leave_out_what_is_no_number(
    form: str, tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    """By the shards' problem type, which a run need not repeat: whole numbers are ratings too."""
    labels = [1, "N/A", 2, 3]
    rows = [{"text": f"{n} {WORDS}", "label": label} for n, label in enumerate(labels)]
    address = write(tmp_path, f"rows.{form}", rows)
    skip: dict[str, Any] = {"bad_rows": "skip"}
    kept = prepared_at(tmp_path / "kept", "classification", address, tokenizer, **skip)
    settings = settings_of(tmp_path, "classification", kept, problem_type="regression")
    with pytest.raises(DataError, match=r"'N/A'; .*data.bad_rows=skip .*jobs/prepare_data.py"):
        node_data(settings, tokenizer, tmp_path)
    settings = settings_of(tmp_path, "classification", kept, problem_type="regression", **skip)
    with pytest.raises(SettingsError, match=r"again with bad_rows=skip, and problem_type=regress"):
        node_data(settings, tokenizer, tmp_path)
    skip["problem_type"] = "regression"
    measured = prepared_at(tmp_path / "m", "classification", address, tokenizer, **skip)
    found = node_data(settings_of(tmp_path, "classification", measured), tokenizer, tmp_path).train
    assert [found[n].target.item() for n in range(len(found))] == [1, 2, 3]


def test_further_training_of_a_regression_leaves_out_what_is_no_number(
    tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    labels = ["0.5", "N/A", "1.5", "1e999"]
    rows = [{"text": f"{n} {WORDS}", "label": label} for n, label in enumerate(labels)]
    address = write(tmp_path, "rows.csv", rows)
    config = GPTJConfig(
        id2label={0: "LABEL_0"},
        problem_type="regression",
        architectures=["GPTJForSequenceClassification"],
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config.to_dict()))
    settings = Settings(
        task="classification",
        storage=str(tmp_path / "runs"),
        model={"checkpoint": str(tmp_path / "model")},  # type: ignore[arg-type]
        data={"train": address, "sequence_length": 24, "bad_rows": "skip"},  # type: ignore[arg-type]
    )
    found = node_data(settings, tokenizer, tmp_path).train
    assert [found[n].target.item() for n in range(len(found))] == [0.5, 1.5]


@pytest.mark.parametrize("bad_rows", ["refuse", "skip"])
def test_further_training_reads_labels_as_before_whatever_their_names_order(
    bad_rows: str, tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    """Rows count the classes from 1, where a list of names alone would mean from 0."""
    names = ["World", "Sports", "Business"]
    rows = [{"text": f"{n} {WORDS}", "label": n % 3 + 1} for n in range(6)]
    if bad_rows == "skip":
        rows.append({"text": WORDS, "label": 4})
    address = write(tmp_path, "rows.jsonl", rows)
    config = GPTJConfig(
        id2label=dict(enumerate(names)),
        problem_type="single_label_classification",
        architectures=["GPTJForSequenceClassification"],
    )
    record = {"written": {**{n: i for i, n in enumerate(names)}, "1": 0, "2": 1, "3": 2}}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config.to_dict()))
    training = {"labels": {**record, "multi_hot": None}}
    (tmp_path / "model" / "training.json").write_text(json.dumps(training))
    settings = Settings(
        task="classification",
        storage=str(tmp_path / "runs"),
        model={"checkpoint": str(tmp_path / "model")},  # type: ignore[arg-type]
        data={  # type: ignore[arg-type]
            "train": address,
            "sequence_length": 24,
            "bad_rows": bad_rows,
            "label_names": names,
        },
    )
    check_first_rows(address, settings)
    prepared = prepare_run_data(settings, tokenizer, None, prepare)
    found = node_data(settings, tokenizer, tmp_path, prepared).train
    assert [found[n].target.item() for n in range(len(found))] == [0, 1, 2, 0, 1, 2]


def test_a_number_beyond_fp32_says_how_to_leave_it_out(
    tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    rows = [{"text": WORDS, "label": label} for label in ("0.5", "1.5", "1e999")]
    address = write(tmp_path, "rows.csv", rows)
    with pytest.raises(DataError, match=r"finite number.*=regression with data.bad_rows=skip"):
        node_data(settings_of(tmp_path, "classification", address), tokenizer, tmp_path)
    remedy = {"problem_type": "regression", "bad_rows": "skip"}
    settings = settings_of(tmp_path, "classification", address, **remedy)
    assert len(node_data(settings, tokenizer, tmp_path).train) == 2


def test_a_run_that_was_prepared_before_problem_type_was_recorded_resumes(
    tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    rows = [{"text": WORDS, "label": n % 5} for n in range(9)]
    address = write(tmp_path, "rows.jsonl", rows)
    settings = settings_of(tmp_path, "classification", address, problem_type="regression")
    plan = raw_plan(settings, "train", tokenizer)
    before = json.loads(plan.to_json())
    assert differences({**before, "problem_type": None}, plan) == ["problem_type"]
    del before["problem_type"]
    assert differences(before, plan) == []


def test_label_names_of_prepared_data_need_not_be_repeated(
    tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    names = {"1": "World", "2": "Sports"}
    rows = [{"text": WORDS, "label": n % 2 + 1} for n in range(9)]
    address = write(tmp_path, "rows.jsonl", rows)
    folder = prepared_at(tmp_path / "p", "classification", address, tokenizer, label_names=names)
    found = node_data(settings_of(tmp_path, "classification", folder), tokenizer, tmp_path)
    assert found.train.labels is not None
    assert found.train.labels.names == ("World", "Sports")


@pytest.mark.parametrize("form", ["jsonl", "csv"])
@pytest.mark.parametrize("written", [".{:02}", "+{}", "{:02}", "{}", "{}.0"])
def test_a_regression_may_have_any_number_of_values(
    written: str,
    form: str,
    tmp_path: Path,
    tokenizer: GPTJTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(label_rows, "MAX_LABELS", 5)
    texts = [written.format(n) for n in range(30)]
    values = [float(text) for text in texts]
    labels = texts if form == "csv" else [int(each) if each >= 1 else each for each in values]
    rows = [{"text": f"{n} {WORDS}", "label": label} for n, label in enumerate(labels)]
    address = write(tmp_path, f"rows.{form}", rows)
    settings = settings_of(tmp_path, "classification", address)
    if not (form == "jsonl" and written.startswith(".")):
        with pytest.raises(DataError, match=r"more than 10 .*; remedy: data.problem_type=regress"):
            node_data(settings, tokenizer, tmp_path)
    settings = settings_of(tmp_path, "classification", address, problem_type="regression")
    found = node_data(settings, tokenizer, tmp_path).train
    assert [found[n].target.item() for n in range(30)] == pytest.approx(values)


def test_too_many_labels_are_regression_targets(
    tmp_path: Path, tokenizer: GPTJTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are refused then; sets of few labels are not many."""
    monkeypatch.setattr(label_rows, "MAX_LABELS", 5)
    many: dict[str, list[Any]] = {
        "measured": [n + 0.25 for n in range(30)],
        "sets": [[name for bit, name in enumerate("abcde") if n >> bit & 1] for n in range(30)],
        "names": [f"name {n}" for n in range(30)],
    }
    for kind, values in many.items():
        rows = [{"text": f"{n} {WORDS}", "label": value} for n, value in enumerate(values)]
        address = write(tmp_path / kind, "rows.jsonl", rows)
        settings = settings_of(tmp_path, "classification", address)
        (tmp_path / kind / "node").mkdir()
        if kind == "names":
            with pytest.raises(DataError, match=r"row 11, column 'label': is one of more than 10"):
                node_data(settings, tokenizer, tmp_path / kind / "node")
        else:
            found = node_data(settings, tokenizer, tmp_path / kind / "node")
            same(found.train, make_data(settings, tokenizer).train)


def squad(number: int, **fields: Any) -> dict[str, Any]:
    context = f"  {number} ü {WORDS}. \n\n{WORDS * (number % 4)} 👩‍👩‍👧 ende"
    answers = [
        {"text": "old", "answer_start": context.find("old")},
        {"text": "ende", "answer_start": context.find("ende")},
    ]
    return {
        "question": f" who is {number}? ",
        "context": context,
        "answers": answers[number % 2 :] if number % 5 else [],
        **fields,
    }


@pytest.mark.parametrize(("length", "stride"), [(24, 8), (24, 0), (12, 3), (200, 8), (200, 190)])
def test_prepared_questions_have_the_windows_of_raw_ones(
    length: int, stride: int, tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    address = write(tmp_path, "rows.jsonl", [squad(n) for n in range(20)])
    columns = ("question", "context", "answers")
    folder = prepared_at(tmp_path / "prepared", "question-answering", address, tokenizer)
    prepared = Prepared.at(folder)
    assert prepared is not None
    expected = QuestionAnsweringData(read_rows(address, columns), tokenizer, length, stride)
    QuestionAnsweringData.write(tmp_path / "node", prepared, tokenizer, length, stride)
    found = QuestionAnsweringData.load(tmp_path / "node")
    same(found, expected)
    assert list(found.questions) == list(expected.questions)
    for index in range(len(found)):
        assert found.window(index) == expected.window(index)
        assert found.question_of(index) == expected.question_of(index)


BAD: dict[TaskName, list[tuple[dict[str, Any], str]]] = {
    "classification": [
        ({"text": "", "label": "a"}, "column 'text': is empty"),
        ({"text": 3, "label": "a"}, "column 'text': must be text, got 3"),
        ({"text": "x", "label": None}, "column 'label': must be a name"),
        ({"text": "x", "label": {"a": 1}}, "column 'label': must be a name"),
        ({"text": "x", "label": "c"}, "column 'label': 'c' is not one of the labels a, b"),
        ({"text": "x"}, "no column 'label'"),
    ],
    "question-answering": [
        (squad(1, question=" "), "column 'question': the question is empty"),
        (squad(1, context=None), "column 'context': must be text, got None"),
        (squad(1, answers=[{"text": "old", "answer_start": 0}]), "'old' is not at character 0"),
        (squad(1, answers="{"), "is not valid JSON"),
        ({"question": "who?", "context": "x"}, "no column 'answers'"),
    ],
}


@pytest.mark.parametrize("task", BAD)
def test_bad_rows_are_refused_or_skipped_and_named_in_a_run(
    task: TaskName, tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    good = [{"text": WORDS, "label": "ab"[n % 2]} for n in range(4)]
    rows = good if task == "classification" else [squad(n) for n in range(4)]
    options = {"label_names": ["a", "b"]} if task == "classification" else {}
    bad = BAD[task]
    address = write(tmp_path, "rows.jsonl", [*rows[:2], *(row for row, _ in bad), *rows[2:]])
    for number, (row, message) in enumerate(bad):
        alone = write(tmp_path / str(number), "rows.jsonl", [*rows, row])
        settings = settings_of(tmp_path / str(number), task, alone, **options)
        with pytest.raises(DataError, match=f"rows.jsonl, row 5.*{message}"):
            prepare_run_data(settings, tokenizer, None, prepare)
    settings = settings_of(tmp_path, task, address, bad_rows="skip", **options)
    places = prepare_run_data(settings, tokenizer, None, prepare)
    found = node_data(settings, tokenizer, tmp_path, places)
    assert found.fingerprints["train"].rows == 4
    index = Prepared.at(places["train"]).index  # type: ignore[union-attr]
    assert index.skipped == len(bad)
    for _, message in bad:
        assert any(message in each for each in index.bad)


def test_questions_without_room_are_refused_or_skipped_like_bad_rows(
    tmp_path: Path, tokenizer: GPTJTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    long = squad(1, question="who " * 40)
    address = write(tmp_path, "rows.jsonl", [squad(0), long])
    settings = settings_of(tmp_path, "question-answering", address)
    with pytest.raises(DataError, match=r"rows.jsonl, row 2, column 'question': .*leaves 0 of max"):
        node_data(settings, tokenizer, tmp_path)
    settings = settings_of(tmp_path, "question-answering", address, bad_rows="skip")
    found = node_data(settings, tokenizer, tmp_path).train
    assert isinstance(found, QuestionAnsweringData) and len(found.questions) == 1
    assert "skipped 1 bad rows, such as" in caplog.text and "row 2" in caplog.text


@pytest.mark.parametrize(
    ("prepared_for", "task"),
    [("classification", "question-answering"), ("question-answering", "causal-lm")],
)
def test_data_prepared_for_another_task_is_refused(
    prepared_for: TaskName, task: TaskName, tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    rows = [squad(1)] if prepared_for == "question-answering" else [{"text": "a", "label": "b"}]
    address = write(tmp_path, "rows.jsonl", rows)
    folder = prepared_at(tmp_path / "prepared", prepared_for, address, tokenizer)
    with pytest.raises(DataError, match=f"is prepared for task={prepared_for}, not {task}"):
        node_data(settings_of(tmp_path, task, folder), tokenizer, tmp_path)


ROWS: dict[TaskName, list[dict[str, Any]]] = {
    "causal-lm": [{"text": f"{n} {WORDS * (n % 3)}"} for n in range(50)],
    "classification": [{"text": f"{n} {WORDS}", "label": "abc"[n % 3]} for n in range(50)],
    "question-answering": [squad(n) for n in range(25)],
}


def test_raw_data_is_prepared_once(tmp_path: Path, tokenizer: GPTJTokenizer) -> None:
    """A copied file is the same; another one is refused once there is a checkpoint."""
    address = write(tmp_path, "rows.jsonl", ROWS["causal-lm"])
    settings = settings_of(tmp_path, "causal-lm", address, evaluation_split=0.2)
    made: list[str] = []

    def counting(plan: Plan, folder: str, tokenizer: GPTJTokenizer) -> None:
        if Prepared.at(folder) is None:
            made.append(folder)
        prepare(plan, folder, tokenizer)

    places = prepare_run_data(settings, tokenizer, None, counting)
    assert places == {
        name: str(tmp_path / "runs" / "finetune" / "data" / name)
        for name in ("train", "evaluation")
    }
    first = node_data(settings, tokenizer, tmp_path, places)
    same(first.train, make_data(settings, tokenizer).train)
    assert sum(each.rows for each in first.fingerprints.values()) == 50
    write(tmp_path, "rows.jsonl", ROWS["causal-lm"])  # now it has another time
    assert prepare_run_data(settings, tokenizer, "checkpoint-1", counting) == places
    assert len(made) == 2
    write(tmp_path, "rows.jsonl", [*ROWS["causal-lm"][1:], ROWS["causal-lm"][0]])
    with pytest.raises(
        SettingsError, match=r"from checkpoint-1 with other data: .*data\.train=.*jsonl"
    ):
        prepare_run_data(settings, tokenizer, "checkpoint-1", counting)
    prepare_run_data(settings, tokenizer, None, counting)
    assert len(made) == 4


@pytest.mark.slow
@pytest.mark.parametrize("task", ROWS)
def test_interrupted_runs_see_each_example_of_an_epoch_once(
    task: TaskName, tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    """From prepared shards, by other numbers of workers from each step on, for two epochs."""
    address = write(tmp_path, "rows.jsonl", ROWS[task])
    folder = prepared_at(tmp_path / "prepared", task, address, tokenizer)
    data = node_data(settings_of(tmp_path, task, folder), tokenizer, tmp_path).train
    order = BatchOrder(len(data), 4, seed=5)
    steps = 2 * len(data) // 4
    seen: Counter[tuple[int, ...]] = Counter()
    for step in range(steps):  # each a process of its own, which begins where the last one ended
        world = (1, 2, 4)[step % 3]
        for rank in range(world):
            with Loader(
                data, order, rank=rank, world_size=world, micro_batch=1, first=step, last=steps
            ) as loader:
                for batch in loader.next()[0].batches:
                    ids = batch["input_ids"][batch["attention_mask"] == 1]
                    seen[tuple(ids.tolist())] += 1
    expected: Counter[tuple[int, ...]] = Counter()
    for position in range(4 * steps):
        index = order.indices(position // 4)[position % 4]
        example: Any = data[index]
        expected[tuple(np.asarray(example[0]).tolist())] += 1
    assert seen == expected
    whole = Counter(tuple(np.asarray(data[index][0]).tolist()) for index in range(len(data)))
    for example, times in whole.items():
        assert 2 * times - 4 < seen[example] <= 2 * times  # but for the last part of a batch


def test_errors_number_rows_as_in_their_file(tmp_path: Path, tokenizer: GPTJTokenizer) -> None:
    for number in range(2):
        rows = [{"review": WORDS, "stars": n} for n in range(3)]
        write(tmp_path / "raw", f"{number}.csv", rows)
    names = {"text": "review", "label": "stars"}
    plan = Plan.of(
        str(tmp_path / "raw"), tokenizer, names=names, task="classification", chunk_characters=90
    )
    prepare(plan, str(tmp_path / "prepared"), tokenizer)
    prepared = Prepared.at(str(tmp_path / "prepared"))
    assert prepared is not None
    rows_of = [
        table.row(number, label="x")
        for table in prepared.tables()
        for number in range(table.columns.num_rows)
    ]
    expected = list(read_rows(str(tmp_path / "raw"), ["text", "label"], names))
    assert list(map(str, rows_of)) == list(map(str, expected))
    assert [row.typed for row in rows_of] == [False] * 6
    assert isinstance(rows_of[0], Row)
    assert str(rows_of[0].error("label", "why")).endswith("column 'stars': why")

"""A run's data is distinguished from any other before the first step."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gptj import GPTJTokenizer
from gptj.data.labels import LabelSet
from gptj.storage.scratch import scratch_folder
from gptj.training.dataset import node_data
from gptj.training.settings import Settings, SettingsError
from gptj.training.state import Progress, check_same_data, check_same_labels

TOKENIZER = GPTJTokenizer.train(["text 0123456789"], 270)
ROWS = [{"text": f"text {n}", "label": ["a", "b"][n % 2], "id": n} for n in range(10)]


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "train.jsonl")


def settings_of(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> Settings:
    write(folder, rows)
    return Settings(
        storage=str(folder),
        task="classification",
        data={"train": str(folder / "train.jsonl"), **fields},  # type: ignore[arg-type]
        tokenizer={"vocab_size": 270},  # type: ignore[arg-type]
    )


def fingerprints(settings: Settings) -> dict[str, Any]:
    """Of data tokenized by one tokenizer, as a run that goes on has it."""
    with scratch_folder() as folder:
        return node_data(settings, TOKENIZER, folder).fingerprints


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (ROWS[:9], r"had 10 rows \(sha256 \w{16}…\) and has 9 rows \(sha256 \w{16}…\)"),
        ([*ROWS, ROWS[0]], "had 10 rows .* and has 11 rows"),
        ([ROWS[1], ROWS[0], *ROWS[2:]], "had 10 rows .* and has 10 rows"),
        ([{**ROWS[0], "text": "text 0 "}, *ROWS[1:]], "had 10 rows .* and has 10 rows"),
        ([{**ROWS[0], "label": "b"}, *ROWS[1:]], "had 10 rows .* and has 10 rows"),
    ],
    ids=["fewer", "more", "another order", "another text", "another label"],
)
def test_a_run_does_not_resume_with_other_data(
    changed: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    before = fingerprints(settings_of(tmp_path, ROWS))
    progress = Progress(step=3, data={name: asdict(each) for name, each in before.items()})
    check_same_data(settings_of(tmp_path, ROWS), "checkpoint-3", progress, before)
    settings = settings_of(tmp_path, changed)
    with pytest.raises(SettingsError, match=rf"checkpoint-3 .*train\.jsonl {message}.*another run"):
        check_same_data(settings, "checkpoint-3", progress, fingerprints(settings))


@pytest.mark.parametrize(
    ("recorded", "label_names", "names", "refused"),
    [
        (["neg", "pos"], [], ("neg", "pos"), False),
        (["neg", "pos"], [], ("pos", "neg"), True),
        # Checkpoints of earlier versions record none.
        (None, {"neg": "LABEL_1", "pos": "LABEL_0"}, ("LABEL_0", "LABEL_1"), True),
        (None, {"neg": "LABEL_0", "pos": "LABEL_1"}, ("LABEL_0", "LABEL_1"), False),
        (None, {"n": "neg", "p": "pos"}, ("neg", "pos"), False),
        (None, [], ("LABEL_0", "LABEL_1"), False),
    ],
)
def test_a_run_does_not_resume_with_other_labels(
    recorded: list[str] | None,
    label_names: Any,
    names: tuple[str, ...],
    refused: bool,
    tmp_path: Path,
) -> None:
    settings = settings_of(tmp_path, ROWS, label_names=label_names)
    labels = LabelSet(names, "single_label_classification")
    words = (settings, "checkpoint-3", Progress(step=3, labels=recorded), labels)
    if not refused:
        check_same_labels(*words)
        return
    with pytest.raises(SettingsError, match=rf"outputs were .*would be {', '.join(names)}"):
        check_same_labels(*words)


def test_only_the_columns_that_are_read_count(tmp_path: Path) -> None:
    """Other columns may change, and files be renamed; the evaluation's rows may not."""
    before = fingerprints(settings_of(tmp_path, ROWS))
    rows = [{**row, "id": None, "more": 1} for row in ROWS]
    assert fingerprints(settings_of(tmp_path, rows)) == before
    (tmp_path / "held-out.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    settings = settings_of(tmp_path, ROWS, evaluation=str(tmp_path / "held-out.jsonl"))
    first = fingerprints(settings)
    assert first["train"] == before["train"]
    assert first["evaluation"].rows == 1
    progress = Progress(data={name: asdict(each) for name, each in first.items()})
    (tmp_path / "held-out.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    with pytest.raises(SettingsError, match=r"data\.evaluation=.*held-out\.jsonl had 1 rows"):
        check_same_data(settings, "checkpoint-3", progress, fingerprints(settings))


def test_another_chat_template_changes_the_data(tmp_path: Path) -> None:
    """It may change behind its file's name, between a run and its resumption."""
    chats = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    ]
    found = []
    for begin in ("", "> "):
        template = (
            f"{begin}{{% for message in messages %}}{{% generation %}}{{{{ message.content }}}}"
        )
        settings = Settings(
            storage=str(tmp_path),
            data={"train": write(tmp_path, chats)},  # type: ignore[arg-type]
        )
        tokenizer = copy(TOKENIZER)
        tokenizer.chat_template = template + "{% endgeneration %}{% endfor %}"
        with scratch_folder() as folder:
            found.append(node_data(settings, tokenizer, folder).fingerprints["train"])
    assert found[0].rows == found[1].rows == 1 and found[0] != found[1]

"""A node's processes share one data set: read and tokenized once, memory-mapped by all."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from shutil import _ntuple_diskusage as usage  # type: ignore[attr-defined]
from typing import Any

import numpy as np
import pytest
import torch
from task_data import make_data

from gptj import GPTJTokenizer
from gptj.data.causal_lm import CausalLMData
from gptj.data.rows import DataError
from gptj.storage.scratch import shared_scratch_folder
from gptj.training import dataset, room
from gptj.training.dataset import node_data
from gptj.training.failures import DiskFullError
from gptj.training.settings import Settings, SettingsError

WORDS = "the cat is old and the dog is new, so the house is so so"
ROWS: dict[str, list[dict[str, Any]]] = {
    "causal-lm": [{"text": f"{n} {WORDS}"} for n in range(9)],
    "classification": [{"text": f"{n} {WORDS}", "label": "abc"[n % 3]} for n in range(9)],
    "question-answering": [
        {
            "question": "who is old?",
            "context": f"{n} ü {WORDS}. {WORDS}",
            "answers": {"text": ["cat"], "answer_start": [8]} if n else None,
        }
        for n in range(9)
    ],
}


def settings_of(folder: Path, task: str) -> Settings:
    for name, rows in (("train", ROWS[task]), ("held-out", ROWS[task][:6])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "train": str(folder / "train.jsonl"),
        "evaluation": str(folder / "held-out.jsonl"),
        "sequence_length": 32,
    }
    if task == "question-answering":
        data["stride"] = 8
    return Settings(task=task, storage=str(folder), data=data)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train([WORDS, "who?"], 280)


def batch_of(data: Any, count: int) -> dict[str, torch.Tensor]:
    batch: dict[str, torch.Tensor] = data.collate([data[index] for index in range(count)])
    return batch


@pytest.mark.parametrize("task", ROWS)
def test_memory_mapped_data_equals_the_tokenized_data(
    task: str, tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    settings = settings_of(tmp_path, task)
    expected, found = make_data(settings, tokenizer), node_data(settings, tokenizer, tmp_path)
    assert [found.fingerprints[name].rows for name in ("train", "evaluation")] == [9, 6]
    for name in ("train", "evaluation"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert len(ours) == len(theirs)
        assert ours.summary() == theirs.summary()
        assert ours.labels == theirs.labels
        ours_batch, theirs_batch = batch_of(ours, len(ours)), batch_of(theirs, len(ours))
        assert ours_batch.keys() == theirs_batch.keys()
        for key, tensor in ours_batch.items():
            assert torch.equal(tensor, theirs_batch[key])
        assert ours.count_items(ours_batch) == theirs.count_items(theirs_batch)
        arrays = [v for v in vars(ours).values() if isinstance(v, np.ndarray)]
        assert all(isinstance(array, np.memmap) for array in arrays)
    if task == "question-answering":
        assert list(found.train.questions) == list(expected.train.questions)  # type: ignore[attr-defined]
        assert found.train.questions[-1:] == expected.train.questions[-1:]  # type: ignore[attr-defined]
        windows = range(len(expected.train))
        assert [found.train.window(i) for i in windows] == [  # type: ignore[attr-defined]
            expected.train.window(i)  # type: ignore[attr-defined]
            for i in windows
        ]


@pytest.mark.slow
def test_concurrent_processes_read_the_rows_once(
    tmp_path: Path, tokenizer: GPTJTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = tmp_path / "reads"
    read = dataset.prepare

    def noting(*arguments: Any) -> Any:
        with noted.open("a") as file:
            file.write("read\n")
        return read(*arguments)

    monkeypatch.setattr(dataset, "prepare", noting)
    settings = settings_of(tmp_path, "causal-lm")
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()

    def ask() -> None:
        queue.put(node_data(settings, tokenizer, tmp_path).fingerprints["train"])

    processes = [fork.Process(target=ask) for _ in range(4)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    assert noted.read_text() == "read\n" * 2  # of train and evaluation
    assert len(set(found)) == 1


def die_holding(folder: Path, settings: Settings, tokenizer: GPTJTokenizer) -> None:
    with shared_scratch_folder("data-1", folder, on_abandoned=dataset.set_aside) as shared:
        node_data(settings, tokenizer, shared)
        os.kill(os.getpid(), signal.SIGKILL)


def alter(ids: Path) -> None:
    with ids.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "none": lambda ids: None,
    "an altered byte": alter,
    "a truncated file": lambda ids: os.truncate(ids, 100),
    "a missing file": lambda ids: ids.unlink(),
    "no end": lambda ids: (ids.parents[1] / dataset.FINGERPRINTS).unlink(),
    "empty fingerprints": lambda ids: os.truncate(ids.parents[1] / dataset.FINGERPRINTS, 0),
    "others": lambda ids: (ids.parents[1] / dataset.FINGERPRINTS).write_text('{"train": [1]}'),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_restarted_group_of_workers_reuses_its_nodes_examples(
    damage: str, tmp_path: Path, tokenizer: GPTJTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless they are not as the killed workers have written them."""
    settings = settings_of(tmp_path, "causal-lm")
    killed = multiprocessing.get_context("fork").Process(
        target=die_holding, args=(tmp_path, settings, tokenizer)
    )
    killed.start()
    killed.join()
    (left,) = tmp_path.glob("gptj-scratch-*/shared-data-1/content")
    DAMAGES[damage](max(left.glob("train-*/*.npy"), key=lambda file: file.stat().st_size))
    (left / "train-half").mkdir()  # of one that was killed before
    made: list[Path] = []
    write = CausalLMData.write

    def noting(folder: Path, *arguments: Any) -> None:
        made.append(folder)
        write(folder, *arguments)

    monkeypatch.setattr(CausalLMData, "write", noting)
    with shared_scratch_folder("data-1", tmp_path, on_abandoned=dataset.set_aside) as shared:
        assert not (shared / "train-half").exists()
        found = node_data(settings, tokenizer, shared)
        assert bool(made) == (damage != "none")
        expected = make_data(settings, tokenizer).train
        assert [len(found.train), len(list(shared.glob("train-*")))] == [len(expected), 1]
        for index in range(len(expected)):
            theirs, ours = expected.collate([expected[index]]), found.train
            for name, tensor in ours.collate([ours[index]]).items():
                assert torch.equal(tensor, theirs[name])
    assert not left.exists()


def die_tokenizing(folder: Path, tokenizer: GPTJTokenizer) -> None:
    def write(folder: Path, *arguments: Any) -> None:
        folder.mkdir()
        (folder / "ids.npy").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    CausalLMData.write = write  # type: ignore[method-assign,assignment]
    node_data(settings_of(folder, "causal-lm"), tokenizer, folder)


def test_the_next_process_tokenizes_if_the_first_is_killed(
    tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=die_tokenizing, args=(tmp_path, tokenizer)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    settings = settings_of(tmp_path, "causal-lm")
    found = node_data(settings, tokenizer, tmp_path)
    assert len(found.train) == len(make_data(settings, tokenizer).train)


def test_the_next_process_tokenizes_if_the_first_fails_at_the_end(
    tmp_path: Path, tokenizer: GPTJTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path, "causal-lm")

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(OSError, match="Input/output"):
            node_data(settings, tokenizer, tmp_path)
    assert (tmp_path / dataset.EXAMPLES).exists()
    found = node_data(settings, tokenizer, tmp_path)
    assert len(found.train) == len(make_data(settings, tokenizer).train)


@pytest.mark.parametrize("task", ROWS)
def test_examples_are_written_only_where_there_is_room(
    task: str, tmp_path: Path, tokenizer: GPTJTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said to be needed is what they take, without offsets and labels."""
    settings = settings_of(tmp_path, task)
    needed: list[int] = []

    def checked(address: str, size: int, *given: Any) -> None:
        needed.append(size)
        room.check_room_for(address, size, *given)

    monkeypatch.setattr(dataset, "check_room_for", checked)
    node_data(settings, tokenizer, tmp_path)
    for name, size in zip(("train", "evaluation"), needed, strict=True):
        (folder,) = tmp_path.glob(f"{name}-*")
        assert 0.1 < size / sum(file.stat().st_size for file in folder.iterdir()) < 1

    (tmp_path / "other").mkdir()
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: usage(10**9, 0, needed[0] - 1))
    with pytest.raises(
        DiskFullError,
        match=r"no room for the examples of .*train\.jsonl: \S+ GB are needed there, and \S+ GB "
        r"are free; remedy: .* the data's tokens, four or five bytes each",
    ):
        node_data(settings, tokenizer, tmp_path / "other")


def test_truncated_texts_need_no_room_for_what_is_left_out(
    tmp_path: Path, tokenizer: GPTJTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr(dataset, "check_room_for", lambda _, size, *__: needed.append(size))
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"prompt": WORDS * 50, "completion": " so"}) + "\n"
    )
    data = {"train": str(tmp_path / "rows.jsonl"), "sequence_length": 32}
    node_data(Settings(storage=str(tmp_path), data=data), tokenizer, tmp_path)  # type: ignore[arg-type]
    assert needed == [32 * (4 + 1)]  # with its mask


def test_a_bad_row_is_named_to_each_process(tmp_path: Path, tokenizer: GPTJTokenizer) -> None:
    settings = settings_of(tmp_path, "causal-lm")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": 3}\n')
    for _ in range(2):
        with pytest.raises(DataError, match=r"train\.jsonl, row 10, column 'text': must be text"):
            node_data(settings, tokenizer, tmp_path)


def test_a_pair_classifier_is_not_evaluated_on_single_texts(
    tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    settings = settings_of(tmp_path, "classification")
    pairs = [{**row, "text_pair": "so"} for row in ROWS["classification"]]
    content = "".join(json.dumps(row) + "\n" for row in pairs)
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(SettingsError) as refused:
        node_data(settings, tokenizer, tmp_path)
    assert str(refused.value) == (
        f"data.train has the columns text, text_pair, label, and {tmp_path}/held-out.jsonl has "
        f"text, label: evaluate on the same kind of rows as in training"
    )

"""Prepared data gives the same examples as raw data, and its folders describe it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from task_data import packed

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer, storage
from gptj.checkpoints.manifest import verify
from gptj.data import preparing, shards
from gptj.data.causal_lm import CausalLMData
from gptj.data.prepared import Index, Prepared
from gptj.data.preparing import Chunk, Plan, begin, chunks, finish, is_current, write_shard
from gptj.data.rows import DataError
from gptj.data.sources import read_rows
from gptj.errors import CheckpointError
from gptj.training.dataset import node_data
from gptj.training.settings import Settings, SettingsError, read_settings
from gptj.training.tokenizer import load_tokenizer, prepare_tokenizer
from jobs.evaluate import measure
from jobs.evaluate import read_settings as read_evaluation
from jobs.prepare_data import main as prepare_main
from jobs.prepare_data import read_settings as read_preparation

TEXTS = [f"{'very ' * (n % 5)}old cat {n} and new dog {n * n}" for n in range(90)]
SMALL = 500  # characters of a shard


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train(TEXTS, 300)


def raw(folder: Path, *, pairs: bool = False) -> str:
    """Three files of 30 rows."""
    (folder / "raw").mkdir()
    for number in range(3):
        rows = [{"text": text} for text in TEXTS[30 * number : 30 * number + 30]]
        if pairs:
            rows = [{"prompt": row["text"], "completion": " so"} for row in rows]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "raw" / f"{number}.jsonl").write_text(lines)
    return str(folder / "raw")


def plan_of(address: str, tokenizer: GPTJTokenizer, skip: bool = False) -> Plan:
    bad_rows: preparing.BadRows = "skip" if skip else "refuse"
    return Plan.of(address, tokenizer, names={}, bad_rows=bad_rows, chunk_characters=SMALL)


def prepare(
    plan: Plan, folder: str, tokenizer: GPTJTokenizer, *, last_first: bool = False
) -> Index:
    """As the job does, in this process."""
    if (done := begin(plan, folder)) is not None:
        return done
    found = [chunk for part in range(len(plan.parts)) for chunk in chunks(plan, part)]
    found = found[::-1] if last_first else found
    return finish(plan, folder, [write_shard(plan, folder, c, tokenizer) for c in found], tokenizer)


def test_of_two_that_begin_a_folder_at_once_one_is_refused(
    tmp_path: Path, tokenizer: GPTJTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other writes its plan just after this one."""
    plan, write = plan_of(raw(tmp_path), tokenizer), storage.write_bytes
    other = replace(plan, chunk_characters=2 * SMALL)

    def both(address: str, content: bytes) -> None:
        write(address, content)
        write(address, other.to_json().encode())

    monkeypatch.setattr(storage, "write_bytes", both)
    with pytest.raises(DataError, match="was started with different chunk_characters"):
        begin(plan, str(tmp_path / "out"))
    assert begin(other, str(tmp_path / "out")) is None


def contents(folder: str) -> dict[str, bytes]:
    files = [file for file in Path(folder).rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("pairs", [False, True], ids=["texts", "completions"])
@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_prepared_data_equals_raw_data(
    packing: str, pairs: bool, tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    """Best fit packs each shard by itself; every document is there once."""
    address, folder = raw(tmp_path, pairs=pairs), str(tmp_path / "prepared")
    index = prepare(plan_of(address, tokenizer), folder, tokenizer)
    columns = ["prompt", "completion"] if pairs else ["text"]
    expected = CausalLMData(read_rows(address, columns), tokenizer, 64, packing)  # type: ignore[arg-type]
    found = packed(tmp_path / "packed", folder, tokenizer, 64, packing)  # type: ignore[arg-type]
    assert index.rows == 90 and len(index.shards) > 3
    assert index.tokens == len(expected.tokens)
    assert (index.learned < index.tokens) == pairs

    def documents(data: CausalLMData) -> list[tuple[list[int], list[bool] | None]]:
        rows = []
        for start, end in zip(data.document_ends, data.document_ends[1:], strict=False):
            learned = None if data.learned is None else data.learned[start:end].tolist()
            rows.append((data.tokens[start:end].tolist(), learned))
        return rows if packing == "concatenate" else sorted(rows, key=str)

    assert documents(found) == documents(expected)
    verify(folder)


def test_shards_do_not_depend_on_the_workers(tmp_path: Path, tokenizer: GPTJTokenizer) -> None:
    plan = plan_of(raw(tmp_path), tokenizer)
    prepare(plan, str(tmp_path / "a"), tokenizer)
    prepare(plan, str(tmp_path / "b"), tokenizer, last_first=True)
    assert contents(str(tmp_path / "a")) == contents(str(tmp_path / "b"))


def test_an_interrupted_preparation_resumes(
    tmp_path: Path, tokenizer: GPTJTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder = plan_of(raw(tmp_path), tokenizer), str(tmp_path / "prepared")
    prepare(plan, str(tmp_path / "undisturbed"), tokenizer)
    begin(plan, folder)
    done = [write_shard(plan, folder, chunk, tokenizer) for chunk in list(chunks(plan, 0))[:2]]
    Path(folder, done[1].name).write_bytes(b"half a shard")
    Path(folder, "unfinished", "shard-00000-00001.json").unlink()
    with pytest.raises(DataError, match=r"is not finished.*jobs/prepare_data\.py again"):
        Prepared.at(folder)
    written = []
    read = shards.read_documents

    def noting(rows: list[shards.Row], *rest: object) -> object:
        written.append(len(rows))
        return read(rows, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "read_documents", noting)
    index = prepare(plan, folder, tokenizer)
    assert sum(written) == 90 - done[0].rows
    assert contents(folder) == contents(str(tmp_path / "undisturbed"))
    Path(folder, "unfinished").mkdir()
    Path(folder, "unfinished", "plan.json").write_text("what a kill after the manifest leaves")
    assert prepare(plan, folder, tokenizer) == index
    verify(folder)
    assert sum(written) == 90 - done[0].rows


@pytest.mark.parametrize(
    ("file", "stamp", "same"),
    [
        ("hf://datasets/me/rows@{new}/train.jsonl", "blob", True),  # the card was edited
        ("hf://datasets/me/rows@{new}/train.jsonl", "other", False),
        ("hf://datasets/me/rows@{new}/test.jsonl", "blob", False),
        ("hf://datasets/me/other@{new}/train.jsonl", "blob", False),
    ],
)
def test_another_commit_of_the_hub_with_the_same_files_is_the_same_data(
    file: str, stamp: str, same: bool, tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    before = replace(
        plan_of(raw(tmp_path), tokenizer),
        address="hf://datasets/me/rows",
        parts=((f"hf://datasets/me/rows@{'a' * 40}/train.jsonl",),),
        sizes=(9,),
        stamps=("blob",),
    )
    now = replace(before, parts=((file.format(new="b" * 40),),), stamps=(stamp,))
    index = Index(json.loads(before.to_json()), before.tokenizer, 0, 0, 0, 0, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "chunks", lambda plan, part: [Chunk(part, 0, [], 1, ())])
        assert is_current(now, index) == same


def test_an_unrelated_folder_is_refused(tmp_path: Path, tokenizer: GPTJTokenizer) -> None:
    address, folder = raw(tmp_path), str(tmp_path / "prepared")
    with pytest.raises(DataError, match=r"raw has other files, such as 0\.jsonl"):
        begin(plan_of(address, tokenizer), address)
    begin(plan_of(address, tokenizer), folder)
    with pytest.raises(
        DataError, match="was started with different bad_rows: choose another folder"
    ):
        begin(plan_of(address, tokenizer, skip=True), folder)
    prepare(plan_of(address, tokenizer), folder, tokenizer)
    with pytest.raises(DataError, match="was started with different tokenizer"):
        begin(plan_of(address, GPTJTokenizer.train(TEXTS, 290)), folder)


BAD = (
    '{"text": 3}\n{"text": "fine"}\nno JSON\n{"other": 1}\n{"text": "\\ud800"}\n{"text": "good"}\n'
)


def test_bad_rows_are_refused_or_skipped_counted_and_named(
    tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    address = raw(tmp_path)
    with (tmp_path / "raw" / "1.jsonl").open("a") as file:
        file.write(BAD)
    with pytest.raises(DataError, match=r"1\.jsonl, row "):
        prepare(plan_of(address, tokenizer), str(tmp_path / "refused"), tokenizer)
    index = prepare(plan_of(address, tokenizer, skip=True), str(tmp_path / "skipped"), tokenizer)
    assert (index.rows, index.skipped) == (92, 4)
    text = "\n".join(sorted(index.bad))
    for expected in (
        "1.jsonl, row 31, column 'text': must be text, got 3",
        "1.jsonl, row 33: must be a JSON object",
        "1.jsonl, row 34: no column 'text'",
        "1.jsonl, row 35, column 'text': has an invalid character",
    ):
        assert expected in text
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "rows.csv").write_text("text,x\na\n\nb\n")
    with pytest.raises(DataError, match=r"all 2 rows of .*none.* are bad"):
        plan = Plan(
            str(tmp_path / "none"), ((str(tmp_path / "none" / "rows.csv"),),), (9,), ("text",), {},
            None, "skip", "", "", SMALL,
        )  # fmt: skip
        prepare(plan, str(tmp_path / "nothing"), tokenizer)


def settings_of(folder: Path, *words: str) -> Settings:
    return read_settings([f"storage={folder}", f"data.train={folder / 'prepared'}", *words])


def test_a_run_reads_prepared_data_like_raw_data(tmp_path: Path, tokenizer: GPTJTokenizer) -> None:
    """With the tokenizer that lies beside them, unless the model has its own."""
    prepare(plan_of(raw(tmp_path), tokenizer), str(tmp_path / "prepared"), tokenizer)
    settings = settings_of(tmp_path, f"data.evaluation={tmp_path / 'prepared'}")
    prepare_tokenizer(settings)
    found = load_tokenizer(settings)
    assert found.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])
    data = node_data(settings, found, tmp_path)
    assert data.fingerprints["train"].rows == 90
    assert data.fingerprints["train"] == data.fingerprints["evaluation"]
    assert data.evaluation is not None and len(data.train) == len(data.evaluation)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"prepared with another tokenizer.*tokenizer\.address="):
        node_data(settings, GPTJTokenizer.train(TEXTS, 290), tmp_path / "other")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.columns.text=body", r"is prepared, but data\.columns applies to raw data"),
        (
            "data.bad_rows=skip",
            r"leave it out; to leave out rows, prepare them again with bad_rows",
        ),
        ("data.delimiter=;", r"data\.delimiter applies to raw data"),
        ("data.evaluation_split=0.1", r"leave it out, and prepare evaluation data"),
    ],
)
def test_settings_for_raw_data_are_refused_with_prepared_data(
    word: str, message: str, tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    prepare(plan_of(raw(tmp_path), tokenizer), str(tmp_path / "prepared"), tokenizer)
    settings = settings_of(tmp_path, word)
    with pytest.raises(SettingsError, match=message):
        node_data(settings, load_tokenizer(settings), tmp_path)


def test_settings_for_raw_data_apply_to_the_raw_one_of_two_data_sets(
    tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    prepare(plan_of(raw(tmp_path), tokenizer), str(tmp_path / "prepared"), tokenizer)
    (tmp_path / "held-out.csv").write_text("body;n\nold cat;1\n")
    words = ["data.columns.text=body", "data.delimiter=;"]
    settings = settings_of(tmp_path, *words, f"data.evaluation={tmp_path / 'held-out.csv'}")
    data = node_data(settings, load_tokenizer(settings), tmp_path)
    assert data.evaluation is not None and len(data.evaluation) == 1


def test_a_new_tokenizers_size_is_refused_with_prepared_data(
    tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    prepare(plan_of(raw(tmp_path), tokenizer), str(tmp_path / "prepared"), tokenizer)
    with pytest.raises(SettingsError, match=r"tokenizer\.vocab_size has no effect on data\.train="):
        prepare_tokenizer(settings_of(tmp_path, "tokenizer.vocab_size=400"))


@pytest.mark.parametrize("bad", ["no JSON", '"text"', '{"text": 3}'])
def test_the_first_row_may_be_bad_too(bad: str, tmp_path: Path, tokenizer: GPTJTokenizer) -> None:
    (tmp_path / "rows.jsonl").write_text(bad + '\n{"text": "good"}\n')
    address = str(tmp_path / "rows.jsonl")
    index = prepare(plan_of(address, tokenizer, skip=True), str(tmp_path / "prepared"), tokenizer)
    assert (index.rows, index.skipped) == (1, 1)
    (tmp_path / "rows.jsonl").write_text('{"other": 1}\n{"text": "good"}\n')
    with pytest.raises(DataError, match="no column 'text'"):
        plan_of(address, tokenizer, skip=True)


def test_training_keys_are_not_mistaken_for_others() -> None:
    """Such as tokenizer.chat_template for the tokenizer."""
    words = ["data", "destination", "tokenizer=a", "data.columns.text=body"]
    assert read_preparation(words).columns == {"text": "body"}
    with pytest.raises(ValueError, match=r"^tokenizer\.chat_template=alpaca: unknown key"):
        read_preparation([*words, "tokenizer.chat_template=alpaca"])


def test_prepared_data_is_refused_by_other_tasks(tmp_path: Path, tokenizer: GPTJTokenizer) -> None:
    prepare(plan_of(raw(tmp_path), tokenizer), str(tmp_path / "prepared"), tokenizer)
    settings = settings_of(tmp_path, "task=classification")
    with pytest.raises(DataError, match="is prepared for task=causal-lm, not classification"):
        node_data(settings, load_tokenizer(settings), tmp_path)


def test_damage_is_detected(tmp_path: Path, tokenizer: GPTJTokenizer) -> None:
    folder = tmp_path / "prepared"
    prepare(plan_of(raw(tmp_path), tokenizer), str(folder), tokenizer)
    shard = next(folder.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"shard-\d+-\d+\.parquet was altered"):
        packed(tmp_path / "packed", str(folder), tokenizer, 64)


def test_a_model_is_evaluated_on_prepared_data(tmp_path: Path, tokenizer: GPTJTokenizer) -> None:
    address, folder = raw(tmp_path, pairs=True), str(tmp_path / "prepared")
    prepare(plan_of(address, tokenizer), folder, tokenizer)
    torch.manual_seed(0)
    config = GPTJConfig.preset("tiny", vocab_size=len(tokenizer), n_positions=64)
    GPTJForCausalLM(config).save_pretrained(str(tmp_path / "model"), tokenizer=tokenizer)
    keys = ["device=cpu", "packing=best_fit"]
    found = [
        measure(read_evaluation([str(tmp_path / "model"), data, *keys, f"unigram={data}"]))
        for data in (address, folder)
    ]
    assert found[0]["tokens"] == found[1]["tokens"]
    assert found[0]["unigram_perplexity"] == pytest.approx(found[1]["unigram_perplexity"])
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)


@pytest.mark.parametrize("place", ["", "/prepared"])
def test_a_destination_among_the_data_is_refused_at_once(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could not be resumed: its shards would be data."""
    address = raw(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"error: .*raw.* is within raw: its files"):
        prepare_main(["raw", address + place, "tokenizer=none"])
    assert len(contents(address)) == 3


def test_a_destination_within_the_tokenizers_folder_is_refused_at_once(
    tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    model = tmp_path / "model"
    tokenizer.save_pretrained(model)
    with pytest.raises(SystemExit, match=r"error: .*/prepared is within .*/model, which"):
        prepare_main([raw(tmp_path), str(model / "prepared"), f"tokenizer={model}"])
    assert not (model / "prepared").exists()

"""Data sets on the hub, from a real HTTP server that answers as the Hugging Face hub does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from test_hub import BRANCHES, GATED, MAIN, OLD, REPOSITORY, Client, Hub, serving

from gptj import GPTJConfig, GPTJForCausalLM
from gptj.data.hub import check_one_split
from gptj.data.rows import DataError
from gptj.storage.addresses import AddressError, at_commit, normalized, split_hub_data
from gptj.tokenizer import GPTJTokenizer
from gptj_local.processes import free_ports

NEW = "c" * 40
DATA = f"hf://datasets/{REPOSITORY}"


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


FILES = {
    MAIN: {
        "README.md": b"about",
        "data/train-00000-of-00002.jsonl": lines("a", "b"),
        "data/train-00001-of-00002.jsonl": lines("c"),
        "data/test-00000-of-00001.jsonl": lines("t"),
        "more/rows.jsonl": lines("m"),
    },
    OLD: {"rows.jsonl": lines("old")},
}


@pytest.mark.slow
def test_data_sets_are_read_by_id_and_errors_are_clear(tmp_path: Path) -> None:
    """In one process: the hub's client reads its environment when it is imported."""
    addresses = [
        f"{DATA}/data/train-*.jsonl",
        f"{DATA}/more",
        f"{DATA}@old",
        f"{DATA}@main/data/test-00000-of-00001.jsonl",
        f"{DATA}/data",
        f"{DATA}/nothing",
        f"{DATA}/nothing-*.jsonl",
        f"{DATA}@nowhere",
        "hf://datasets/someone/nothing",
        f"hf://datasets/{GATED}",
    ]
    program = f"""
from gptj.data.sources import data_files, read_rows
for address in {addresses!r}:
    try:
        print([row.values["text"] for row in read_rows(address, ["text"])])
    except Exception as error:
        print(type(error).__name__, error)
files = data_files({addresses[0]!r})
print([(file.address, file.size, len(file.version)) for file in files])
print([row.values["text"] for file in files for row in read_rows(file.address, ["text"])])
"""
    with serving(Hub(FILES)) as hub:
        client = Client(tmp_path / "cache")
        found = client.run(hub.endpoint, program)
        assert found[:4] == ["['a', 'b', 'c']", "['m']", "['old']", "['t']"]
        for line, expected in zip(
            found[4:10],
            [
                "DataError hf://datasets/someone/model/data has a training set",
                "DataError hf://datasets/someone/model/nothing: the data set has no such file",
                "NotFoundError no file, folder or match at hf://datasets/someone/model/nothing-*",
                "DataError hf://datasets/someone/model@nowhere: the data set has no such rev",
                "DataError hf://datasets/someone/nothing: the hub has no data set of that name",
                "DataError hf://datasets/someone/gated is gated; remedy: accept its terms",
            ],
            strict=True,
        ):
            assert line.startswith(expected)
        pinned = f"{DATA}@{MAIN}/data/train-0000"
        sizes = [len(FILES[MAIN][f"data/train-0000{n}-of-00002.jsonl"]) for n in range(2)]
        assert found[10] == str([(f"{pinned}{n}-of-00002.jsonl", sizes[n], 40) for n in range(2)])
        assert found[11] == "['a', 'b', 'c']"
        asked = f"""
from gptj.data.sources import read_rows
try:
    list(read_rows({DATA!r}, ["text"]))
except Exception as error:
    print(type(error).__name__, error)
"""
        (offline,) = client.run(hub.endpoint, asked, offline=True)
        assert offline.startswith("UnreachableError") and "HF_HUB_OFFLINE" in offline
    (port,) = free_ports(1)
    (unreachable,) = client.run(f"http://127.0.0.1:{port}", asked)
    assert unreachable.startswith(f"UnreachableError {DATA}: the Hugging Face hub does not answer")


@pytest.mark.slow
def test_a_runs_record_names_the_commits_that_it_read_and_it_resumes_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Branches move before the run resumes: the model's, with other weights, and the data's."""
    config = GPTJConfig(vocab_size=280, n_positions=16, n_embd=8, n_layer=1, n_head=2, rotary_dim=2)
    tokenizer = GPTJTokenizer.train(["a text to learn from"], 280)
    versions = {}
    for commit in (OLD, MAIN):
        folder = tmp_path / commit
        model = GPTJForCausalLM(config)
        model.save_pretrained(str(folder), tokenizer=tokenizer)
        versions[commit] = {path.name: path.read_bytes() for path in folder.iterdir()}
        versions[commit]["rows.jsonl"] = lines("a text", "to learn", "from")
    (port,) = free_ports(1)
    program = f"""
import os, torch
os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}", RANK="0", LOCAL_RANK="0")
os.environ |= dict(WORLD_SIZE="1")
from gptj import storage
from gptj.training import loop
from gptj.training.settings import Settings
from gptj.training.state import upload_state
loop.matrix_peak = lambda device, dtype: 1e12
settings = Settings(
    run=os.environ["RUN"], storage={str(tmp_path)!r}, steps=int(os.environ["STEPS"]), batch_size=2,
    model=dict(checkpoint={REPOSITORY!r}, revision="old"), adapter={{}},
    data=dict(train="{DATA}@main/rows.jsonl", sequence_length=16),
)
def report(metrics, folder, name, fence):
    upload_state(folder, storage.join(settings.folder, name), 0, 1, fence)
torch.distributed.init_process_group("gloo", rank=0, world_size=1)
commit = os.environ["COMMIT"] or None
loop.train(settings, loop.Worker(0, 1, torch.device("cpu"), report, commit=commit))
"""

    def train(steps: int) -> dict[str, Any]:
        monkeypatch.setenv("STEPS", str(steps))
        client.run(hub.endpoint, program)
        record = tmp_path / os.environ["RUN"] / "model/training.json"
        training: dict[str, Any] = json.loads(record.read_text())
        return training

    monkeypatch.setenv("RUN", "run")
    monkeypatch.setenv("COMMIT", "")

    with serving(Hub(versions)) as hub:
        client = Client(tmp_path / "cache")
        trained = train(1)
        assert sum(path.endswith("/revision/old") for path in hub.requests) == 1  # for all files
        assert trained["checkpoint"]["revision"] == "old"
        assert trained["checkpoint"]["commit"] == OLD
        assert trained["data"]["train"]["commit"] == MAIN
        assert trained["settings"]["model"]["revision"] == "old"
        base = json.loads((tmp_path / "run/model/base.json").read_text())
        assert base["commit"] == OLD
        monkeypatch.setitem(BRANCHES, "old", MAIN)
        monkeypatch.setitem(BRANCHES, "main", NEW)
        monkeypatch.setitem(BRANCHES, NEW, NEW)
        versions[NEW] = {**versions[MAIN], "rows.jsonl": lines("other", "rows")}
        extended = train(2)
        assert extended["steps"] == 2
        assert extended["checkpoint"] == trained["checkpoint"]
        assert extended["data"] == trained["data"]
        monkeypatch.setenv("RUN", "checked-before")
        monkeypatch.setenv("COMMIT", OLD)
        assert train(1)["checkpoint"] == trained["checkpoint"]


@pytest.mark.slow
def test_a_run_resumes_with_what_it_prepared_wherever_its_datas_branch_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the hub too; and what it had prepared is made again from the same commit."""
    versions = {OLD: {"rows.jsonl": lines("a text", "to learn", "from")}}
    program = f"""
import os, shutil
from gptj.data.prepared import Prepared
from gptj.data.preparing import prepare
from gptj.tokenizer import GPTJTokenizer
from gptj.training.dataset import prepare_run_data
from gptj.training.settings import Settings
data = dict(train={DATA!r}, sequence_length=16, evaluation_split=0.5)
settings = Settings(storage={str(tmp_path)!r}, data=data)
tokenizer = GPTJTokenizer.train(["a text to learn from"], 280)
checkpoint = os.environ["CHECKPOINT"] or None
commits = dict.fromkeys(("train", "evaluation"), {OLD!r}) if checkpoint else dict()
if "DELETE" in os.environ:
    shutil.rmtree(os.path.join(settings.folder, "data"))
found = prepare_run_data(settings.pinned(None, commits), tokenizer, checkpoint, prepare)
for address in found.values():
    print(Prepared.at(address).commit, Prepared.at(address).digest)
"""
    monkeypatch.setenv("CHECKPOINT", "")
    monkeypatch.setitem(BRANCHES, "main", OLD)
    with serving(Hub(versions)) as hub:
        client = Client(tmp_path / "cache")
        before = client.run(hub.endpoint, program)
        assert [line.split()[0] for line in before] == [OLD, OLD]
        monkeypatch.setenv("CHECKPOINT", "checkpoint-1")
        versions[MAIN] = {"rows.jsonl": lines("other", "rows")}
        monkeypatch.setitem(BRANCHES, "main", MAIN)
        assert client.run(hub.endpoint, program) == before
        assert client.run(hub.endpoint, program, offline=True) == before
        monkeypatch.setenv("DELETE", "1")
        assert client.run(hub.endpoint, program) == before


def test_addresses_of_the_hub() -> None:
    assert at_commit(f"{DATA}@main/data/*.csv", OLD) == f"{DATA}@{OLD}/data/*.csv"
    assert at_commit(DATA, OLD) == f"{DATA}@{OLD}"
    assert normalized(f"{DATA}@main/data/", samples=True) == f"{DATA}@main/data"
    assert split_hub_data("hf://datasets/a/b@v1/c/d*.csv") == ("a/b", "v1", "c/d*.csv")
    with pytest.raises(AddressError, match="which can only be read as data"):
        normalized(DATA)
    with pytest.raises(AddressError, match=r"is hf://datasets/OWNER/NAME.* got 'hf://datasets/a'"):
        normalized("hf://datasets/a", samples=True)
    with pytest.raises(AddressError, match=r"on the hub, hf://datasets/a/b$"):
        normalized("https://huggingface.co/datasets/a/b/tree/main", samples=True)


def test_one_of_several_splits_must_be_chosen() -> None:
    check_one_split(DATA, ["data/train-00000-of-00001.parquet", "more/constraint.jsonl"])
    check_one_split(DATA, ["test.csv"])
    with pytest.raises(DataError, match=r"choose one, as in .*/data/train-\*\.parquet$"):
        names = ["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"]
        check_one_split(DATA, names)

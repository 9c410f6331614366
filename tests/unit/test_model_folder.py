"""A model folder is opened once: counted requests to a real S3 server, and none to Ray."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_s3 import FaultyS3

from deployments.loading import Arguments, check, load, load_from, open_checkpoint
from gptj import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJTokenizer,
    storage,
)
from gptj.checkpoints import folder as folder_module
from gptj.checkpoints.cache import FOLDER_VARIABLE, SIZE_VARIABLE
from gptj.checkpoints.folder import ModelFolder
from gptj.checkpoints.manifest import MANIFEST
from gptj.errors import CheckpointError
from gptj.pretrained import GPTJPreTrainedModel
from gptj_local.s3 import LocalS3

HEADS = (GPTJForCausalLM, GPTJForSequenceClassification, GPTJForQuestionAnswering)
CONFIG = GPTJConfig(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)
TRAINING = {"settings": {"data": {"stride": 7}}}


def write(cls: type[GPTJPreTrainedModel], shards: int) -> str:
    """A folder in S3 with a tokenizer and training.json."""
    address = f"s3://gptj/{secrets.token_hex(6)}/model"
    model = cls(CONFIG)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    tokenizer = GPTJTokenizer.train(["some text to learn from"], 280)
    limit = size if shards == 1 else 7 * size // 10
    model.save_pretrained(address, tokenizer=tokenizer, training=TRAINING, max_shard_size=limit)
    return address


@pytest.fixture
def proxy(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A proxy between us and the server that counts requests."""
    with FaultyS3.before(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def requests(proxy: FaultyS3, action: Callable[[], Any]) -> list[str]:
    """Methods and paths of an action's requests, but for parts of weights."""
    del proxy.requests[:]
    action()
    return [
        f"{each.method} {each.path}"
        for each in proxy.requests
        if not each.path.partition("?")[0].endswith(".safetensors")
    ]


def deployed(cls: type[GPTJPreTrainedModel], arguments: Arguments) -> None:
    """A replica's reads: for question answering the training's settings too."""
    with open_checkpoint(arguments, cls) as folder:
        load_from(folder, cls, arguments, torch.device("cpu"))
        assert folder.read_training_data() == {"stride": 7}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__)
def test_loading_takes_five_requests_at_most_beside_the_weights(
    cls: type[GPTJPreTrainedModel], shards: int, proxy: FaultyS3
) -> None:
    address = write(cls, shards)
    arguments = Arguments(checkpoint=address)
    for action, most in (
        (lambda: GPTJConfig.from_pretrained(address), 2),
        (lambda: GPTJTokenizer.from_pretrained(address), 3),
        (lambda: cls.from_pretrained(address), 2),
        (lambda: check(cls, arguments), 5),
        (lambda: load(cls, arguments), 4),
        (lambda: deployed(cls, arguments), 5),
    ):
        found = requests(proxy, action)
        assert len(found) <= most, found
        assert not any(each.startswith("HEAD") for each in found), found


def test_the_weights_files_take_two_requests_each(proxy: FaultyS3) -> None:
    """One for the header, one for a part of up to 16 MiB."""
    address = write(GPTJForCausalLM, 2)
    del proxy.requests[:]
    GPTJForCausalLM.from_pretrained(address)
    assert sum(".safetensors" in each.path for each in proxy.requests) == 4


@pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__)
def test_a_cached_replica_reads_nothing_else_from_s3(
    cls: type[GPTJPreTrainedModel],
    proxy: FaultyS3,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second replica only requests the manifest from S3."""
    address = write(cls, 1)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv(SIZE_VARIABLE, "1")
    arguments = Arguments(checkpoint=address)
    deployed(cls, arguments)
    del proxy.requests[:]
    deployed(cls, arguments)
    assert [each.path.rpartition("/")[2] for each in proxy.requests] == [MANIFEST]


def test_a_model_keeps_the_cached_files_it_has_mapped(
    s3: LocalS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = write(GPTJForCausalLM, 1)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv(SIZE_VARIABLE, "1")
    with ModelFolder.open(address, weights=True) as folder:
        model = GPTJForCausalLM.from_folder(folder)
    (lock,) = tmp_path.glob("*.lock")
    program = f"""
import sys
from pathlib import Path
from gptj.storage.file_lock import FileLock
print(FileLock(Path({str(lock)!r})).try_take())
"""

    def free() -> str:
        return subprocess.check_output([sys.executable, "-c", program], text=True).strip()

    assert free() == "False"
    del model
    assert free() == "True"


@pytest.mark.parametrize("change", ["missing", "truncated"])
@pytest.mark.parametrize(
    "name", ["config.json", "model-00002-of-00002.safetensors", "tokenizer.json"]
)
def test_damage_is_named_without_a_listing(name: str, change: str, s3: LocalS3) -> None:
    address = write(GPTJForCausalLM, 2)
    file = storage.join(address, name)
    content = storage.read_bytes(file)
    storage.delete(file)
    if change == "truncated":
        storage.write_bytes(file, content[:-1])
    with pytest.raises(CheckpointError, match=rf"{name}.* {change}"):
        load(GPTJForCausalLM, Arguments(checkpoint=address))


@pytest.mark.slow
def test_loading_outside_a_cluster_does_not_start_one(tmp_path: Path) -> None:
    """Not even by a question to Ray about GPUs."""
    GPTJForCausalLM(CONFIG).save_pretrained(
        tmp_path / "m", tokenizer=GPTJTokenizer.train(["some text"], 280)
    )
    program = f"""
import ray
from deployments.device import replica_device
from deployments.loading import Arguments, load
from gptj import GPTJForCausalLM
load(GPTJForCausalLM, Arguments(checkpoint={str(tmp_path / "m")!r}))
load(GPTJForCausalLM, Arguments(checkpoint={str(tmp_path / "m")!r}), replica_device())
assert not ray.is_initialized()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_weights_of_a_hub_id_come_from_the_commit_of_its_small_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its branch may move while the room for the model is checked."""
    commits = iter(["a" * 40, "b" * 40])
    asked: list[str | None] = []

    def locate(address: str, *, revision: str | None, patterns: Sequence[str]) -> str:
        asked.append(revision)
        commit = next(commits) if revision == "main" else revision
        place = tmp_path / "models--someone--model" / "snapshots" / str(commit)
        place.mkdir(parents=True, exist_ok=True)
        (place / "model.safetensors").touch()
        return str(place)

    monkeypatch.setattr(folder_module, "locate", locate)
    opened = ModelFolder.open(
        "someone/model", revision="main", weights=True, before_weights=lambda folder: None
    )
    assert asked == ["main", "a" * 40]
    assert opened.commit == "a" * 40

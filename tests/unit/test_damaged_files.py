"""Damaged files are refused by name, without a crash, a hang, or memory beyond their size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj.checkpoints.folder import trained_labels, training_data
from gptj.checkpoints.manifest import LIMIT_BYTES, MANIFEST, FolderWriter, Manifest
from gptj.checkpoints.tensor_file import read_header
from gptj.checkpoints.weights import TensorSpec, read_weights, write_weights
from gptj.errors import CheckpointError

CONFIG = GPTJConfig(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)
LOOP = Path(__file__).parents[1] / "support" / "damaged_files.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in three shards, with a tokenizer and training.json, without a manifest."""
    folder = tmp_path_factory.mktemp("damaged") / "good"
    torch.manual_seed(0)
    state = GPTJForCausalLM(CONFIG).state_dict()
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in state.items()]
    with FolderWriter(str(folder)) as writer:
        write_weights(writer, specs, state.values(), sum(spec.size for spec in specs) * 2 // 5)
        for name, content in GPTJTokenizer.train(["some text"], 280).files().items():
            writer.write(name, content)
        writer.write("training.json", b'{"settings": {"data": {"stride": 3}}, "steps": 1}')
        writer.write("config.json", CONFIG.to_json().encode())
    (folder / MANIFEST).unlink()
    return folder


@pytest.mark.slow
def test_random_damage_is_refused_by_name(folder: Path) -> None:
    """Bit flips, truncation, false values and nesting, in a process with little spare memory."""
    assert (folder / "model-00002-of-00003.safetensors").exists()
    command = [sys.executable, str(LOOP), str(folder), "0", "150"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    refused = json.loads(done.stdout)
    assert all(30 < times <= 150 for times in refused.values()), refused


def header_file(path: Path, header: object, data: bytes = bytes(64)) -> str:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return str(path)


def tensor(dtype: object, shape: object, *offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": tensor("F32", [2**40, 2**20], 0, 64)}, "its data_offsets"),
        ({"a": tensor("F32", [2**40, 2**40], 0, 64)}, "is too large"),
        ({"a": tensor("F32", [-4, -4], 0, 64)}, "is not a valid shape"),
        ({"a": tensor("F32", [True, 16], 0, 64)}, "is not a valid shape"),
        ({"a": tensor("F32", [16.0], 0, 64)}, "is not a valid shape"),
        ({"a": tensor("F32", [1] * 9, 0, 4)}, "is not a valid shape"),
        ({"a": tensor("F32", [16], 0, 2**63)}, "are not valid data_offsets"),
        ({"a": tensor("F32", [16], 0)}, "are not valid data_offsets"),
        ({"a": tensor("F32", [16], -64, 0)}, "are not valid data_offsets"),
        ({"a": tensor("F32", [2**30], 0, 2**32)}, "truncated"),
        ({"a": tensor("F32", [8], 0, 32)}, "damaged"),
        ({"a": tensor("F32", [8], 0, 32), "b": tensor("F32", [8], 16, 48)}, "overlap"),
        ({"a": tensor("F32", [8], 0, 32), "b": tensor("F32", [4], 48, 64)}, "leave a gap"),
        ({"a": tensor("F16", [16], 0, 64)}, "its shape needs 32 bytes, its data_offsets span 64"),
        ({"a": tensor("F7", [16], 0, 64)}, "'F7' is not one of"),
        ({"a": tensor([], [16], 0, 64)}, "is not one of"),
        ({"a": 3}, "does not describe a tensor"),
        ([], "not a JSON object"),
        (b"[" * 10**6, "damaged"),
        (b"\xff\xfe\xfd", "damaged"),
        (b"1" * 10_000, "damaged"),
    ],
)
def test_a_lying_header_is_refused_with_its_reason(
    header: object, said: str, tmp_path: Path
) -> None:
    address = header_file(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        read_header(address)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 1000
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        list(read_weights(str(tmp_path), None))


@pytest.mark.parametrize("length", [2**31, 2**63, 2**64 - 1])
def test_a_huge_header_is_not_read(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=f"should have {length} bytes"):
        read_header(str(path))


@pytest.mark.parametrize("name", ["config.json", MANIFEST, "tokenizer.json"])
def test_a_huge_small_file_is_not_read(name: str, tmp_path: Path) -> None:
    """As a sparse file, which has a size but takes no disk."""
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    with open(tmp_path / name, "wb") as file:
        file.truncate(2**40)
    read = GPTJTokenizer if name == "tokenizer.json" else GPTJForCausalLM
    with pytest.raises(
        CheckpointError, match=f"{name} is damaged: it has {2**40} bytes.*limit of {LIMIT_BYTES}"
    ):
        read.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layer", 10**9),
        ("n_layer", 99),
        ("vocab_size", 10**12),
        ("n_embd", 2**30),
        ("n_inner", 2**50),
        ("num_labels", 10**10),
        ("id2label", [1]),
        ("label2id", {"a": []}),
        ("layer_norm_epsilon", "x"),
        ("resid_pdrop", None),
        ("activation_function", []),
        ("architectures", 3),
        ("eos_token_id", "x"),
        ("dtype", 5),
        ("to_dict", 1),
        ("self", 1),
    ],
)
def test_an_impossible_configuration_is_refused(
    field: str, value: object, folder: Path, tmp_path: Path
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    fields = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    if field in ("num_labels", "label2id"):
        del fields["id2label"], fields["label2id"]
    (tmp_path / "config.json").write_text(json.dumps({**fields, field: value}))
    with pytest.raises(CheckpointError, match=str(tmp_path)) as caught:
        GPTJForCausalLM.from_pretrained(str(tmp_path))
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"format": 1, "files": {"../x": {"size": 1, "sha256": "%s"}}}', "not inside the folder"),
        (
            b'{"format": 1, "files": {"/etc/x": {"size": 1, "sha256": "%s"}}}',
            "not inside the folder",
        ),
        (b'{"format": 1, "files": {"x": {"size": -1, "sha256": "%s"}}}', "-1 is not a valid size"),
        (
            b'{"format": 1, "files": {"x": {"size": 1e3, "sha256": "%s"}}}',
            "1000.0 is not a valid size",
        ),
        (b'{"format": 1, "files": {"x": {"size": 1, "sha256": "%sff"}}}', "is not a SHA-256"),
        (b'{"format": 1, "files": {"x": {"size": 1}, "%s": 1}}', "not a size and sha256"),
        (b'{"format": 1, "files": ["%s"]}', "no list of files"),
        (b'{"format": 2, "files": {"%s": 1}}', "format 2; this version reads 1"),
        (b'["%s"]', "not a JSON object"),
    ],
)
def test_a_lying_manifest_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(content % (b"0" * 64))
    with pytest.raises(CheckpointError, match=r"manifest\.json") as caught:
        Manifest.read(str(tmp_path))
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [b"[1]", b'{"settings": 3}', b'{"settings": {"data": []}}'])
def test_a_damaged_training_file_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"x/training\.json is damaged"):
        training_data(content, "x/training.json")
    assert training_data(b"{}", "x/training.json") == {}


@pytest.mark.parametrize(
    "labels", ["[1]", "3", '{"written": ["a"]}', '{"written": {"a": "b"}}', '{"a": 1}']
)
def test_damaged_labels_in_a_training_file_are_refused(labels: str) -> None:
    content = f'{{"labels": {labels}}}'.encode()
    with pytest.raises(CheckpointError, match=r"x/training\.json is damaged: its labels"):
        trained_labels(content, "x/training.json")
    for nothing in (b"{}", b'{"labels": null}'):
        assert trained_labels(nothing, "x/training.json") == {}

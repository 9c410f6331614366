"""jobs/export_weights.py: a model folder in, one for other programs out, and back unchanged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gptj import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
    GPTJTokenizer,
    storage,
)
from gptj.checkpoints.manifest import FolderWriter, verify
from gptj.checkpoints.weights import TensorSpec, read_weights
from gptj.interop import msgpack_file
from gptj.interop.exporter import ExportFormat, export_weights
from gptj.interop.hdf5 import Group, index_hdf5, plan_hdf5
from gptj.interop.importer import import_weights
from gptj.interop.msgpack_file import index_msgpack, plan_msgpack
from gptj.interop.pieces import write_pieces
from gptj.pretrained import GPTJPreTrainedModel
from gptj_local.s3 import LocalS3

JOB = Path(__file__).parents[2] / "jobs" / "export_weights.py"
CONFIG = GPTJConfig(
    vocab_size=300, n_positions=64, n_embd=32, n_layer=12, n_head=4, rotary_dim=4, num_labels=3
)


def make(cls: type[GPTJPreTrainedModel] = GPTJForCausalLM, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = GPTJConfig.from_dict({**CONFIG.to_dict(), **fields})
    if cls is GPTJForQuestionAnswering:
        config.num_labels = 2
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


HEADS: list[tuple[ExportFormat, type[GPTJPreTrainedModel]]] = [
    ("huggingface", GPTJForCausalLM),
    ("flax", GPTJModel),
    ("flax", GPTJForCausalLM),
    ("tensorflow", GPTJModel),
    ("tensorflow", GPTJForSequenceClassification),
    ("tensorflow", GPTJForQuestionAnswering),
]


@pytest.mark.slow
@pytest.mark.parametrize(("format", "cls"), HEADS)
@pytest.mark.parametrize("files", ["one", "shards"])
def test_an_export_reimports_bit_identical(
    format: ExportFormat, cls: type[GPTJPreTrainedModel], files: str, tmp_path: Path
) -> None:
    model = make(cls)
    tokenizer = GPTJTokenizer.train(["some text to learn from"], 280)
    model.save_pretrained(str(tmp_path / "model"), tokenizer=tokenizer)
    shard_bytes = 10**9 if files == "one" else 250_000
    exported, back = str(tmp_path / "exported"), str(tmp_path / "back")
    export_weights(str(tmp_path / "model"), exported, format=format, shard_bytes=shard_bytes)
    verify(exported)
    names = {file.name for file in storage.list_files(exported)}
    assert any(name.endswith(".index.json") for name in names) == (files == "shards")
    for name in names:
        if "-of-" in name:
            assert (
                tmp_path / "exported" / name
            ).stat().st_size < shard_bytes + 100_000  # names beside weights
    import_weights(exported, back)
    found = cls.from_pretrained(back)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert GPTJTokenizer.from_pretrained(back).encode("text") == tokenizer.encode("text")


@pytest.mark.parametrize("format", ["huggingface", "flax", "tensorflow"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_dtype_exports_to_every_format_on_s3(
    format: ExportFormat, dtype: str, tmp_path: Path, s3: LocalS3
) -> None:
    model = make(n_layer=1)
    source, exported, back = (f"s3://gptj/{tmp_path.name}/{name}" for name in "abc")
    model.save_pretrained(source)
    export_weights(source, exported, format=format, dtype=dtype)
    import_weights(exported, back)
    found = GPTJForCausalLM.from_pretrained(back)
    for name, tensor in model.to(getattr(torch, dtype)).state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_transformers_loads_a_sharded_export(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(str(tmp_path / "model"))
    exported = tmp_path / "exported"
    export_weights(
        str(tmp_path / "model"), str(exported), format="huggingface", shard_bytes=100_000
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokens = torch.tensor([[1, 2, 3, 250]])
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-3
        )


@pytest.mark.parametrize("format", ["flax", "tensorflow"])
def test_tied_embeddings_are_duplicated_in_formats_without_tying(
    format: ExportFormat, tmp_path: Path
) -> None:
    model = make(tie_word_embeddings=True)
    model.save_pretrained(str(tmp_path / "model"))
    export_weights(str(tmp_path / "model"), str(tmp_path / "exported"), format=format)
    import_weights(str(tmp_path / "exported"), str(tmp_path / "back"))
    found = GPTJForCausalLM.from_pretrained(str(tmp_path / "back"))
    assert not found.config.tie_word_embeddings
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)
    assert torch.equal(found.transformer.wte.weight, model.transformer.wte.weight)


def test_an_unsupported_head_is_refused(tmp_path: Path) -> None:
    make(GPTJForSequenceClassification).save_pretrained(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="is a GPTJForSequenceClassification; the format supports"):
        export_weights(str(tmp_path / "model"), str(tmp_path / "exported"), format="flax")
    assert storage.list_files(str(tmp_path / "exported")) == []


def write(folder: Path, pieces: Any, tensors: list[torch.Tensor]) -> str:
    with FolderWriter(str(folder)) as writer:
        write_pieces(writer, "file", pieces, iter(tensors))
    return str(folder / "file")


def test_arrays_above_flaxs_limit_are_chunked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flax's own limit is 1 GiB; here a hundred bytes."""
    monkeypatch.setattr(msgpack_file, "CHUNK_BYTES", 100)
    tensors = {"a/b": torch.randn(7, 11), "a/c": torch.randn(5), "d": torch.tensor(2.0)}
    specs = {path: TensorSpec(path, tuple(t.shape), t.dtype) for path, t in tensors.items()}
    address = write(tmp_path / "m", plan_msgpack(specs), list(tensors.values()))
    found = {tensor.name: tensor for tensor in index_msgpack(address)}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name].load(torch.float32), tensor), name
    import msgpack

    tree = msgpack.unpackb(Path(address).read_bytes())
    pieces = tree["a"]["b"]
    assert list(pieces) == ["__msgpack_chunked_array__", "shape", "chunks"]
    assert pieces["shape"] == {"0": 7, "1": 11}
    assert list(pieces["chunks"]) == ["0", "1", "2", "3"]


def test_long_lists_of_names_are_split_as_in_keras(tmp_path: Path) -> None:
    """An attribute of HDF5 ends at 64 KB; Keras goes on with name0, name1, …"""
    import h5py

    names = [f"{'long' * 100}_{number}" for number in range(400)]
    spec = TensorSpec("x", (2, 3), torch.float32)
    address = write(
        tmp_path / "m",
        plan_hdf5([Group("/", [("x", spec)], {"names": names})]),
        [torch.arange(6.0).view(2, 3)],
    )
    with h5py.File(address, "r") as file:
        parts = [file.attrs[f"names{number}"] for number in range(len(file.attrs))]
        assert [name.decode() for part in parts for name in part] == names
        assert file["x"][()].tolist() == [[0, 1, 2], [3, 4, 5]]
    (found,) = index_hdf5(address)
    assert torch.equal(found.load(torch.float32), torch.arange(6.0).view(2, 3))


@pytest.mark.slow
def test_the_command_prints_the_address(tmp_path: Path) -> None:
    make(n_layer=1).save_pretrained(str(tmp_path / "model"))
    command = [sys.executable, str(JOB), str(tmp_path / "model"), str(tmp_path / "exported")]
    arguments = ["--format", "flax", "--dtype", "bfloat16", "--shard-bytes", "50000"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'exported'}\n"
    assert "s left" in done.stderr
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "bfloat16"
    wrong = subprocess.run([*command, "--format", "onnx"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "invalid choice: 'onnx'" in wrong.stderr
    assert not dict(read_weights(str(tmp_path / "model"), None))["lm_head.bias"].isnan().any()

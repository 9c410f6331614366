"""Checkpoints of mesh-transformer-jax, written by a writer of the tests, import as their models."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from mesh_writer import write_checkpoint

from gptj import GPTJConfig, GPTJForCausalLM, storage
from gptj.checkpoints.manifest import verify
from gptj.checkpoints.skeleton import without_weights
from gptj.checkpoints.weights import read_weights
from gptj.errors import CheckpointError
from gptj.interop.importer import import_weights
from gptj.interop.mesh_transformer import open_checkpoint
from gptj_local.s3 import LocalS3

TOKENS = torch.tensor([[5, 11, 0, 47, 23, 8, 31]])
# As mesh-transformer-jax writes a model's shape.
MESH_CONFIG = {
    "layers": 12,
    "d_model": 48,
    "n_heads": 24,
    "n_vocab": 48,
    "norm": "layernorm",
    "pe": "rotary",
    "pe_rotary_dims": 2,
    "seq": 32,
    "cores_per_replica": 8,
}


def make(**fields: Any) -> GPTJForCausalLM:
    """Weights that are exact in every dtype, also after the writer has taken a bias from them."""
    shape = {
        "vocab_size": 48,
        "n_positions": 32,
        "n_embd": 48,
        "n_layer": 12,
        "n_head": 24,
        "rotary_dim": 2,
    }
    model = GPTJForCausalLM(GPTJConfig(**{**shape, **fields}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-16, 17, parameter.shape, generator=generator) / 64)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GPTJForCausalLM:
    return make()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(MESH_CONFIG))
    return str(path)


def check_equal(address: str, model: GPTJForCausalLM, dtype: torch.dtype) -> None:
    """Every weight and the logits; the weights' grid is exact, so nothing may differ."""
    found = GPTJForCausalLM.from_pretrained(address)
    assert found.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name].float(), tensor), name
    with torch.no_grad():
        torch.testing.assert_close(
            found.float()(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-5
        )
    verify(address)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shards", "kind", "dtype", "equal_biases"),
    [
        (8, "slim", "bf16", True),
        pytest.param(8, "full", "f32", True, marks=pytest.mark.slow),
        pytest.param(4, "slim", "f16", True, marks=pytest.mark.slow),
        pytest.param(3, "slim", "f32", False, marks=pytest.mark.slow),
        (2, "full", "bf16", False),
        pytest.param(1, "slim", "bf16", True, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_imports_to_the_logits_of_its_model(
    shards: int,
    kind: str,
    dtype: str,
    equal_biases: bool,
    model: GPTJForCausalLM,
    config: str,
    tmp_path: Path,
) -> None:
    """Twelve layers, since the order of names as text differs from that of numbers above ten."""
    leaves = write_checkpoint(
        tmp_path / "step_5",
        model.state_dict(),
        shards=shards,
        dtype=dtype,
        full=kind == "full",
        equal_biases=equal_biases,
    )
    assert leaves == (127 if kind == "slim" else 381)
    import_weights(str(tmp_path / "step_5"), str(tmp_path / "model"), config=config)
    stored = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[dtype]
    check_equal(str(tmp_path / "model"), model, stored)


@pytest.mark.slow
@pytest.mark.parametrize(("full", "leaves"), [(False, 287), (True, 861)])
def test_a_model_of_28_layers_has_the_published_number_of_leaves(
    full: bool, leaves: int, tmp_path: Path
) -> None:
    """And the number of layers is found from them."""
    model = make(n_layer=28, n_embd=8, n_head=4)
    source = tmp_path / "step_383500"
    assert write_checkpoint(source, model.state_dict(), shards=2, full=full) == leaves
    tensors = open_checkpoint(str(source), storage.list_files(str(source)), None)
    assert {t.name: t.shape for t in tensors} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    for tensor in tensors:
        assert torch.equal(tensor.load(torch.float32), model.state_dict()[tensor.name]), tensor.name


def test_the_published_shapes_merge_to_the_published_sizes() -> None:
    """The sum check of the 6B checkpoint: 8 shards of 6B's arrays, on paper."""
    model_parameters = 6_050_882_784
    with without_weights():
        model = GPTJForCausalLM(GPTJConfig.preset("6b"))
    assert sum(p.numel() for p in model.parameters()) == model_parameters
    biases_too_many = 7 * 28 * 4096  # fc_out's, in eight shards
    norms_too_many = 7 * (2 * 29) * 4096
    embedding_biases = 8 * 4096
    assert model_parameters + biases_too_many + norms_too_many + embedding_biases == 6_053_381_344


def packed(folder: Path, path: Path) -> Path:
    """A folder as a `.tar.zst` of tar's own making, with other files in it too."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.add(folder, arcname=folder.name)
        note = tarfile.TarInfo(f"{folder.name}/{'long' * 40}/note.txt")  # needs a second header
        note.size = 4
        tar.addfile(note, io.BytesIO(b"note"))
    path.write_bytes(zstandard.compress(content.getvalue()))
    return path


@pytest.mark.parametrize("place", ["folder", "above", "s3", "stream", "stream on s3"])
def test_a_checkpoint_imports_from_any_place(
    place: str, model: GPTJForCausalLM, config: str, tmp_path: Path, s3: LocalS3
) -> None:
    step = tmp_path / "run" / "step_5"
    write_checkpoint(step, model.state_dict(), shards=2)
    (tmp_path / "run" / "meta.json").write_text("{}")
    source, destination = str(step), str(tmp_path / "model")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    if place == "above":
        source = str(tmp_path / "run")
    elif place == "s3":
        source, destination = (f"s3://gptj/{tmp_path.name}/{name}" for name in ("step", "model"))
        storage.upload_folder(step, source)
    elif place.startswith("stream"):
        source = str(packed(step, tmp_path / "step_5_slim.tar.zstd"))
        if place == "stream on s3":
            storage.upload(source, f"s3://gptj/{tmp_path.name}/step.tar.zst")
            source = f"s3://gptj/{tmp_path.name}/step.tar.zst"
    import_weights(source, destination, config=config, scratch=str(scratch))
    check_equal(destination, model, torch.bfloat16)
    assert {file.name for file in scratch.rglob("*") if file.is_file()} <= {"lock"}


def test_sums_are_exact_in_the_requested_dtype(
    model: GPTJForCausalLM, config: str, tmp_path: Path
) -> None:
    """The embedding of a bf16 checkpoint is a sum of bf16 numbers, which float32 holds in full."""
    state = dict(model.state_dict())
    state["transformer.wte.weight"] = state["transformer.wte.weight"] + 2**-12
    write_checkpoint(tmp_path / "step", state, shards=2, dtype="bf16")
    arrays = [
        np.load(tmp_path / "step" / f"shard_{shard}" / "0.npz") for shard in range(2)
    ]  # embedding b, embedding w, …
    as_float = [
        {name: torch.from_numpy(a[name].view(np.int16)).view(torch.bfloat16).float() for name in a}
        for a in arrays
    ]
    expected = torch.cat([a["arr_1"] for a in as_float]) + sum(a["arr_0"] for a in as_float)
    import_weights(str(tmp_path / "step"), str(tmp_path / "model"), config=config, dtype="float32")
    found = dict(read_weights(str(tmp_path / "model"), None))["transformer.wte.weight"]
    assert torch.equal(found, expected)


def spoil(kind: str, step: Path) -> None:
    if kind == "shard":
        shutil.rmtree(step / "shard_1")
    elif kind == "file":
        (step / "shard_1" / "7.npz").unlink()
    elif kind == "leaf":
        content = dict(np.load(step / "shard_1" / "7.npz"))
        content.popitem()
        np.savez(step / "shard_1" / "7.npz", *content.values())
    elif kind == "shape":
        content = dict(np.load(step / "shard_1" / "7.npz"))
        first = content["arr_0"]
        np.savez(step / "shard_1" / "7.npz", first[:-1], *list(content.values())[1:])
    elif kind == "second step":
        shutil.copytree(step, step.parent / "step_6")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shard", "shard_1 is missing"),
        ("file", r"shard_1 has no 7\.npz"),
        ("leaf", "shard_1 has 126 leaves but shard_0 has 127"),
        ("shape", r"shard_1/7\.npz: arr_0\.npy has the shape"),
        ("second step", "several checkpoints.*step_5.*step_6"),
    ],
)
def test_mismatches_are_named(
    kind: str, message: str, model: GPTJForCausalLM, config: str, tmp_path: Path
) -> None:
    step = tmp_path / "run" / "step_5"
    write_checkpoint(step, model.state_dict(), shards=3)
    spoil(kind, step)
    with pytest.raises(CheckpointError, match=message):
        import_weights(str(tmp_path / "run"), str(tmp_path / "model"), config=config)
    assert storage.list_files(str(tmp_path / "model")) == []


def test_an_unpublished_shape_needs_a_configuration(model: GPTJForCausalLM, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step", model.state_dict(), shards=2)
    with pytest.raises(CheckpointError, match=r"12 layers.*\(48, 48\).*give its configuration"):
        import_weights(str(tmp_path / "step"), str(tmp_path / "model"))
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({**MESH_CONFIG, "layers": 11}))
    with pytest.raises(CheckpointError, match=r"dimensions|does not match|shape"):
        import_weights(str(tmp_path / "step"), str(tmp_path / "model"), config=str(wrong))
    wrong.write_text(json.dumps({**MESH_CONFIG, "pe": "fixed"}))
    with pytest.raises(CheckpointError, match="pe='rotary', got 'fixed'"):
        import_weights(str(tmp_path / "step"), str(tmp_path / "model"), config=str(wrong))

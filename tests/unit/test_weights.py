"""Weights from S3: every byte in its place, wherever requests are split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gptj import GPTJConfig, GPTJForCausalLM, GPTJModel, storage
from gptj.checkpoints import weights
from gptj.checkpoints.manifest import FolderWriter, Manifest
from gptj.checkpoints.weights import TensorSpec, read_weights, write_weights
from gptj.errors import CheckpointError
from gptj.interop.importer import import_weights
from gptj.pretrained import GPTJPreTrainedModel
from gptj_local.s3 import LocalS3

SIZES = (1, 3, 500, 499, 2000, 7, 7, 1003, 11, 5000, 250, 250)


@pytest.mark.parametrize("part_bytes", [7, 100, 1000, 10**6])
def test_tensors_may_be_anywhere_in_a_request(
    part_bytes: int, tmp_path: Path, s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests within a tensor, across several, and along their edges; hashes fit as well."""
    sizes = SIZES[:3] if part_bytes == 7 else SIZES
    tensors = {f"t{i}": torch.randn(size).half() for i, size in enumerate(sizes)}
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    address = f"s3://gptj/{tmp_path.name}"
    with FolderWriter(address) as writer:
        write_weights(writer, specs, tensors.values(), shard_bytes=7000)
    monkeypatch.setattr(storage, "PART_BYTES", part_bytes)
    monkeypatch.setattr(weights, "RUN_BYTES", 1500)
    found = dict(read_weights(address, Manifest.read(address)))
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_reading_can_be_cancelled_at_any_time(tmp_path: Path, s3: LocalS3) -> None:
    tensors = {f"t{i}": torch.randn(100) for i in range(20)}
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    address = f"s3://gptj/{tmp_path.name}"
    with FolderWriter(address) as writer:
        write_weights(writer, specs, tensors.values(), shard_bytes=1000)
    coming = read_weights(address, Manifest.read(address))
    next(coming)
    coming.close()  # type: ignore[attr-defined]  # which waits for its threads: it must not hang


TINY = GPTJConfig(vocab_size=300, n_positions=8, n_embd=8, n_layer=2, n_head=2, rotary_dim=2)
WTE = "wte.weight"


@pytest.mark.parametrize("place", ["folder", "s3", "pickles"])
@pytest.mark.parametrize("twice", [WTE, f"transformer.{WTE}"])
@pytest.mark.parametrize("cls", [GPTJModel, GPTJForCausalLM])
def test_a_tensor_in_two_files_is_refused_with_the_names_of_both(
    cls: type[GPTJPreTrainedModel],
    twice: str,
    place: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """By either name: it would be chance which of them counts."""
    kind = "pytorch_model" if place == "pickles" else "model"
    ending = "bin" if place == "pickles" else "safetensors"
    state = {name: each.clone() for name, each in cls(TINY).state_dict().items()}
    (name,) = (name for name in state if name.endswith(WTE))
    masks = {f"transformer.h.0{end}": torch.ones(1) for end in weights.OLD_BUFFERS}
    parts = {
        f"{kind}-00001-of-00002.{ending}": {**state, **masks},
        f"{kind}-00002-of-00002.{ending}": {twice: state[name] + 1, **masks},
    }
    one, two = parts
    for file, tensors in parts.items():
        if place == "pickles":
            torch.save(tensors, tmp_path / file)
        else:
            save_file(tensors, tmp_path / file)
    index = {"weight_map": {**dict.fromkeys(state, one), "other": two}}
    (tmp_path / f"{kind}.{ending}.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(TINY.to_json())
    address = str(tmp_path)
    if place == "s3":
        request.getfixturevalue("s3")
        address = f"s3://gptj/{tmp_path.name}"
        storage.upload_folder(tmp_path, address)
    with pytest.raises(CheckpointError) as refused:
        cls.from_pretrained(address)
    assert str(refused.value) == (
        f"{address}/{one} has {name}, and {address}/{two} has {twice}, which is the same tensor; "
        f"remedy: delete the one that is not the model's"
    )
    with pytest.raises(CheckpointError, match=f"has .*{WTE} twice"):
        import_weights(address, str(tmp_path.parent / "imported"))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "U16", "F4"])
def test_a_dtype_that_is_not_supported_is_no_damage(dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    fields = {"x": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}
    header = json.dumps(fields).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError) as refused:
        list(read_weights(str(tmp_path), None))
    assert str(refused.value) == (
        f"{file} has 'x' in the dtype {dtype}, which is not supported; remedy: the model in F16, "
        f"BF16 or F32"
    )

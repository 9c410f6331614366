"""Folders that Flax's and TensorFlow's classes saved (tests/interop/parity.py made them).

They import to what those classes compute, and our export has the same form as their files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import msgpack
import numpy as np
import pytest
import torch

import gptj
from gptj.interop.exporter import ExportFormat, export_weights
from gptj.interop.importer import import_weights
from gptj.pretrained import GPTJPreTrainedModel

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
SHARD_BYTES = 12_000  # as the fixtures' own


def imported(name: str, folder: Path) -> GPTJPreTrainedModel:
    import_weights(str(FIXTURES / name), str(folder))
    cls = getattr(gptj, name.removesuffix("-shards").removeprefix("Flax").removeprefix("TF"))
    return cls.from_pretrained(str(folder))  # type: ignore[no-any-return]


def test_every_class_has_a_fixture() -> None:
    assert NAMES == [
        "FlaxGPTJForCausalLM",
        "FlaxGPTJForCausalLM-shards",
        "FlaxGPTJModel",
        "TFGPTJForCausalLM",
        "TFGPTJForQuestionAnswering",
        "TFGPTJForSequenceClassification",
        "TFGPTJModel",
        "TFGPTJModel-shards",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_imported_fixtures_compute_the_same_outputs(name: str, tmp_path: Path) -> None:
    """Outputs of about 1 in float32; three programs add in different orders."""
    expected = json.loads((FIXTURES / name / "expected.json").read_text())
    model = imported(name, tmp_path / "ours")
    with torch.no_grad():
        found = model(torch.tensor(expected["input_ids"]))
    for output, values in expected["outputs"].items():
        torch.testing.assert_close(found[output], torch.tensor(values), rtol=0, atol=1e-4)


def read_flax(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by their paths: MessagePack's own reader, and Flax's extension."""

    def array(code: int, data: bytes) -> np.ndarray:
        assert code == 1
        shape, dtype, content = msgpack.unpackb(data)
        return np.frombuffer(content, dtype).reshape(shape)

    def walk(tree: dict[str, Any], path: str) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for key, value in tree.items():
            if isinstance(value, dict):
                found |= walk(value, f"{path}{key}/")
            else:
                found[path + key] = value
        return found

    return walk(msgpack.unpackb(path.read_bytes(), ext_hook=array), "")


def read_tensorflow(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by their paths, and the lists of names by theirs."""
    found: dict[str, np.ndarray] = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if name == "top_level_model_weights":  # Keras's own, empty, and read by no class
            return
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]
        for attribute in ("layer_names", "weight_names"):
            if attribute in item.attrs:
                found[f"{name}@{attribute}"] = np.sort(item.attrs[attribute].astype(bytes))

    with h5py.File(path, "r") as file:
        visit("", file)
        file.visititems(visit)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_our_export_has_the_same_layout_as_their_files(name: str, tmp_path: Path) -> None:
    """The same files, and in them the same names, shapes and numbers: so their classes read it."""
    imported(name, tmp_path / "ours")
    format: ExportFormat = "flax" if name.startswith("Flax") else "tensorflow"
    pattern, read = {
        "flax": ("*.msgpack", read_flax),
        "tensorflow": ("*.h5", read_tensorflow),
    }[format]
    export_weights(
        str(tmp_path / "ours"),
        str(tmp_path / "back"),
        format=format,
        shard_bytes=SHARD_BYTES if name.endswith("-shards") else 10**9,
    )
    theirs: dict[str, np.ndarray] = {}
    ours: dict[str, np.ndarray] = {}
    for folder, arrays in ((FIXTURES / name, theirs), (tmp_path / "back", ours)):
        for path in sorted(folder.glob(pattern)):
            arrays |= read(path)
    if name.endswith("-shards"):  # which tensor is in which file is free, and so are these lists
        for arrays in (ours, theirs):
            arrays.pop("@layer_names", None)
    assert ours.keys() == theirs.keys()
    for key, values in theirs.items():
        np.testing.assert_array_equal(ours[key], values, err_msg=key)
    for index in (FIXTURES / name).glob("*.index.json"):
        found, expected = (
            {name.removeprefix("tfgptj_model_1/").removeprefix("tfgptj_model/") for name in weights}
            for weights in (
                json.loads((folder / index.name).read_text())["weight_map"]
                for folder in (tmp_path / "back", FIXTURES / name)
            )
        )
        assert found == expected

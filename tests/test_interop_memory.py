"""Importing and exporting hold a few tensors, never the model: measured in processes of their own.

The peak is of everything that is resident, mapped files too (VmHWM). Sources are files with holes,
which take no time to make.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptj import GPTJConfig, GPTJForCausalLM, checkpoint
from gptj.interop import flax, tensorflow
from gptj.interop.layout import Layout
from gptj.weights import SINGLE_FILE, TensorSpec, _header

JOBS = Path(__file__).parents[1] / "jobs"
MB = 10**6
MEASURED = """
import runpy, sys

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

import gptj.interop.exporter
before = peak()
job, *sys.argv = sys.argv[1:]
sys.argv.insert(0, job)
runpy.run_path(job, run_name="__main__")
print(before, peak())
"""


def measure(job: str, *words: str) -> tuple[int, int]:
    """Peak resident bytes of a job: after it was imported, and at its end."""
    command = [sys.executable, "-c", MEASURED, str(JOBS / job), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.splitlines()[-1].split())
    return before, peak


def specs_of(n_embd: int, n_layer: int) -> tuple[GPTJConfig, list[TensorSpec]]:
    config = GPTJConfig(
        vocab_size=256, n_positions=64, n_embd=n_embd, n_layer=n_layer, n_head=8, rotary_dim=16
    )
    with torch.device("meta"):
        state = GPTJForCausalLM(config).state_dict()
    return config, [TensorSpec(n, tuple(t.shape), torch.float16) for n, t in state.items()]


def write_holes(path: Path, pieces: Sequence[tuple[bytes, int]]) -> None:
    """Bytes, and after them as many zeros that take no room on disk."""
    with open(path, "wb") as file:
        for content, zeros in pieces:
            file.write(content)
            file.seek(zeros, 1)
        file.truncate(file.tell())


def write_layout(folder: Path, layout: Layout, specs: list[TensorSpec]) -> None:
    cls = GPTJForCausalLM.__name__
    renamed = []
    for spec in specs:
        name, transpose = layout.name(spec.name, cls)
        renamed.append(TensorSpec(name, spec.shape[::-1] if transpose else spec.shape, spec.dtype))
    pieces = layout.plan(renamed, cls, True)
    write_holes(folder / layout.single, [(piece.header, piece.size) for piece in pieces])


def write_mesh(folder: Path, specs: list[TensorSpec], n_layer: int) -> None:
    """One shard, so that a part is as large as its tensor."""
    shapes = {spec.name: spec.shape for spec in specs}
    width = shapes["transformer.wte.weight"][1]
    vector = (width,)
    block = [
        *[(width, width)] * 4,
        (4 * width,),
        (width, 4 * width),
        vector,
        (4 * width, width),
        vector,
        vector,
    ]
    rows = shapes["transformer.wte.weight"][0]
    leaves: list[tuple[int, ...]] = [vector, (rows, width)]
    leaves += [shape for _ in range(n_layer) for shape in block]
    leaves += [(rows,), (width, rows), vector, vector]
    (folder / "shard_0").mkdir()
    for number in range(16):
        arrays: list[Any] = [np.zeros(shape, np.float16) for shape in leaves[number * 31 :][:31]]
        if number == len(leaves) // 31:
            arrays.append(np.int32(1))
        np.savez(folder / "shard_0" / f"{number}.npz", *arrays)


def write_source(kind: str, folder: Path, n_embd: int, n_layer: int) -> list[TensorSpec]:
    folder.mkdir()
    config, specs = specs_of(n_embd, n_layer)
    (folder / "config.json").write_text(config.to_json())
    if kind == "safetensors":
        write_holes(folder / SINGLE_FILE, [(_header(specs), sum(spec.size for spec in specs))])
    elif kind == "pickle":
        with torch.serialization.skip_data():
            state = {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs}
            torch.save(state, folder / "pytorch_model.bin")
    elif kind == "mesh":
        write_mesh(folder, specs, n_layer)
    else:
        write_layout(folder, {"flax": flax, "tensorflow": tensorflow}[kind].LAYOUT, specs)
    return specs


@pytest.mark.slow
def test_a_model_of_twice_the_budget_imports_within_it(tmp_path: Path) -> None:
    """At most three times the largest tensor and 500 MB, everything counted."""
    specs = write_source("flax", tmp_path / "source", n_embd=1024, n_layer=42)
    total, largest = sum(spec.size for spec in specs), max(spec.size for spec in specs)
    budget = 3 * largest + 500 * MB
    assert total > 2 * budget
    destination = tmp_path / "ours"
    _, peak = measure("import_weights.py", str(tmp_path / "source"), str(destination))
    assert peak < budget, f"{peak / MB:.0f} MB for {total / MB:.0f} MB"
    checkpoint.verify(str(destination))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "pickle", "mesh", "tensorflow"])
def test_every_format_imports_tensor_by_tensor(kind: str, tmp_path: Path) -> None:
    """What a job adds to the programs that it needs; 50 MB are for reading a file's contents."""
    specs = write_source(kind, tmp_path / "source", n_embd=512, n_layer=48)
    total, largest = sum(spec.size for spec in specs), max(spec.size for spec in specs)
    config = ["--config", str(tmp_path / "source" / "config.json")]
    words = [str(tmp_path / "source"), str(tmp_path / "ours"), "--dtype", "bfloat16", *config]
    before, peak = measure("import_weights.py", *words)
    assert total > 4 * (3 * largest + 50 * MB)
    assert peak - before < 3 * largest + 50 * MB, f"{(peak - before) / MB:.0f} MB"


@pytest.mark.slow
@pytest.mark.parametrize("format", ["huggingface", "flax", "tensorflow"])
def test_every_format_is_exported_tensor_by_tensor(format: str, tmp_path: Path) -> None:
    specs = write_source("safetensors", tmp_path / "source", n_embd=512, n_layer=48)
    largest = max(spec.size for spec in specs)
    words = [str(tmp_path / "source"), str(tmp_path / "out"), "--format", format]
    before, peak = measure("export_weights.py", *words)
    assert peak - before < 3 * largest + 50 * MB, f"{(peak - before) / MB:.0f} MB"

"""Importing and exporting hold a few tensors, never the model: measured in processes of their own.

The peak is of everything that is resident, mapped files too (VmHWM). Sources are files with holes,
which take no time to make.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptj import GPTJConfig, GPTJForCausalLM
from gptj.adapters.base import Base
from gptj.adapters.config import TARGET_MODULES, LoRAConfig
from gptj.adapters.lora import adapter_parameters, add_lora
from gptj.checkpoints.manifest import verify
from gptj.checkpoints.skeleton import without_weights
from gptj.checkpoints.weights import SINGLE_FILE, TensorSpec
from gptj.interop import flax, tensorflow
from gptj.interop.layout import Layout
from gptj.pretrained.saving import save_adapter_folder

pytestmark = pytest.mark.slow

JOBS = Path(__file__).parents[2] / "jobs"
MB = 10**6
MEASURED = """
import json, logging, runpy, sys

def reset():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

import gptj.interop.merging, gptj.interop.exporter, gptj.interop.importer
for words in json.loads(sys.argv[1]):
    reset()
    before, sys.argv = peak(), words
    runpy.run_path(words[0], run_name="__main__")
    print("peak", before, peak())
"""


def measure(*jobs: Sequence[str]) -> list[tuple[int, int]]:
    """Resident bytes of each job, one after the other in one process: before it, and at most."""
    words = json.dumps([[str(JOBS / job), *rest] for job, *rest in jobs])
    done = subprocess.run([sys.executable, "-c", MEASURED, words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("peak ")]
    return [(int(before), int(peak)) for _, before, peak in lines]


def specs_of(n_embd: int, n_layer: int) -> tuple[GPTJConfig, list[TensorSpec]]:
    config = GPTJConfig(
        vocab_size=256, n_positions=64, n_embd=n_embd, n_layer=n_layer, n_head=8, rotary_dim=16
    )
    with without_weights():
        state = GPTJForCausalLM(config).state_dict()
    return config, [TensorSpec(n, tuple(t.shape), torch.float16) for n, t in state.items()]


def write_holes(path: Path, pieces: Sequence[tuple[bytes, int]]) -> None:
    """Bytes, and after them as many zeros that take no room on disk."""
    with open(path, "wb") as file:
        for content, zeros in pieces:
            file.write(content)
            file.seek(zeros, 1)
        file.truncate(file.tell())


def safetensors_header(specs: list[TensorSpec]) -> bytes:
    fields, end = {}, 0
    for spec in specs:
        place = [end, end + spec.size]
        fields[spec.name] = {"dtype": "F16", "shape": spec.shape, "data_offsets": place}
        end += spec.size
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text


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
        arrays: list[Any] = [np.zeros(shape, np.float16) for shape in leaves[number * 24 :][:24]]
        if number == len(leaves) // 24:
            arrays.append(np.int32(1))
        np.savez(folder / "shard_0" / f"{number}.npz", *arrays)


def write_source(kind: str, folder: Path, n_embd: int, n_layer: int) -> list[TensorSpec]:
    folder.mkdir()
    config, specs = specs_of(n_embd, n_layer)
    (folder / "config.json").write_text(config.to_json())
    if kind == "safetensors":
        size = sum(spec.size for spec in specs)
        write_holes(folder / SINGLE_FILE, [(safetensors_header(specs), size)])
    elif kind == "pickle":
        with torch.serialization.skip_data():
            state = {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs}
            torch.save(state, folder / "pytorch_model.bin")
    elif kind == "mesh":
        write_mesh(folder, specs, n_layer)
    else:
        write_layout(folder, {"flax": flax, "tensorflow": tensorflow}[kind].LAYOUT, specs)
    return specs


def write_adapter(folder: Path, base: Path) -> None:
    """One of all layers, of zeros."""
    with without_weights():
        model = GPTJForCausalLM(GPTJConfig.from_pretrained(base))
        add_lora(model, LoRAConfig(8, target_modules=TARGET_MODULES))
    shapes = {name: tuple(p.shape) for name, p in adapter_parameters(model).items()}
    specs = [TensorSpec(name, shape, torch.float32) for name, shape in shapes.items()]
    zeros = (torch.zeros(spec.shape) for spec in specs)
    assert model.adapter is not None
    config = model.config_to_save()
    save_adapter_folder(folder, config, model.adapter, specs, zeros, base=Base(str(base)))


@pytest.mark.nightly
def test_a_model_twice_the_memory_budget_imports_within_it(tmp_path: Path) -> None:
    """At most three times the largest tensor and 500 MB, everything counted."""
    specs = write_source("flax", tmp_path / "source", n_embd=1024, n_layer=42)
    total, largest = sum(spec.size for spec in specs), max(spec.size for spec in specs)
    budget = 3 * largest + 500 * MB
    assert total > 2 * budget
    destination = str(tmp_path / "ours")
    ((_, peak),) = measure(["import_weights.py", str(tmp_path / "source"), destination])
    assert peak < budget, f"{peak / MB:.0f} MB for {total / MB:.0f} MB"
    verify(destination)


def test_all_conversions_hold_a_few_tensors_in_memory(
    tmp_path: Path,
) -> None:
    """What a job adds to the programs that it needs; 50 MB are for reading a file's contents."""
    # The first job loads what all of them need, PyTorch's own for pickles included, and does not
    # count.
    write_source("pickle", tmp_path / "tiny", n_embd=128, n_layer=1)
    jobs = [["import_weights.py", str(tmp_path / "tiny"), str(tmp_path / "ours-tiny")]]
    for kind in ("safetensors", "pickle", "mesh", "tensorflow", "flax"):
        specs = write_source(kind, tmp_path / kind, n_embd=512, n_layer=18)
        words = [str(tmp_path / kind), str(tmp_path / f"ours-{kind}"), "--dtype", "bfloat16"]
        config = str(tmp_path / kind / "config.json")
        jobs.append(["import_weights.py", *words, "--config", config])
    for format in ("huggingface", "flax", "tensorflow"):
        words = [str(tmp_path / "safetensors"), str(tmp_path / f"out-{format}")]
        jobs.append(["export_weights.py", *words, "--format", format])
    write_adapter(tmp_path / "adapter", tmp_path / "safetensors")
    words = [str(tmp_path / name) for name in ("safetensors", "adapter", "merged")]
    jobs.append(["merge_adapter.py", *words, "--dtype", "float32"])
    total, largest = sum(spec.size for spec in specs), max(spec.size for spec in specs)
    budget = 3 * largest + 50 * MB
    assert total > 2 * budget
    for words, (before, peak) in list(zip(jobs, measure(*jobs), strict=True))[1:]:
        assert peak - before < budget, f"{words}: {(peak - before) / MB:.0f} MB"

#!/usr/bin/env python
"""Flax's and TensorFlow's GPT-J load what we export, and we load what they save, to 1e-4.

    .venv/bin/python tests/interop/parity.py [--environment .interop] [--write-fixtures]

Makes an environment of its own for them (some 2 GB, minutes), since their classes are only in
transformers 4, exports tiny models of each head in each dtype, whole and in shards, and compares
the outputs; then they save models of their own, which we import. `--write-fixtures` also writes
tests/interop/fixtures, which `make test` reads. Prints a line a comparison; ends with 1 if one
is off.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gptj
from gptj import GPTJConfig
from gptj.interop.exporter import ExportFormat, export_weights
from gptj.interop.importer import import_weights
from gptj.pretrained import GPTJPreTrainedModel

HERE = Path(__file__).resolve().parent
FIXTURES = HERE / "fixtures"
TOLERANCE = 1e-4  # of outputs of about 1: three programs add in different orders
TOKENS = [[3, 1, 4, 15, 9, 26, 5, 35, 8, 47]]
CONFIG: dict[str, Any] = {
    "vocab_size": 48,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "rotary_dim": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SHARD, SHARD_BYTES = "12KB", 12_000  # several files, the embedding in one
CLASSES: dict[str, tuple[ExportFormat, str]] = {
    "FlaxGPTJModel": ("flax", "GPTJModel"),
    "FlaxGPTJForCausalLM": ("flax", "GPTJForCausalLM"),
    "TFGPTJModel": ("tensorflow", "GPTJModel"),
    "TFGPTJForCausalLM": ("tensorflow", "GPTJForCausalLM"),
    "TFGPTJForSequenceClassification": ("tensorflow", "GPTJForSequenceClassification"),
    "TFGPTJForQuestionAnswering": ("tensorflow", "GPTJForQuestionAnswering"),
}
LABELS = {"GPTJForSequenceClassification": 3}  # the others have as many as their class needs


@dataclass(frozen=True)
class Comparison:
    what: str
    ours: dict[str, torch.Tensor]
    output: Path  # theirs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environment", type=Path, default=Path(".interop"))
    parser.add_argument("--write-fixtures", action="store_true")
    arguments = parser.parse_args()
    python = make_environment(arguments.environment)
    with tempfile.TemporaryDirectory() as folder:
        good = [
            *they_load_what_we_export(python, Path(folder, "ours")),
            *we_load_what_they_save(python, Path(folder, "theirs")),
        ]
        if arguments.write_fixtures:
            write_fixtures(Path(folder, "theirs"))
    print(f"{sum(good)} of {len(good)} comparisons within {TOLERANCE}")
    if not all(good):
        sys.exit(1)


def make_environment(folder: Path) -> Path:
    """Its Python; made once, and again when the requirements change."""
    python, mark = folder / "bin" / "python", folder / "requirements.txt"
    requirements = (HERE / "requirements.txt").read_text()
    if not mark.exists() or mark.read_text() != requirements:
        print(f"making the environment {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "-r", HERE / "requirements.txt"]
        subprocess.run(pip, check=True)
        mark.write_text(requirements)
    return python


def they_load_what_we_export(python: Path, folder: Path) -> list[bool]:
    plan, comparisons = [], []
    for theirs, (format, name) in CLASSES.items():
        model = make(name)
        source = folder / name
        if not source.exists():
            model.save_pretrained(str(source))
        for dtype in ("float32", "float16", "bfloat16"):
            for shard_bytes in (10**9, SHARD_BYTES):
                place = folder / f"{theirs}-{dtype}-{shard_bytes}"
                export_weights(
                    str(source), str(place), format=format, dtype=dtype, shard_bytes=shard_bytes
                )
                output = place.with_suffix(".json")
                plan.append({"class": theirs, "folder": str(place), "output": str(output)})
                # They compute in float32, with weights that the export rounded.
                rounded = make(name).to(getattr(torch, dtype)).float()
                files = "one file" if shard_bytes == 10**9 else "shards"
                what = f"{theirs} loads our export in {dtype}, {files}"
                comparisons.append(Comparison(what, run(rounded), output))
    ask(python, plan, folder)
    return [compare(each) for each in comparisons]


def we_load_what_they_save(python: Path, folder: Path) -> list[bool]:
    folder.mkdir()
    plan = []
    for seed, (theirs, (_, name)) in enumerate(CLASSES.items()):
        for shard in ("5GB", SHARD):
            place = str(folder / f"{theirs}-{shard}")
            step = {"class": theirs, "folder": place, "output": f"{place}.json"}
            config = {**CONFIG, "num_labels": LABELS.get(name, 2)}
            plan.append({**step, "config": config, "seed": seed, "shard": shard})
    ask(python, plan, folder)
    good = []
    for step in plan:
        imported = step["folder"] + "-imported"
        import_weights(step["folder"], imported)
        name = CLASSES[step["class"]][1]
        model = getattr(gptj, name).from_pretrained(imported)
        files = "one file" if step["shard"] == "5GB" else "shards"
        what = f"we load what {step['class']} saved, {files}"
        good.append(compare(Comparison(what, run(model), Path(step["output"]))))
    return good


def write_fixtures(folder: Path) -> None:
    """Whole files of each class and, of two, shards; with what the class computes."""
    chosen = [f"{theirs}-5GB" for theirs in CLASSES]
    chosen += [f"{theirs}-{SHARD}" for theirs in ("FlaxGPTJForCausalLM", "TFGPTJModel")]
    for name in chosen:
        place = FIXTURES / name.replace("-5GB", "").replace(f"-{SHARD}", "-shards")
        place.mkdir(parents=True, exist_ok=True)
        for path in sorted((folder / name).iterdir()):
            (place / path.name).write_bytes(path.read_bytes())
        (place / "expected.json").write_bytes((folder / f"{name}.json").read_bytes())
        print(f"wrote {place}")


def make(name: str) -> GPTJPreTrainedModel:
    """A model whose biases and norms are random too."""
    config = GPTJConfig(**CONFIG, num_labels=LABELS.get(name, 2))
    model: GPTJPreTrainedModel = getattr(gptj, name)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return model.eval()


def run(model: GPTJPreTrainedModel) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        result = model(torch.tensor(TOKENS))
    names = ("last_hidden_state", "logits", "start_logits", "end_logits")
    return {name: result[name] for name in names if name in result}


def ask(python: Path, plan: list[dict[str, Any]], folder: Path) -> None:
    for step in plan:
        step["input_ids"] = TOKENS
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    subprocess.run([python, HERE / "theirs.py", path], check=True)


def compare(comparison: Comparison) -> bool:
    theirs = json.loads(comparison.output.read_text())["outputs"]
    assert theirs.keys() == comparison.ours.keys(), f"{comparison.what}: {list(theirs)}"
    error = max(
        (torch.tensor(theirs[name]) - ours).abs().max().item()
        for name, ours in comparison.ours.items()
    )
    size = max(ours.abs().max().item() for ours in comparison.ours.values())
    good = error <= TOLERANCE
    print(f"{'good' if good else 'OFF '} {error:.1e} of {size:.1f}: {comparison.what}", flush=True)
    return good


if __name__ == "__main__":
    main()

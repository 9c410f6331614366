"""`pip install gptj-platform`: the wheel, and programs that run from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gptj
from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# What a build reads.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "platform", "deployments", "jobs")

# https://huggingface.co/docs/transformers/model_doc/gptj, with the import lines changed.
PAGE_FP32 = """
from gptj import GPTJForCausalLM, GPTJTokenizer

model = GPTJForCausalLM.from_pretrained("EleutherAI/gpt-j-6B")
tokenizer = GPTJTokenizer.from_pretrained("EleutherAI/gpt-j-6B")

prompt = (
    "In a shocking finding, scientists discovered a herd of unicorns living in a remote, "
    "previously unexplored valley, in the Andes Mountains. Even more surprising to the "
    "researchers was the fact that the unicorns spoke perfect English."
)

input_ids = tokenizer(prompt, return_tensors="pt").input_ids

gen_tokens = model.generate(
    input_ids,
    do_sample=True,
    temperature=0.9,
    max_length=100,
)
gen_text = tokenizer.batch_decode(gen_tokens)[0]
"""
PAGE_FP16 = """
from gptj import GPTJForCausalLM, GPTJTokenizer
import torch

device = "cuda" if torch.cuda.is_available() else "cpu"
model = GPTJForCausalLM.from_pretrained("EleutherAI/gpt-j-6B", torch_dtype=torch.float16).to(device)
tokenizer = GPTJTokenizer.from_pretrained("EleutherAI/gpt-j-6B")

prompt = (
    "In a shocking finding, scientists discovered a herd of unicorns living in a remote, "
    "previously unexplored valley, in the Andes Mountains. Even more surprising to the "
    "researchers was the fact that the unicorns spoke perfect English."
)

input_ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)

gen_tokens = model.generate(
    input_ids,
    do_sample=True,
    temperature=0.9,
    max_length=100,
)
gen_text = tokenizer.batch_decode(gen_tokens)[0]
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves files beside its sources; nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored)
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    pip("wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", f"{folder}/source")
    (built,) = folder.glob("*.whl")
    return built


def pip(command: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--no-index", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's packages and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-compile", f"--target={target}", str(wheel))
    return target


def test_the_wheel_holds_all_packages_with_the_kernels_sources_and_the_pages(wheel: Path) -> None:
    assert wheel.name == f"gptj_platform-{gptj.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (
        ("platform/gptj", "gptj"),
        ("platform/gptj_bench", "gptj_bench"),
        ("platform/gptj_cli", "gptj_cli"),
        ("platform/gptj_jobs", "gptj_jobs"),
        ("platform/gptj_local", "gptj_local"),
        ("deployments", "deployments"),
        ("jobs", "jobs"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            if (path.parent / "__init__.py").exists():
                assert f"{package}/{path.relative_to(ROOT / folder)}" in names
    data = (
        ("gptj/engine/runners/cpu", (".cpp", ".h")),
        ("gptj/chat/ready", (".jinja",)),
        ("gptj/serving/playground", (".html", ".js", ".css", ".svg")),
        ("gptj/serving/docs", (".html", ".js")),
        ("gptj_local", (".c",)),
    )
    for folder, suffixes in data:
        files = [path for path in (ROOT / "platform" / folder).iterdir() if path.is_file()]
        kept = {path.name for path in files if path.suffix in suffixes}
        assert {Path(name).suffix for name in kept} == set(suffixes)
        assert {path.name for path in files if path.suffix not in (".py", ".so")} == kept
        assert {f"{folder}/{name}" for name in kept} <= names
    assert "gptj/py.typed" in names


def test_the_cpu_kernels_are_built_from_the_wheels_sources(installed: Path, tmp_path: Path) -> None:
    """With an empty cache of builds, so that no other copy's is loaded."""
    program = (
        "from gptj.engine.runners.cpu import library; print(library.load()._name, library.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    built, module = map(Path, done.stdout.split())
    assert built.parent == tmp_path / "cache" / "gptj" and built.exists()
    assert module == installed / "gptj/engine/runners/cpu/library.py"


def test_the_hugging_face_pages_examples_run_from_the_wheel(
    installed: Path, tmp_path: Path, gptj_tokenizer: GPTJTokenizer
) -> None:
    """With the whole vocabulary; the folder EleutherAI/gpt-j-6B stands for the hub's."""
    folder = tmp_path / "EleutherAI" / "gpt-j-6B"
    GPTJForCausalLM(GPTJConfig.preset("tiny", n_embd=64)).save_pretrained(str(folder))
    gptj_tokenizer.save_pretrained(folder)
    check = "import gptj; print(gen_tokens.shape[1], model.dtype, gen_text.startswith(prompt))"
    programs = f"{PAGE_FP32}\n{check}\n{PAGE_FP16}\n{check}\nprint(gptj.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", programs],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},  # before what the environment has
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *outputs, (file,) = (line.split() for line in done.stdout.splitlines())
    assert [rest for _, *rest in outputs] == [["torch.float32", "True"], ["torch.float16", "True"]]
    assert all(46 < int(length) <= 100 for length, *_ in outputs)
    assert Path(file) == installed / "gptj" / "__init__.py"

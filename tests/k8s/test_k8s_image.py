"""The image: its Dockerfile and its checks, without an engine and a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import struct
from pathlib import Path
from types import ModuleType

import pytest
from manifests import K8S, PROJECT, ROOT

DOCKERFILE = (K8S / "Dockerfile").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS, re.M))
# What torch 2.13.0's wheel for CUDA asks for on Linux, with the extras of cuda-toolkit 13.0.3, and
# DeepSpeed beside it.
TORCH_ASKS = (
    "cuda-bindings",
    "cuda-pathfinder",
    "cuda-toolkit",
    "nvidia-cublas",
    "nvidia-cuda-cupti",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-runtime",
    "nvidia-cudnn-cu13",
    "nvidia-cufft",
    "nvidia-cufile",
    "nvidia-curand",
    "nvidia-cusolver",
    "nvidia-cusparse",
    "nvidia-cusparselt-cu13",
    "nvidia-ml-py",  # DeepSpeed, where PyTorch has CUDA
    "nvidia-nccl-cu13",
    "nvidia-nvjitlink",
    "nvidia-nvshmem-cu13",
    "nvidia-nvtx",
    "triton",
)


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_packages", K8S / "check_packages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


IN_IMAGE = ("serve", "tracing", "train", "trackers", "interop")


def test_the_image_installs_the_library_and_its_extras() -> None:
    """All but the program gptj's: as the Dockerfile's own line finds it in the project's file."""
    (line,) = re.findall(r"python -c '(import pathlib, tomllib;.*)' ", DOCKERFILE)
    printed = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed):
        exec(line, {})
    extras = PROJECT["optional-dependencies"]
    assert extras["all"] == ["gptj-platform[serve,tracing,train,trackers,interop,cli]"]
    assert set(printed.getvalue().split("\n")[:-1]) == {
        *PROJECT["dependencies"],
        *(each for name in IN_IMAGE for each in extras[name]),
    }


def test_the_kernels_are_built_beside_their_source() -> None:
    (folder,) = re.findall(r"\*\.so /app/(\S+)/ ", DOCKERFILE)
    assert list((ROOT / folder).glob("*.cpp"))


def test_cuda_packages_are_pinned_to_one_release() -> None:
    assert not [name for name in TORCH_ASKS if name not in PINS]
    major, minor, *_ = PINS["cuda-toolkit"].split(".")
    # What is compiled by one release is linked, and run, by no older one.
    for name in ("nvidia-cuda-nvcc", "nvidia-cuda-nvrtc", "nvidia-nvjitlink", "nvidia-nvvm"):
        assert PINS[name] == PINS["nvidia-cuda-nvcc"], name
        assert PINS[name].startswith(f"{major}.{minor}."), name
    assert f'NVIDIA_REQUIRE_CUDA="cuda>={major}.{minor}"' in DOCKERFILE
    assert f"CUDA {major}.{minor}" in (K8S / "README.md").read_text()


def test_the_compiler_is_pinned_and_removed_from_the_image() -> None:
    (removed,) = re.findall(r"pip uninstall --yes (.*);", DOCKERFILE)
    assert (
        set(removed.split())
        == {
            "nvidia-cuda-cccl",
            "nvidia-cuda-crt",
            "nvidia-cuda-nvcc",
            "nvidia-nvvm",
        }
        <= set(PINS)
    )
    assert "'cuda-toolkit[cccl,nvcc]'" in DOCKERFILE
    assert "nvidia/cuda" not in DOCKERFILE


def test_operators_are_checked_for_each_gpu_they_are_built_for(check: ModuleType) -> None:
    (listed,) = re.findall(r'TORCH_CUDA_ARCH_LIST="(.*)"', DOCKERFILE)
    wanted = []
    for each in listed.split(";"):
        number = each.removesuffix("+PTX").replace(".", "")
        wanted += [f"sm_{number}"] + ([f"compute_{number}"] if each.endswith("+PTX") else [])
    assert sorted(wanted) == sorted(check.ARCHITECTURES)
    assert listed.endswith("+PTX"), "newer GPUs compile the last one's PTX"


def test_operators_support_bf16_even_with_older_gpus_listed() -> None:
    """DeepSpeed leaves BF16_AVAILABLE out below 8.0: no source of fused_adam may look at it."""
    import deepspeed
    from deepspeed.ops.op_builder.fused_adam import FusedAdamBuilder

    package, builder = Path(deepspeed.__file__).parent, FusedAdamBuilder()
    sources = [package / "ops" / each for each in builder.sources()]
    while sources:
        source = sources.pop()
        text = source.read_text()
        assert "BF16_AVAILABLE" not in text, source
        for name in re.findall(r'^#include "(.*)"', text, re.M):
            folders = [package / "ops" / each for each in builder.include_paths()]
            sources += [each / name for each in folders if (each / name).exists()]


def test_code_for_gpus_is_found_in_a_library(check: ModuleType, tmp_path: Path) -> None:
    """Two containers, as nvcc leaves one a source file, among other bytes."""

    def entry(kind: int, architecture: int, code: bytes) -> bytes:
        head = struct.pack("<HHIQIIHHI", kind, 0x101, 32, len(code), 0, 0, 0, 0, architecture)
        return head + code

    def container(*entries: bytes) -> bytes:
        content = b"".join(entries)
        return struct.pack("<IHHQ", check.FAT_BINARY, 1, 16, len(content)) + content

    library = tmp_path / "operator.so"
    first = container(entry(2, 80, b"machine code"), entry(2, 120, b"more"))
    library.write_bytes(b"ELF" + first + b"between" + container(entry(1, 120, b"PTX")))
    assert check.architectures(library) == ["compute_120", "sm_120", "sm_80"]


@pytest.mark.slow
def test_unpinned_packages_are_named(check: ModuleType) -> None:
    """In this environment too, where PyTorch's build for CPUs counts as its release."""
    assert check.unpinned(CONSTRAINTS + "pip==0\n") == check.unpinned(CONSTRAINTS)
    without = CONSTRAINTS.replace(f"numpy=={PINS['numpy']}", "numpy==1.0")
    assert f"numpy=={PINS['numpy']} (pinned: 1.0)" in check.unpinned(without)
    assert check.release("13.0.3.0") == check.release("13.0.3")

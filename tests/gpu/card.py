"""Versions and compilers; the read bandwidth and the matrix peak that shares are of."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from checking import DTYPES, Check, run
from torch import Tensor

from gptj_bench import machine

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "numpy", "tokenizers", "pytest")
PROGRAMS = {
    "gcc": ["gcc", "--version"],
    "nvcc": ["nvcc", "--version"],
    "ninja": ["ninja", "--version"],
    "compute_sanitizer": ["compute-sanitizer", "--version"],
}
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"
STATE = "clocks.sm,clocks.memory,power.draw,temperature.gpu,clocks_event_reasons.active"


@triton.jit  # type: ignore[untyped-decorator]
def read(memory, sums, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program adds up ROUNDS blocks that lie together."""
    start = tl.program_id(0).to(tl.int64) * BLOCK * ROUNDS
    total = tl.zeros([BLOCK], tl.float32)
    for number in tl.range(0, ROUNDS):
        total += tl.load(memory + start + number * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


def main(check: Check) -> None:
    check.add(
        "versions",
        python=platform.python_version(),
        cuda=torch.version.cuda,
        **{package: machine.installed(package) for package in PACKAGES},
        commit=_first_line(["git", "rev-parse", "HEAD"]),
        processor=machine.description()["processor"],
        cores=os.cpu_count(),
        folder=os.environ.get("TMPDIR"),
        folder_free_gb=shutil.disk_usage(os.environ.get("TMPDIR", "/tmp")).free / 1e9,
        shm_free_gb=shutil.disk_usage("/dev/shm").free / 1e9 if Path("/dev/shm").is_dir() else None,
        **{name: _version(command) for name, command in PROGRAMS.items()},
    )
    check.add("card", **card(check))
    with check.attempt("settings"):
        check.add("settings", **settings())
    with check.attempt("read bandwidth"):
        read_bandwidth(check)
    with check.attempt("matrix peak"):
        for name in ("fp16", "bf16", "fp32"):
            matrix_peak(check, name)
    check.add("nvidia-smi", after="the matrix peak", **_smi(STATE))


def card(check: Check) -> dict[str, object]:
    smi = _smi(QUERY)
    if check.rehearsal:
        name = f"{smi.pop('name', 'no card')} (rehearsed on a CPU)"
        return {"name": name, **check.device.memory(), **smi}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_mb": getattr(properties, "L2_cache_size", 0) / 1e6,
        "cards": torch.cuda.device_count(),
        **check.device.memory(),
        **{key: value for key, value in smi.items() if key != "name"},
    }


def settings() -> dict[str, object]:
    """What PyTorch may do to numbers, and which attention it may take."""
    matmul, cuda = torch.backends.cuda.matmul, torch.backends.cuda
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "reduced_precision_fp16": matmul.allow_fp16_reduced_precision_reduction,
        "reduced_precision_bf16": matmul.allow_bf16_reduced_precision_reduction,
        "sdpa_flash": cuda.flash_sdp_enabled(),
        "sdpa_efficient": cuda.mem_efficient_sdp_enabled(),
        "sdpa_cudnn": cuda.cudnn_sdp_enabled(),
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
    }


def read_bandwidth(check: Check) -> None:
    """Of the ways to read, the fastest: PyTorch's sum, and a kernel that does nothing else."""
    block, rounds = 1024, check.pick(64, 2)
    programs = check.pick(2**14, 4)
    memory = torch.randn(block * rounds * programs, device=check.device.kind)  # 4 GiB
    target = torch.empty_like(memory)
    sums = torch.empty(programs, device=check.device.kind)

    def ours() -> None:
        read[(programs,)](memory, sums, BLOCK=block, ROUNDS=rounds, num_warps=4)

    ways: dict[str, Callable[[], object]] = {
        "sum": memory.sum,
        "kernel": ours,
        "copy": lambda: target.copy_(memory),
    }
    found: dict[str, float] = {}
    for way, function in ways.items():
        with check.attempt("read bandwidth", way=way):
            timing = check.time(function, calls=5)
            moved = memory.nbytes * (2 if way == "copy" else 1)
            found[way] = moved / timing["ms"] / 1e6
            check.add(f"bandwidth of a {way}", gb_per_s=found[way], gb=moved / 1e9, **timing)
    error = abs(float(sums.double().sum()) - float(memory.double().sum()))
    reads = {way: found[way] for way in ("sum", "kernel") if way in found}
    check.add(
        "read bandwidth",
        gb_per_s=max(reads.values()),
        ways=reads,
        right=error < 1e-3 * memory.numel() ** 0.5,
    )


def matrix_peak(check: Check, name: str) -> None:
    """Of random numbers: zeros are faster."""
    size = check.pick(8192, 64)

    def random() -> Tensor:
        return torch.randn(size, size, device=check.device.kind).to(DTYPES[name])

    a, b = random(), random()
    timing = check.time(lambda: a @ b, calls=check.pick(10, 1))
    label = "matrix peak" if name == "fp16" else f"matrix peak in {name}"
    check.add(label, dtype=name, size=size, tflops=2 * size**3 / timing["ms"] / 1e9, **timing)


def _smi(query: str) -> dict[str, object]:
    """What nvidia-smi says of the first card, if there is one."""
    line = _first_line(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
    if line is None:
        return {"smi": None}
    return dict(zip(query.split(","), (part.strip() for part in line.split(",")), strict=False))


def _first_line(command: list[str]) -> str | None:
    lines = _lines(command)
    return lines[0] if lines else None


def _version(command: list[str]) -> str | None:
    """The line with a number of a version."""
    lines = _lines(command)
    return next((line for line in lines if re.search(r"\d+\.\d", line)), None)


def _lines(command: list[str]) -> list[str]:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in result.stdout.splitlines() if line] if not result.returncode else []


if __name__ == "__main__":
    run(main)

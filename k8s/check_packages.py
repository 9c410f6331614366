"""Checks an image's Python packages from inside it, without a GPU or its driver.

    python k8s/check_packages.py VARIANT constraints.txt

VARIANT is cpu or cuda. Every package must have the version that constraints.txt pins; the DeepSpeed
operators that training uses must be prebuilt, for cuda with code for each GPU that the Dockerfile
names, and load. Prints what it found; fails with an error message.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import struct
import sys
from pathlib import Path

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120")
BUILT: dict[str, tuple[str, ...]] = {"cpu": (), "cuda": ("fused_adam", "cpu_adam")}
# Installed in every virtual environment by its Python.
UNPINNED = {"pip"}
# The fat binary containers that nvcc embeds: a header, then entries of PTX or machine code.
FAT_BINARY = 0xBA55ED50
KINDS = {1: "compute", 2: "sm"}


def unpinned(constraints: str) -> list[str]:
    """Installed packages whose version is not the pinned one, ignoring local builds (+cpu)."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", constraints, re.M))
    pinned = {normalized(name): version for name, version in pins.items()}
    found = []
    for package in importlib.metadata.distributions():
        name, version = normalized(package.metadata["Name"]), package.version.partition("+")[0]
        pin = pinned.get(name)
        if name not in UNPINNED and (pin is None or release(pin) != release(version)):
            found.append(f"{name}=={version} (pinned: {pin})")
    return sorted(found)


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def release(version: str) -> str:
    """As PEP 440 compares: 13.0.3.0 is 13.0.3."""
    return re.sub(r"(\.0)+$", "", version)


def architectures(library: Path) -> list[str]:
    """The GPUs a library has code for: sm_… machine code, compute_… PTX."""
    content = library.read_bytes()
    found = set()
    for match in re.finditer(re.escape(struct.pack("<IHH", FAT_BINARY, 1, 16)), content):
        position = match.end() + 8
        (length,) = struct.unpack_from("<Q", content, match.end())
        end = position + length
        while position < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", content, position)
            (architecture,) = struct.unpack_from("<I", content, position + 28)
            found.add(f"{KINDS[kind]}_{architecture}")
            position += header + size
    return sorted(found)


def main(variant: str, constraints: str) -> None:
    os.environ["DS_ACCELERATOR"] = variant
    os.environ["TORCH_EXTENSIONS_DIR"] = "/nowhere"  # operators that are not prebuilt fail
    if wrong := unpinned(Path(constraints).read_text()):
        raise SystemExit(f"not as {constraints} pins it: {', '.join(wrong)}")
    import torch
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder

    built = {name for name, there in installed_ops.items() if there}
    print("torch", torch.__version__, "CUDA", torch.version.cuda, "operators", *sorted(built))
    if missing := set(BUILT[variant]) - built:
        raise SystemExit(f"not prebuilt: {', '.join(sorted(missing))}")
    if variant == "cpu":
        return
    from deepspeed.ops.op_builder import FusedAdamBuilder

    CPUAdamBuilder().load()
    fused = FusedAdamBuilder().load()
    found = architectures(Path(fused.__file__))
    print("fused_adam", *found, "cuDNN", torch.backends.cudnn.version(), "NCCL", nccl())
    if found != sorted(ARCHITECTURES):
        raise SystemExit(f"fused_adam has code for {found} instead of {sorted(ARCHITECTURES)}")
    import triton

    print("triton", triton.__version__)


def nccl() -> str:
    import torch

    return ".".join(map(str, torch.cuda.nccl.version()))


if __name__ == "__main__":
    main(*sys.argv[1:])

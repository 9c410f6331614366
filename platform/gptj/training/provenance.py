"""Versions, commit and hardware: needed, besides settings and data, to reproduce a run."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("gptj-platform", "torch", "deepspeed", "ray", "tokenizers", "numpy", "safetensors"),
    "bitsandbytes",
)


@lru_cache
def provenance() -> dict[str, Any]:
    """`versions` of Python and packages, and `git_commit` of the source.

    The commit is a checkout's, or an image's (GPTJ_GIT_COMMIT); None if unknown.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _git_commit(Path(__file__).parent) or os.environ.get("GPTJ_GIT_COMMIT")
    return {"versions": versions, "git_commit": commit or None}


def hardware(device: torch.device) -> dict[str, Any]:
    """The `device`'s name, and PyTorch's `threads` on the CPU."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else platform.machine()
    return {"device": name, "threads": torch.get_num_threads()}


def _git_commit(folder: Path) -> str | None:
    """The commit, followed by "-dirty" if files differ from it."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    command += ["--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None

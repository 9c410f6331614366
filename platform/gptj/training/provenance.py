"""Versions and the commit: needed, besides settings and data, to reproduce a run."""

from __future__ import annotations

import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    *("gptj-platform", "torch", "deepspeed", "ray", "tokenizers", "numpy", "safetensors"),
    "bitsandbytes",
)


@lru_cache
def provenance() -> dict[str, Any]:
    """`versions` of Python and packages, and `git_commit` of the source, if it is a checkout."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "git_commit": _git_commit(Path(__file__).parent)}


def _git_commit(folder: Path) -> str | None:
    """The commit, followed by "-dirty" if files differ from it."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    command += ["--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None

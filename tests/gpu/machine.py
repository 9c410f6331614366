"""The packages that the GPU's machine has; a rehearsal hides all others that are installed here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement
from wheels import BUILT, PACKAGES

# As CONTRIBUTING.md asks for, each with what it needs.
PACKAGES_THERE = (
    *("torch", "triton", "transformers", "safetensors", "tokenizers", "huggingface_hub"),
    *("numpy", "pytest"),
)
# What the versions of constraints.txt need, but not those of the machine: our code may not import
# it there.
NEEDED_HERE = ("httpx2", "httpcore2", "truststore", "shellingham")
OURS = "gptj-platform"


def hidden() -> dict[str, list[str]]:
    """Modules and distributions that nothing may find, and modules that our code may not."""
    there = _with_needs(PACKAGES_THERE) | {_normal(name) for name in (*PACKAGES, *BUILT, OURS)}
    distributions = metadata.packages_distributions()
    modules = {name: {_normal(each) for each in of} for name, of in distributions.items()}
    needed_here = {_normal(name) for name in NEEDED_HERE}
    return {
        "modules": sorted(name for name, of in modules.items() if not of & there),
        "distributions": sorted(set().union(*modules.values()) - there),
        "not_ours": sorted(name for name, of in modules.items() if of <= needed_here),
    }


def _with_needs(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    left = [_normal(name) for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needs = map(Requirement, metadata.requires(name) or ())
        except metadata.PackageNotFoundError:  # Triton, where PyTorch is for CPUs
            continue
        left += [
            _normal(need.name)
            for need in needs
            if need.marker is None or need.marker.evaluate({"extra": ""})
        ]
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

"""Make the folder of wheels that a check takes along: what the GPU's machine may lack.

    python tests/gpu/wheels.py DIR

For Python 3.12 on x86-64 Linux, in the versions of constraints.txt; at most 50 MB. The machine has
PyTorch, Triton, transformers, safetensors, tokenizers, huggingface_hub, numpy and pytest.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
PYTHON = "3.12"
# manylinux tags that wheels have; pip matches each exactly.
PLATFORMS = (
    *("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_26_x86_64"),
    *("manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"),
    *("manylinux_2_12_x86_64", "manylinux2010_x86_64", "manylinux_2_5_x86_64"),
    "manylinux1_x86_64",
)
MAX_BYTES = 50 * 10**6

# What our settings, DeepSpeed, a run's curves and our tests' own plugins need.
PACKAGES = (
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions"),
    *("hjson", "ninja", "psutil", "py-cpuinfo", "msgpack", "einops", "packaging", "tqdm"),
    *("matplotlib", "contourpy", "cycler", "fonttools", "kiwisolver", "pillow", "pyparsing"),
    *("python-dateutil", "six", "tensorboard", "absl-py", "protobuf"),
    *("pytest-timeout", "pytest-xdist", "execnet", "PyYAML"),
)
BUILT = ("deepspeed",)  # published as source: a wheel of Python alone, which compiles when it runs


def main() -> None:
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder)]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, *map(pinned, PACKAGES)], check=True)
    for package in BUILT:
        build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder)]
        subprocess.run([*build, "--no-build-isolation", pinned(package)], check=True)
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        assert re.search(r"-(cp312|cp3\d+-abi3|py3|py2\.py3)-", wheel.name), wheel.name
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels, {size / 1e6:.1f} MB in {folder}")
    if size > MAX_BYTES:
        raise SystemExit(f"more than the {MAX_BYTES / 1e6:.0f} MB that may be carried")


def pinned(package: str) -> str:
    """With the version that constraints.txt has."""
    wanted = re.sub(r"[-_.]+", "-", package).lower()
    for line in CONSTRAINTS.read_text().splitlines():
        name, equals, version = line.partition("==")
        if equals and re.sub(r"[-_.]+", "-", name).lower() == wanted:
            return f"{package}=={version}"
    raise SystemExit(f"constraints.txt has no version of {package}")


if __name__ == "__main__":
    main()

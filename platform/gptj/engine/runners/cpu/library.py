"""Compiles step.cpp for this machine and loads it; builds are cached per user.

A container image may ship the build beside the source.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCES = ("step.cpp", "kernels.h", "vectors.h")
FLAGS = (
    "-O3 -march=native -std=c++17 -fno-math-errno -shared -fPIC -pthread "
    "-Wall -Wno-uninitialized -Wno-maybe-uninitialized"  # false positives in GCC's headers
).split()
BUILD_SECONDS = 300
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
# Highest first: each level's processor flags, and the compiler's. Macros choose the instructions;
# older compilers do not know `-mno-avx512bf16`.
LEVELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "avx512_bf16": ((*_AVX512, "avx512_vnni", "avx512_bf16"), ()),
    "avx512_vnni": ((*_AVX512, "avx512_vnni"), ("-U__AVX512BF16__",)),
    "avx512": (_AVX512, ("-U__AVX512BF16__", "-U__AVX512VNNI__")),
    "avx2": (("avx2", "fma"), ("-mno-avx512f",)),
}
# An environment variable: the highest level to use, or `none`, like oneDNN's ONEDNN_MAX_CPU_ISA.
HIGHEST = "GPTJ_MAX_CPU_ISA"


class UnsupportedError(RuntimeError):
    """This machine or model cannot use the kernels; the message says why."""


class Sizes(ctypes.Structure):
    """As in step.cpp."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "kind",
                "layers",
                "width",
                "heads",
                "head",
                "rotated",
                "inner",
                "vocabulary",
                "pages",
                "threads",
            )
        ),
        ("epsilon", ctypes.c_float),
    ]


class Weights(ctypes.Structure):
    """As in kernels.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "scales", "group_scales", "bias")),
        *((name, ctypes.c_int64) for name in ("kind", "columns", "inputs")),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("norm_weight", "norm_bias")),
        *((name, Weights) for name in ("qkv", "fc_in", "out")),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("embedding", "final_weight", "final_bias")),
        ("head", Weights),
        *((name, ctypes.c_void_p) for name in ("sines", "cosines", "keys", "values")),
        ("layers", ctypes.POINTER(Layer)),
    ]


class LoraPair(ctypes.Structure):
    _fields_ = [("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("rank", ctypes.c_int64)]


class LoraLayer(ctypes.Structure):
    _fields_ = [("pairs", LoraPair * 6)]


class Step(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("ids", "positions", "query_start_loc", "page_table", "logits_indices")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("tokens", "sequences", "pages_per_row", "num_logits")
        ),
        ("logits", ctypes.c_void_p),
        ("adapters", ctypes.c_void_p),
    ]


def level() -> str:
    """The highest level that this processor has and GPTJ_MAX_CPU_ISA allows.

    Raises:
        UnsupportedError: if there is none.
        ValueError: for an unknown level in GPTJ_MAX_CPU_ISA.
    """
    highest = os.environ.get(HIGHEST) or next(iter(LEVELS))
    if highest == "none":
        raise UnsupportedError(f"{HIGHEST} is none")
    if highest not in LEVELS:
        raise ValueError(f"{HIGHEST} must be one of {', '.join(LEVELS)} or none, got {highest!r}")
    names = list(LEVELS)
    for name in names[names.index(highest) :]:
        if set(LEVELS[name][0]) <= processor_flags():
            return name
    raise UnsupportedError(f"the processor does not have {' and '.join(LEVELS['avx2'][0])}")


def load() -> ctypes.CDLL:
    """Load the library for this machine's level.

    Raises:
        UnsupportedError: if the processor has no level, or there is no compiler.
        ValueError: for an unknown level in GPTJ_MAX_CPU_ISA.
    """
    return _load(level())


@cache
def _load(name: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(_built(name)))
    library.gptj_create.restype = ctypes.c_void_p
    library.gptj_create.argtypes = [ctypes.POINTER(Sizes), ctypes.POINTER(Model)]
    library.gptj_step.argtypes = [ctypes.c_void_p, ctypes.POINTER(Step)]
    library.gptj_destroy.argtypes = [ctypes.c_void_p]
    library.gptj_prefer_large_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.gptj_discard.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.gptj_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    library.gptj_read.restype = ctypes.c_int64
    return library


@cache
def processor_flags() -> frozenset[str]:
    """The processor's flags from /proc/cpuinfo; empty if not on Linux."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def _built(name: str) -> Path:
    """The path of a level's library; compiles it if missing.

    Its name contains a hash of everything it depends on. It is built in a temporary folder and then
    renamed, so concurrent or killed builds do no harm.
    """
    folder = Path(__file__).parent
    contents = [(folder / source).read_bytes() for source in SOURCES]
    compiler, flags = _compiler(), [*FLAGS, *LEVELS[name][1]]
    machine = " ".join([*flags, compiler, _version(compiler), *sorted(processor_flags())])
    digest = hashlib.sha256(b"\0".join([*contents, machine.encode()])).hexdigest()[:16]
    target = _cache_folder() / f"step-{name}-{digest}.so"
    for path in (folder / target.name, target):
        if path.exists():
            return path
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=target.parent) as build:
        path = Path(build) / target.name
        result = subprocess.run(
            [compiler, *flags, "-o", str(path), str(folder / SOURCES[0])],
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
        )
        if result.returncode != 0:
            raise UnsupportedError(f"{compiler} cannot build step.cpp: {result.stderr[-2000:]}")
        os.replace(path, target)
    return target


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptj"


def _compiler() -> str:
    wanted = os.environ.get("CXX", "g++")
    found = shutil.which(wanted)
    if found is None:
        raise UnsupportedError(f"there is no C++ compiler {wanted!r} (set CXX to use another)")
    return found


def _version(compiler: str) -> str:
    command = [compiler, "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
    return result.stdout.partition("\n")[0]

"""Optional dependencies, imported on first use.

    pyarrow = Extra("pyarrow", "reading Parquet and CSV files")

stands for the module: the first attribute access imports it, or says what to install.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Package -> extra, as in pyproject.toml's optional-dependencies. The library itself requires all
# packages not listed here.
EXTRA_OF = {
    **dict.fromkeys(
        ("ray", "fastapi", "starlette", "uvicorn", "requests", "opentelemetry"), "serve"
    ),
    **dict.fromkeys(("fastapi_offline", "llguidance"), "serve"),
    "opentelemetry-exporter-otlp-proto-http": "tracing",
    **dict.fromkeys(("typer", "psutil", "rich", "prometheus_client"), "cli"),
    **dict.fromkeys(("deepspeed", "ninja", "tensorboard", "matplotlib"), "train"),
    **dict.fromkeys(("bitsandbytes",), "train"),
    **dict.fromkeys(("mlflow", "wandb"), "trackers"),
    **dict.fromkeys(("h5py", "msgpack", "zstandard"), "interop"),
}
# Package -> what it would import with it for a part that nothing here uses. DeepSpeed's autotuner
# takes MLflow where it is installed, and with it pandas and FastAPI: seconds in each worker.
UNUSED = {"deepspeed": ("mlflow",)}


class MissingPackageError(ImportError):
    """An optional dependency is not installed; the message has the remedy."""


class Extra:
    """A module that is imported on the first access to one of its attributes.

    Args:
        name: the module's name.
        purpose: what needs it, for the error message.
        package: the package that provides it, if named differently.
    """

    def __init__(self, name: str, purpose: str, package: str | None = None) -> None:
        self._name = name
        self._purpose = purpose
        self._package = package

    def __getattr__(self, attribute: str) -> Any:
        # Introspection, as by inspect and pytest, probes private attributes; it must not import.
        if attribute.startswith("_") and attribute != "__version__":
            raise AttributeError(attribute)
        module = require(self._name, self._purpose, self._package)
        if not hasattr(module, attribute):
            try:
                return importlib.import_module(f"{self._name}.{attribute}")
            except ModuleNotFoundError as error:
                if error.name != f"{self._name}.{attribute}":
                    raise
        return getattr(module, attribute)


def require(name: str, purpose: str, package: str | None = None) -> Any:
    """Import a module; MissingPackageError if it or what it needs is not installed."""
    try:
        with _without_unused(name.partition(".")[0]):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise missing(error, purpose, package) from error


@contextmanager
def _without_unused(package: str) -> Iterator[None]:
    """Hide modules that a package would import but nothing here uses."""
    unused = () if package in sys.modules else UNUSED.get(package, ())
    hidden = [name for name in unused if name not in sys.modules]
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(hidden))  # importing what is None fails
    try:
        yield
    finally:
        for name in hidden:
            del modules[name]


def check_installed(package: str, purpose: str, extra: str | None = None) -> None:
    """Raise MissingPackageError if a package is not installed, without importing it."""
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise missing(ModuleNotFoundError(name=package), purpose, extra=extra)


def missing(
    error: ModuleNotFoundError,
    purpose: str,
    package: str | None = None,
    extra: str | None = None,
) -> MissingPackageError:
    """The MissingPackageError to raise instead of `error`.

    Args:
        purpose: what needs the package.
        package: the package that provides the module, if named differently.
        extra: the extra that installs it, if not the usual one.
    """
    package = package or (error.name or "").partition(".")[0]
    extra = extra or EXTRA_OF.get(package)
    what = package if extra is None else f"'gptj-platform[{extra}]'"
    return MissingPackageError(
        f"{purpose} needs the package {package}, which is not installed; remedy: "
        f"pip install {what}",
        name=error.name,
    )

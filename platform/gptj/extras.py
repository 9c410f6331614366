"""Packages that only some parts of the library need, imported when such a part is used.

    pyarrow = Extra("pyarrow", "reading Parquet and CSV files")

stands for the module; the first use of an attribute imports it, or says what to install.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

# What brings them, of pyproject.toml's optional-dependencies. What is not here, the library itself
# depends on.
EXTRA_OF = {
    **dict.fromkeys(("ray", "fastapi", "starlette", "uvicorn", "requests"), "serve"),
    **dict.fromkeys(("fastapi_offline", "llguidance"), "serve"),
    **dict.fromkeys(("typer", "psutil"), "cli"),
    **dict.fromkeys(("deepspeed", "ninja", "tensorboard", "matplotlib"), "train"),
    **dict.fromkeys(("h5py", "msgpack", "zstandard"), "interop"),
}


class MissingPackageError(ImportError):
    """A package that a part of the library needs is not installed; the message has the remedy."""


class Extra:
    """A module that is imported at the first use of one of its attributes.

    Args:
        name: of the module.
        purpose: what needs it, for the error.
        package: that has it, if its name is another.
    """

    def __init__(self, name: str, purpose: str, package: str | None = None) -> None:
        self._name = name
        self._purpose = purpose
        self._package = package

    def __getattr__(self, attribute: str) -> Any:
        # Whoever looks over a module's objects, such as inspect, asks for more of these.
        if attribute.startswith("__") and attribute != "__version__":
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
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise missing(error, purpose, package) from error


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
    """The error to raise instead, with the remedy.

    Args:
        purpose: what needs the package.
        package: that has the module, if its name is another.
        extra: of this project that brings it, if not the usual one.
    """
    package = package or (error.name or "").partition(".")[0]
    extra = extra or EXTRA_OF.get(package)
    what = package if extra is None else f"'gptj-platform[{extra}]'"
    return MissingPackageError(
        f"{purpose} needs the package {package}, which is not installed; remedy: "
        f"pip install {what}",
        name=error.name,
    )

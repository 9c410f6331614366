"""Packages that only some parts of the library need, imported when such a part is used.

    pyarrow = Extra("pyarrow", "reading Parquet and CSV files")

stands for the module; the first use of an attribute imports it, or says what to install.
"""

from __future__ import annotations

import importlib
from typing import Any


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
        package = package or (error.name or name).partition(".")[0]
        raise MissingPackageError(
            f"{purpose} needs the package {package}, which is not installed; remedy: "
            f"pip install {package}",
            name=error.name,
        ) from error

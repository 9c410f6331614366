"""Python with the packages that the GPU's machine has, and no others: for a rehearsal.

Python imports this module when it starts. GPTJ_CHECK_HIDDEN is what machine.hidden() found.
"""

from __future__ import annotations

import builtins
import json
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

REPOSITORY = str(Path(__file__).resolve().parents[3])
HIDDEN: dict[str, list[str]] = json.loads(os.environ["GPTJ_CHECK_HIDDEN"])
INSTALLED = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
# A package that is already imported belongs to whatever watches this process, such as coverage.
LOADED = {name.partition(".")[0] for name in sys.modules}
MODULES = set(HIDDEN["modules"]) - LOADED
DISTRIBUTIONS = set(HIDDEN["distributions"])
NOT_OURS = set(HIDDEN["not_ours"])


class Finder(PathFinder):
    """Finds neither hidden modules nor the metadata of their distributions."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if path is None and name in MODULES:  # setuptools has its own copies of some
            path = [each for each in sys.path if each not in INSTALLED]
        return super().find_spec(name, path, target)

    @staticmethod
    def find_distributions(*arguments: Any, **names: Any) -> Iterator[Any]:
        found: Iterable[Any] = PathFinder.find_distributions(*arguments, **names)
        for each in found:
            if re.sub(r"[-_.]+", "-", each.metadata["Name"] or "").lower() not in DISTRIBUTIONS:
                yield each


def guarded(importing: Callable[..., Any]) -> Callable[..., Any]:
    """An import statement that refuses our own modules what only others may import."""

    def guard(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Any = (),
        level: int = 0,
    ) -> Any:
        if level == 0 and name.partition(".")[0] in NOT_OURS:
            file = str((globals or {}).get("__file__", ""))
            if file.startswith(REPOSITORY) and "site-packages" not in file:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importing(name, globals, locals, fromlist, level)

    return guard


sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
if NOT_OURS:
    builtins.__import__ = guarded(builtins.__import__)

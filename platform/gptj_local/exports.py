"""A cluster's environment variables as a shell script to source."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path


def export_lines(variables: Mapping[str, str]) -> str:
    """`export NAME=VALUE` lines, quoted for a POSIX shell."""
    return "".join(f"export {name}={shlex.quote(text)}\n" for name, text in variables.items())


def write_exports(path: Path, variables: Mapping[str, str]) -> None:
    """Write them to a file that only its owner can read, since they include secrets."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(export_lines(variables))

"""A cluster's environment variables, apart from the user's own, and as a shell script to source."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, MutableMapping
from pathlib import Path

# Those of another storage, which would go with our address and key, or instead of them.
OF_ANOTHER_STORAGE = (
    "AWS_DEFAULT_PROFILE",
    "AWS_ENDPOINT_URL_S3",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_PROFILE",
    "AWS_SECURITY_TOKEN",
    "AWS_SESSION_TOKEN",
    "AWS_USE_DUALSTACK_ENDPOINT",
    "AWS_USE_FIPS_ENDPOINT",
)
NOT_BY_PROXY = "127.0.0.1,localhost"
# Programs read one of the two names, or prefer the lower one.
_PROXY_LINES = f"""\
no_proxy="${{no_proxy:-${{NO_PROXY:-}}}}"
case ",$no_proxy," in
  ",*," | *,{NOT_BY_PROXY},*) ;;
  *) no_proxy="${{no_proxy:+$no_proxy,}}{NOT_BY_PROXY}" ;;
esac
export no_proxy NO_PROXY="$no_proxy"
"""


def shield(environment: MutableMapping[str, str]) -> None:
    """Remove from variables what leads away from loopback: another storage, or a proxy."""
    for name in OF_ANOTHER_STORAGE:
        environment.pop(name, None)
    known = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if known != "*" and f",{NOT_BY_PROXY}," not in f",{known},":
        known = f"{known},{NOT_BY_PROXY}" if known else NOT_BY_PROXY
    environment["no_proxy"] = environment["NO_PROXY"] = known


def export_lines(variables: Mapping[str, str]) -> str:
    """`export NAME=VALUE` lines, quoted for a POSIX shell, which they `shield` too."""
    lines = "".join(f"export {name}={shlex.quote(text)}\n" for name, text in variables.items())
    return f"unset {' '.join(OF_ANOTHER_STORAGE)}\n{_PROXY_LINES}{lines}"


def write_exports(path: Path, variables: Mapping[str, str]) -> None:
    """Write them to a file that only its owner can read, since they include secrets."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(export_lines(variables))

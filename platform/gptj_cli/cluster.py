"""The Ray cluster that commands talk to, from the environment."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from gptj_cli.local import EXPORTS

# In the precedence of `ray job submit` and `serve deploy`.
VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS", "RAY_ADDRESS")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def dashboard_address(folder: Path) -> str:
    """Where jobs and services are submitted: http://HOST:PORT.

    Raises:
        ValueError: if no variable names it; the remedy mentions the exports that `gptj up` wrote
            into `folder`, if any.
    """
    for name in VARIABLES:
        if (address := os.environ.get(name, "")).startswith(("http://", "https://")):
            return address
    remedy = (
        f"source {folder / EXPORTS}"
        if (folder / EXPORTS).exists()
        else "start one on this machine with gptj up; for another one export "
        f"{VARIABLES[0]}=http://HOST:8265 (and, if it asks for a token, RAY_AUTH_MODE=token and "
        "RAY_AUTH_TOKEN=…)"
    )
    raise ValueError(f"the environment names no Ray cluster; remedy: {remedy}")


def is_here(address: str) -> bool:
    """Whether the cluster is on this machine and sees the same paths and programs."""
    return urlsplit(address).hostname in LOOPBACK

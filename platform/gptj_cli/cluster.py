"""The Ray cluster that commands talk to, as the environment names it."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from gptj_cli.local import EXPORTS

# In the order of `ray job submit` and of `serve deploy`.
VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS", "RAY_ADDRESS")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def dashboard_address(folder: Path) -> str:
    """Where jobs and services are submitted: http://HOST:PORT.

    Raises:
        ValueError: if no variable names it; the remedy names the exports that `gptj up` has written
            into `folder`, if there are any.
    """
    for name in VARIABLES:
        if (address := os.environ.get(name, "")).startswith(("http://", "https://")):
            return address
    remedy = (
        f"source {folder / EXPORTS}"
        if (folder / EXPORTS).exists()
        else "gptj up starts one on this machine; for another one export "
        f"{VARIABLES[0]}=http://HOST:8265 (and, if it asks for a token, RAY_AUTH_MODE=token and "
        "RAY_AUTH_TOKEN=…)"
    )
    raise ValueError(f"no Ray cluster is named in the environment; remedy: {remedy}")


def is_here(address: str) -> bool:
    """Whether the cluster is on this machine, where local paths and programs mean the same."""
    return urlsplit(address).hostname in LOOPBACK

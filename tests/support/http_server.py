"""A small application on loopback, for clients that need a real server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import uvicorn
from starlette.types import ASGIApp

from gptj_local.processes import HOST, free_ports


@contextmanager
def listening(
    app: ASGIApp,
    protocol: type[asyncio.Protocol] | Literal["auto"] = "auto",
    keep_alive_seconds: int = 5,
) -> Iterator[str]:
    """Its address, for the length of the block."""
    (port,) = free_ports(1)
    config = uvicorn.Config(
        app,
        HOST,
        port,
        log_level="critical",
        lifespan="off",
        ws="none",
        http=protocol,
        timeout_keep_alive=keep_alive_seconds,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError(f"the server did not start on port {port}")
            time.sleep(0.01)
        yield f"http://{HOST}:{port}"
    finally:
        server.should_exit = True
        thread.join()

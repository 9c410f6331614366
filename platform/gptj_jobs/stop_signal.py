"""An actor that tells a training's workers to stop; its process imports no other module of ours."""

from __future__ import annotations

import asyncio

import ray


@ray.remote(num_cpus=0)
class StopSignal:
    """Sent once; waiters get the reason.

    Args:
        owner: the process that trains, in words.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._sent = asyncio.Event()
        self._reason = ""

    async def owner(self) -> str:
        return self._owner

    async def send(self, reason: str) -> None:
        self._reason = reason
        self._sent.set()

    async def wait(self) -> str:
        await self._sent.wait()
        return self._reason

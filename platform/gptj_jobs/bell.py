"""An actor that tells a training's workers to stop; its process imports no other module of ours."""

from __future__ import annotations

import asyncio

import ray


@ray.remote(num_cpus=0)
class Bell:
    """Rung once; waiters get the reason.

    Args:
        owner: the process that trains, in words.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._rung = asyncio.Event()
        self._reason = ""

    async def owner(self) -> str:
        return self._owner

    async def ring(self, reason: str) -> None:
        self._reason = reason
        self._rung.set()

    async def wait(self) -> str:
        await self._rung.wait()
        return self._reason

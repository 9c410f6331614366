"""Engine events from its thread to the event loop, and there to the HTTP request that waits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gptj.engine.events import Event
from gptj.engine.request import Ticket


class EventRouter:
    """Passes a step's events from the engine's thread to the streams of one event loop.

    Waking the loop costs a system call, so this does it once per step, not per event.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._streams: dict[Ticket, tuple[EventStream, int]] = {}

    def __call__(self, events: Sequence[tuple[Ticket, Event]]) -> None:
        """Called on the engine's thread. Raises RuntimeError once the loop is closed."""
        self.loop.call_soon_threadsafe(self._route, events)

    def add(self, ticket: Ticket, stream: EventStream, index: int) -> None:
        """Call on the loop's thread, in the same callback that submits the ticket."""
        self._streams[ticket] = stream, index

    def remove(self, ticket: Ticket) -> None:
        self._streams.pop(ticket, None)

    def _route(self, events: Sequence[tuple[Ticket, Event]]) -> None:
        for ticket, event in events:
            if (found := self._streams.get(ticket)) is not None:
                stream, index = found
                stream.put(index, event)


class EventStream:
    """The events of one HTTP request, which is one or several engine requests."""

    def __init__(self, router: EventRouter) -> None:
        self.tickets: list[Ticket] = []
        self.router = router
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def follow(self, tickets: Sequence[Ticket]) -> None:
        """Receive their events, numbered in order."""
        for ticket in tickets:
            self.router.add(ticket, self, len(self.tickets))
            self.tickets.append(ticket)

    def put(self, index: int, event: Event) -> None:
        self._queue.put_nowait((index, event))

    async def get(self) -> tuple[int, Event]:
        return await self._queue.get()

    async def get_all(self) -> list[tuple[int, Event]]:
        """All events that have arrived; waits for at least one."""
        events = [await self._queue.get()]
        while not self._queue.empty():
            events.append(self._queue.get_nowait())
        return events

    def cancel(self) -> None:
        """Cancel running requests and stop receiving events."""
        for ticket in self.tickets:
            self.router.remove(ticket)
            ticket.cancel()

"""Replies as server-sent events: chunks in, a streaming response out."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Send

from gptj.serving.errors import APIError


class EventStreamResponse(StreamingResponse):
    """Closes the events when the client leaves rather than at garbage collection.

    Otherwise the engine would keep working, and the key would be charged all reserved tokens.
    """

    def __init__(self, events: AsyncGenerator[str]) -> None:
        self._events = events
        # Proxies must not buffer the stream.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._events):
            await super().stream_response(send)


async def server_sent(chunks: AsyncGenerator[BaseModel]) -> AsyncGenerator[str]:
    """Chunks as server-sent events; errors too, since the status has already been sent."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield f"data: {on_one_line(chunk.model_dump_json())}\n\n"
    except APIError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    yield "data: [DONE]\n\n"


def on_one_line(content: str) -> str:
    """Escape the three line separators that JSON allows but some clients split lines at."""
    if content.isascii():
        return content
    for separator in ("\u0085", "\u2028", "\u2029"):
        content = content.replace(separator, f"\\u{ord(separator):04x}")
    return content

"""Names a request's session by the beginning of its prompt, so that a router can keep it together.

Replicas remember the prompts that they have computed: requests that begin alike are answered sooner
by the same one. A client's own X-Session-Id counts instead, if it sends one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

SESSION = b"x-session-id"  # Serve's, unless RAY_SERVE_SESSION_ID_HEADER_KEY has another
LEAST_CHARACTERS = 64  # of a prompt: a page of the cache has 16 tokens
PREFIX_CHARACTERS = 256
PREFIX_TOKENS = 64
PARSED_BYTES = 2**16  # beyond it parsing takes milliseconds: not on the event loop
ROUTES = ("/v1/completions", "/v1/chat/completions")


class PrefixSessions:
    """Middleware: sets X-Session-Id on requests that generate text.

    It expects the whole body in one message.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or not scope["path"].rstrip("/").endswith(ROUTES)
            or any(name == SESSION for name, _ in scope["headers"])
        ):
            await self._app(scope, receive, send)
            return
        first = await receive()
        body = first.get("body", b"")
        if len(body) <= PARSED_BYTES:
            session = session_of(body)
        else:
            session = await asyncio.to_thread(session_of, body)
        if session is not None:
            scope = {**scope, "headers": [*scope["headers"], (SESSION, session.encode())]}
        pending = [first]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)


def session_of(body: bytes) -> str | None:
    """Equal for requests that begin alike; None if nothing speaks for one replica or another."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None  # the application says what is wrong
    if not isinstance(fields, dict):
        return None
    prefix = _chat(fields["messages"]) if "messages" in fields else _prompt(fields.get("prompt"))
    if prefix is None:
        return None
    key = json.dumps([fields.get("model"), prefix], default=str)
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:32]


def _prompt(prompt: Any) -> Any:
    """A prompt's beginning; of several prompts the first one's."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt[:PREFIX_CHARACTERS] if len(prompt) >= LEAST_CHARACTERS else None
    if isinstance(prompt, list) and len(prompt) >= LEAST_CHARACTERS // 4:
        return prompt[:PREFIX_TOKENS]
    return None


def _chat(messages: Any) -> Any:
    """What stays the same from turn to turn: all up to the first message of the user."""
    if not isinstance(messages, list):
        return None
    parts = []
    for message in messages:
        if not isinstance(message, dict):
            return None
        parts.append([message.get("role"), message.get("content")])
        if message.get("role") == "user":
            break
    text = json.dumps(parts, default=str)
    return text[:PREFIX_CHARACTERS] if len(text) >= LEAST_CHARACTERS else None

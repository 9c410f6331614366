"""Hashes of a prompt's prefixes, by which a router finds the replica that has them cached.

Replicas cache the prompts that they have computed. A request that generates text gets the header
X-Session-Id, whose value Serve's proxy hands to its router (see deployments.prefix_router):
`model.key.key…`, where a key is the hash of the prompt up to the end of a block. Prompts with a
common prefix share their first keys, and each turn of a chat extends the last one's.
"""

from __future__ import annotations

import json
from array import array
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Unless RAY_SERVE_SESSION_ID_HEADER_KEY names another. Serve also reads it with underscores.
SESSION = b"x-session-id"
# With a client's, Serve's base router would keep every request in memory.
MULTIPLEXED = b"serve-multiplexed-model-id"
BLOCK_CHARACTERS = 128  # about 32 tokens: two pages of the cache
BLOCK_IDS = 32
MAX_BLOCKS = 64  # about GPT-J's context
MAX_PARSED_BYTES = 2**16  # parsing takes at most about a millisecond; larger bodies have no keys
HASH_BYTES = 6  # eight characters in base64
MAX_CHARACTERS = 9 * (MAX_BLOCKS + 1)  # of all keys and the points between them
ROUTES = ("/v1/completions", "/v1/chat/completions")


class PrefixKeys:
    """Middleware: replaces the client's X-Session-Id by a prompt's keys, and drops its model id.

    Expects the whole body in one message.

    Args:
        secret: keeps keys from revealing guessed prompts; must be the same in all proxies that are
            to agree.
    """

    def __init__(self, app: ASGIApp, secret: bytes) -> None:
        self._app = app
        self._secret = secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": without_routing(scope["headers"])}
        if scope["method"] != "POST" or not scope["path"].rstrip("/").endswith(ROUTES):
            await self._app(scope, receive, send)
            return
        pending = [await receive()]
        body = pending[0].get("body", b"")
        if len(body) <= MAX_PARSED_BYTES and (keys := keys_of(body, self._secret)):
            scope["headers"].append((SESSION, keys.encode()))

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)


def without_routing(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Without those that Serve's routers read."""
    routing = (SESSION, MULTIPLEXED)
    return [each for each in headers if each[0].replace(b"_", b"-") not in routing]


def keys_of(body: bytes, secret: bytes) -> str:
    """`model.key.key…`; empty if neither a model is named nor the prompt long enough."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return ""  # the application says what is wrong
    if not isinstance(fields, dict):
        return ""
    model = fields.get("model")
    parts = [model_key(model) if isinstance(model, str) else ""]
    state = blake2b(key=secret, digest_size=HASH_BYTES)
    for block in islice(_blocks(fields), MAX_BLOCKS):
        state.update(block)
        parts.append(_printable(state.copy().digest()))
    return ".".join(parts) if any(parts) else ""


def model_key(name: str) -> str:
    """The hash of a model's name, which is not secret."""
    return _printable(blake2b(_encoded(name), digest_size=HASH_BYTES).digest())


def _blocks(fields: dict[str, Any]) -> Iterator[bytes]:
    """A prompt's full blocks; of several prompts the first one's."""
    messages, prompt = fields.get("messages"), fields.get("prompt")
    if isinstance(messages, list):
        prompt = _transcript(messages)
    elif isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        for end in range(BLOCK_CHARACTERS, len(prompt) + 1, BLOCK_CHARACTERS):
            yield _encoded(prompt[end - BLOCK_CHARACTERS : end])
    elif isinstance(prompt, list):
        try:
            ids = array("q", prompt[: MAX_BLOCKS * BLOCK_IDS])
        except (TypeError, OverflowError):
            return
        for end in range(BLOCK_IDS, len(ids) + 1, BLOCK_IDS):
            yield ids[end - BLOCK_IDS : end].tobytes()


def _transcript(messages: list[Any]) -> str:
    """Each message's role and texts, in order: later turns only append to it."""
    parts, size = [], 0
    for message in messages:
        if not isinstance(message, dict) or size > MAX_BLOCKS * BLOCK_CHARACTERS:
            break
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(str(part.get("text")) for part in content if isinstance(part, dict))
        parts.append(f"{message.get('role')}\0{content}\0")
        size += len(parts[-1])
    return "".join(parts)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _printable(digest: bytes) -> str:
    return urlsafe_b64encode(digest).decode()

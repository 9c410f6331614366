"""One log line per request with its outcome, but without key or text.

Log records also carry the line's parts as attributes, which JSON formatters print as fields.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

_entry: ContextVar[Entry | None] = ContextVar("entry", default=None)


@dataclass
class Entry:
    """Details of a request besides its route and status; None where not applicable."""

    key: str | None = None  # its name in GPTJ_KEYS_FILE
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    queue_seconds: float | None = None  # until the first step that worked on it
    first_token_seconds: float | None = None  # until the first output's first token
    logged: bool = field(default=False, init=False)  # already, by a replica or in a summary

    def first(self, seconds: float) -> None:
        """An output's first token arrived."""
        if self.first_token_seconds is None:
            self.first_token_seconds = seconds

    def queued(self, seconds: float) -> None:
        """An output left the queue after `seconds`."""
        if self.queue_seconds is None or seconds < self.queue_seconds:
            self.queue_seconds = seconds


@contextmanager
def request_entry() -> Iterator[Entry]:
    """The current request's entry within the block and tasks started in it."""
    entry = Entry()
    token = _entry.set(entry)
    try:
        yield entry
    finally:
        _entry.reset(token)


def current_entry() -> Entry:
    """The current request's entry; outside of requests, a throwaway one."""
    return _entry.get() or Entry()


def printable(text: str) -> str:
    """The client's text on one line, without control characters, as in a Python string."""
    return text if text.isprintable() else repr(text)[1:-1]


def write(entry: Entry, method: str, route: str, status: int, seconds: float, id_: str) -> None:
    """Write a request's line."""
    route, id_ = printable(route), printable(id_)
    words = [f"{method} {route} {status} {1000 * seconds:.1f}ms"]
    if entry.prompt_tokens is not None:
        words.append(f"{entry.prompt_tokens} + {entry.completion_tokens} tokens")
    if entry.queue_seconds is not None:
        words.append(f"queued {1000 * entry.queue_seconds:.1f}ms")
    if entry.first_token_seconds is not None:
        words.append(f"first token {1000 * entry.first_token_seconds:.1f}ms")
    if entry.key is not None:
        words.append(f"key {entry.key}")
    fields: dict[str, Any] = {
        "request_id": id_,
        "method": method,
        "route": route,
        "status": status,
        "seconds": round(seconds, 6),
    }
    for name, value in vars(entry).items():
        if value is not None and name != "logged":
            fields[name] = round(value, 6) if isinstance(value, float) else value
    logger.info(", ".join(words), extra=fields)

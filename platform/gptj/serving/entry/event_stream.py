"""A completions stream that another replica can continue.

The second replica gets the same request and seed, and so generates the same text; the part that the
client already has is skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gptj.serving.errors import APIError

DONE = b"data: [DONE]\n\n"
# Ours end in two \n; other applications' lines may end in \r\n or \r. Atomic: no \r\n is two ends.
EVENT_END = re.compile(rb"(?>\r\n|\n|\r){2}")
MAX_EVENT_BYTES = 2**24  # of other applications; ours are smaller
LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "content")  # in logprobs


class DivergedError(Exception):
    """The second stream does not repeat the first, or cannot be compared with it."""


@dataclass
class ChoiceState:
    """How much of one choice has arrived."""

    text: str = ""
    tokens: int = 0  # with logprobs
    ids: int = 0  # token ids, if requested
    ended: bool = False


@dataclass
class EventStream:
    """The server-sent events that a client has received so far.

    `feed` takes a reply's bytes and returns the events to forward. After `restart`, the bytes are
    those of a second reply to the same request.
    """

    done: bool = False  # [DONE] was sent
    _sent: dict[int, ChoiceState] = field(default_factory=dict)
    _again: dict[int, ChoiceState] = field(default_factory=dict)  # of a second reply
    _resuming: bool = False
    _head: dict[str, Any] = field(default_factory=dict)  # id and creation time, of all chunks
    _usage_sent: bool = False
    _comparable: bool = True
    _partial: bytes = b""
    _after_cr: bool = False  # the last event ended in \r, whose \n may follow

    def restart(self) -> None:
        self._again = {}
        self._resuming = True
        self._partial = b""
        self._after_cr = False

    def feed(self, data: bytes) -> bytes:
        """The events to send; raises DivergedError."""
        if not data:
            return b""
        sent: list[bytes] = []
        if self._after_cr and data.startswith(b"\n"):
            sent.append(b"\n")
            data = data[1:]
        pending = self._partial + data
        start = 0
        # Before its last two bytes, the known part has no end of an event.
        for end in EVENT_END.finditer(pending, max(0, len(self._partial) - 2)):
            sent.append(self._event(pending[start : end.end()]))
            start = end.end()
        self._partial = pending[start:]
        self._after_cr = 0 < start == len(pending) and pending.endswith(b"\r")
        if len(self._partial) > MAX_EVENT_BYTES:
            self._comparable = False
            sent.append(self._uncompared(self._partial))
            self._partial = b""
        return b"".join(sent)

    def finish(self) -> bytes:
        """The bytes after the last complete event; none in our own replies."""
        rest, self._partial = self._partial, b""
        return b"" if self._resuming else rest

    def _event(self, event: bytes) -> bytes:
        lines = event.strip(b"\r\n")
        if lines == b"data: [DONE]":
            self.done = True
            return event
        if all(line[:1] in (b":", b"") for line in lines.splitlines()):
            return event  # a comment
        if not self._comparable or not lines.startswith(b"data: {"):
            self._comparable = False
            return self._uncompared(event)
        try:
            chunk = json.loads(lines.removeprefix(b"data: "))
            if "error" in chunk:
                return event
            if not self._resuming:
                self._note(chunk)
                return event
            rest = self._rest(chunk)
        except (ValueError, TypeError, KeyError, AttributeError):  # another application's
            self._comparable = False
            return self._uncompared(event)
        return b"" if rest is None else f"data: {json.dumps(rest)}\n\n".encode()

    def _uncompared(self, event: bytes) -> bytes:
        """An event that is not one of our chunks. Raises DivergedError after `restart`."""
        if self._resuming:
            raise DivergedError
        return event

    def _note(self, chunk: dict[str, Any]) -> None:
        if not self._head:
            self._head = {name: chunk[name] for name in ("id", "created") if name in chunk}
        choices = chunk.get("choices") or []
        self._usage_sent |= not choices
        for choice in choices:
            state = self._sent.setdefault(choice["index"], ChoiceState())
            state.text += _text(choice)
            state.tokens += _tokens(choice)
            state.ids += len(choice.get("token_ids") or ())
            state.ended |= choice.get("finish_reason") is not None
            if set(choice.get("delta") or ()) - {"role", "content"}:
                self._comparable = False

    def _rest(self, chunk: dict[str, Any]) -> dict[str, Any] | None:
        """The new part of a second reply's chunk, if any."""
        choices = chunk.get("choices") or []
        if not choices:
            if self._usage_sent:
                return None
            self._usage_sent = True
            return {**chunk, **self._head}
        begun = all(choice["index"] in self._sent for choice in choices)
        rest = [new for choice in choices for new in self._rest_of(choice)]
        if begun:
            chunk = {name: value for name, value in chunk.items() if name != "prompt_token_ids"}
        return {**chunk, **self._head, "choices": rest} if rest else None

    def _rest_of(self, choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
        index = choice["index"]
        begun = index in self._sent
        sent = self._sent.setdefault(index, ChoiceState())
        again = self._again.setdefault(index, ChoiceState())
        text, tokens = _text(choice), _tokens(choice)
        known = sent.text[len(again.text) :][: len(text)]
        if not text.startswith(known):
            raise DivergedError
        known_tokens = max(0, min(tokens, sent.tokens - again.tokens))
        ids = len(choice.get("token_ids") or ())
        known_ids = max(0, min(ids, sent.ids - again.ids))
        again.text += text
        again.tokens += tokens
        again.ids += ids
        if sent.ended:
            return
        ended = choice.get("finish_reason") is not None
        if ended and len(again.text) < len(sent.text):
            raise DivergedError
        new = (len(text) - len(known)) + (tokens - known_tokens) + (ids - known_ids)
        if begun and not new and not ended:
            return
        sent.text += text[len(known) :]
        sent.tokens += tokens - known_tokens
        sent.ids += ids - known_ids
        sent.ended = ended
        rest = _without(choice, len(known), known_tokens, begun)
        if "token_ids" in rest:
            rest["token_ids"] = rest["token_ids"][known_ids:]
        if begun:
            rest.pop("prompt_token_ids", None)
        yield rest


def error_events(error: APIError) -> bytes:
    """The final events of a failed stream, like the service's own."""
    return f"data: {json.dumps(error.body())}\n\n".encode() + DONE


def _text(choice: dict[str, Any]) -> str:
    """The text of a completion's or a chat's choice."""
    if "delta" in choice:
        return choice["delta"].get("content") or ""
    return choice.get("text") or ""


def _tokens(choice: dict[str, Any]) -> int:
    logprobs = choice.get("logprobs") or {}
    return max((len(logprobs[name] or ()) for name in LISTS if name in logprobs), default=0)


def _without(choice: dict[str, Any], characters: int, tokens: int, begun: bool) -> dict[str, Any]:
    """The choice without the part already sent."""
    rest = dict(choice)
    if "delta" in choice:
        delta = {**choice["delta"]}
        if delta.get("content"):
            delta["content"] = delta["content"][characters:]
        if begun:
            delta.pop("role", None)
        rest["delta"] = delta
    else:
        rest["text"] = choice["text"][characters:]
    if choice.get("logprobs"):
        rest["logprobs"] = {
            name: value[tokens:] if name in LISTS and value else value
            for name, value in choice["logprobs"].items()
        }
    return rest

"""Incremental detokenization: token ids in, one at a time; text that can be sent out.

A character whose bytes span several tokens is emitted with the last of them. Text that may become
a stop string is held back until that is certain.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gptj.tokenizer import GPTJTokenizer


class TextStream:
    """The text of an output in progress; its parts concatenated are the decoded ids.

    Args:
        stop: strings that end the output; the text ends before the first one.
        min_tokens: stop strings are ignored before this many tokens.
        include_stop: end the text after the stop string or the stop token's text.
        begun: the first bytes of an incomplete character at the end of the prompt, which belongs to
            this text if the output completes it.
        echoed: the prompt is shown too: its last character, if left incomplete, becomes U+FFFD
            instead of being dropped.
        skip_special: omit special tokens' text.
    """

    def __init__(
        self,
        tokenizer: GPTJTokenizer,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        *,
        include_stop: bool = False,
        begun: bytes = b"",
        echoed: bool = False,
        skip_special: bool = False,
    ) -> None:
        if any(not text for text in stop):
            raise ValueError("a stop string must not be empty")
        self.stopped_by: str | None = None  # a stop string: no more text follows
        self.sent = 0  # characters returned so far
        self.decoded = 0  # characters of whole tokens so far, returned or held back
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max((len(text) for text in stop), default=1)
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._echoed = echoed
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._tokens = 0
        self._held = ""
        self._passed = ""  # the end of the returned text, where a stop string may begin
        # Invalid UTF-8 becomes U+FFFD, as in the tokenizer's decode.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(begun)
        self._first = begun  # the first character's bytes, until it is complete

    @property
    def stopped(self) -> bool:
        return self.stopped_by is not None

    def push(self, token_id: int) -> str:
        """The text that is certain after this token, possibly empty."""
        self._tokens += 1
        if token_id in self._skipped:
            return self._add("")
        return self._add(self._decode(self._tokenizer.token_bytes(token_id)))

    def finish(self, stop_token: int | None = None) -> str:
        """The rest of the text; an incomplete character becomes U+FFFD.

        Args:
            stop_token: the id that ended the output. Special tokens have no text.
        """
        text = ""
        if stop_token is not None and self._include_stop:
            if stop_token not in self._tokenizer.special_ids:
                text = self.push(stop_token)
        text += self._add(self._decode(b"", final=True))
        if self.stopped:
            return text
        rest, self._held = self._held, ""
        return text + self._send(rest)

    def _decode(self, content: bytes, final: bool = False) -> str:
        text = self._decoder.decode(content, final)
        if self._first:
            self._first += content
            if text:
                completed = self._first.startswith(text[0].encode())
                self._first = b""
                return text if completed or self._echoed else text[1:]
        return text

    def _add(self, new: str) -> str:
        if self.stopped:
            return ""
        self._held += new
        self.decoded += len(new)
        if self._stop and self._tokens >= self._min_tokens:
            if (found := self._end()) is not None:
                end, self.stopped_by = found
                text, self._held = self._held[:end], ""
                return self._send(text)
        end = len(self._held) - self._possible_stop()
        text, self._held = self._held[:end], self._held[end:]
        return self._send(text)

    def _end(self) -> tuple[int, str] | None:
        """Where the held text ends, and by which stop string: the one that begins first."""
        text, passed = self._passed + self._held, len(self._passed)
        places = [
            (place, place + len(stop), stop)
            for stop in self._stop
            if (place := text.find(stop, max(0, passed - len(stop) + 1))) >= 0
        ]
        if not places:
            return None
        begin, end, stop = min(places)
        return (end if self._include_stop else begin) - passed, stop

    def _send(self, text: str) -> str:
        self.sent += len(text)
        if self._include_stop and self._longest > 1:
            self._passed = (self._passed + text)[1 - self._longest :]
        return text

    def _possible_stop(self) -> int:
        """Characters at the end that may begin a stop string."""
        if self._include_stop:
            return 0
        for size in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-size:]
            if any(stop.startswith(end) for stop in self._stop):
                return size
        return 0


def unfinished(content: bytes) -> bytes:
    """The bytes of an incomplete character at the end."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(content[-3:])  # characters have at most 4 bytes
    waiting = decoder.getstate()[0]
    # The decoder also waits for a surrogate's third byte, but its first two are invalid already.
    return b"" if len(waiting.decode(errors="replace")) > 1 else waiting

"""Token ids in, one at a time; text out that a client may see already.

No half characters: a character whose bytes are spread over several tokens comes with its last.
No part of a stop string: what may become one is held back until it is one, or is not.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gptj.tokenizer import GPTJTokenizer


class TextStream:
    """The text of an output while it grows; all its parts together are the decoded ids.

    Args:
        stop: strings that end the output; the text ends before the first one.
        min_tokens: no stop string counts before so many tokens.
    """

    def __init__(
        self, tokenizer: GPTJTokenizer, stop: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        if any(not text for text in stop):
            raise ValueError("a stop string must not be empty")
        self.stopped = False  # by a stop string: there will be no more text
        self.sent = 0  # characters returned so far
        self.decoded = 0  # characters of whole tokens so far, returned or held back
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._held = ""
        # What is no UTF-8 becomes U+FFFD, as in the tokenizer's decode.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is certain after this token; perhaps none."""
        self._tokens += 1
        return self._add(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """The rest, when no token follows; a character that is cut off becomes U+FFFD."""
        text = self._add(self._decoder.decode(b"", final=True))
        if self.stopped:
            return text
        rest, self._held = self._held, ""
        return text + self._send(rest)

    def _add(self, new: str) -> str:
        if self.stopped:
            return ""
        self._held += new
        self.decoded += len(new)
        if self._stop and self._tokens >= self._min_tokens:
            places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
            if places:
                self.stopped = True
                text, self._held = self._held[: min(places)], ""
                return self._send(text)
        end = len(self._held) - self._possible_stop()
        text, self._held = self._held[:end], self._held[end:]
        return self._send(text)

    def _send(self, text: str) -> str:
        self.sent += len(text)
        return text

    def _possible_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-size:]
            if any(stop.startswith(end) for stop in self._stop):
                return size
        return 0

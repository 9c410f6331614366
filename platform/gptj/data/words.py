"""Word boundaries: a text in, spans widened to whole words out.

Words follow Unicode's default segmentation (UAX 29): accents and vowel signs belong to their
letter, "O'Neil" and "1,000" are one word each, and in scripts without spaces between words, such as
Chinese or Thai, each character is a word.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import regex

_BOUNDARY = regex.compile(r"\b", flags=regex.WORD)  # the flag makes \b follow UAX 29


class Words:
    """The word boundaries of a text."""

    def __init__(self, text: str) -> None:
        self._boundaries: list[int] = [match.start() for match in _BOUNDARY.finditer(text)]

    def start(self, place: int) -> int:
        """The last boundary at or before a character."""
        return self._boundaries[bisect_right(self._boundaries, place) - 1]

    def end(self, place: int) -> int:
        """The first boundary at or after the end of a character."""
        return self._boundaries[bisect_left(self._boundaries, place)]

    def widen(self, start: int, end: int) -> tuple[int, int]:
        """A span extended to the boundaries of the words that it cuts."""
        return self.start(start), self.end(end)

"""Pages of a cache: which are free, how many share each, and which prefix of text each holds.

Page numbers only: what lies in a page is the runner's. A full page is known by a digest of its
own tokens and all before them, so that equal tokens after different prefixes are never mixed up.
A page that nobody uses stays known until its room is needed; the longest unused goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

DIGEST_BYTES = 16  # two different prefixes collide with a probability of 2^-64 after 2^32 pages


def extend_digests(digests: list[bytes], tokens: Sequence[int], page_size: int) -> None:
    """Append the digests of those full pages of `tokens` that have none yet."""
    for start in range(len(digests) * page_size, len(tokens) - page_size + 1, page_size):
        ids = np.array(tokens[start : start + page_size], dtype=np.int32)
        before = digests[-1] if digests else b""
        digests.append(blake2b(before + ids.tobytes(), digest_size=DIGEST_BYTES).digest())


class PagePool:
    """Counts the references to `num_pages` pages and finds cached ones again.

    Args:
        num_pages: all of the cache.
        caching: whether pages are remembered by what they hold.
    """

    def __init__(self, num_pages: int, *, caching: bool) -> None:
        self.num_pages = num_pages
        self.caching = caching
        self.clear()

    @property
    def free(self) -> int:
        """Pages without references, those that still hold a prefix included."""
        return len(self._empty) + len(self._unused)

    @property
    def cached(self) -> int:
        """Pages without references that hold a prefix."""
        return len(self._unused)

    def references(self, page: int) -> int:
        return self._references[page]

    def take(self, count: int) -> list[int]:
        """Pages for new content, with one reference each; there must be so many free."""
        return [self._take() for _ in range(count)]

    def share(self, pages: Iterable[int]) -> None:
        """Add a reference to each."""
        for page in pages:
            if self._references[page] == 0:
                del self._unused[page]
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Take a reference off each of a sequence's pages, given in their order there."""
        # The end of a prefix is of no use without its start: it is to go first.
        for page in reversed(pages):
            assert self._references[page] > 0
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._digests:
                    self._unused[page] = None
                else:
                    self._empty.append(page)

    def register(self, page: int, digest: bytes) -> None:
        """Remember what a full page holds, unless another page is known to hold the same."""
        if self.caching and digest not in self._known:
            self._known[digest] = page
            self._digests[page] = digest

    def forget(self, pages: Iterable[int]) -> None:
        """No longer find these pages by what they hold; they must be referenced."""
        for page in pages:
            if (digest := self._digests.pop(page, None)) is not None:
                del self._known[digest]

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The pages that hold the longest known start of a text; they get no reference yet."""
        found = []
        for digest in digests:
            page = self._known.get(digest)
            if page is None:
                break
            found.append(page)
        return found

    def unused(self, pages: Iterable[int]) -> int:
        """How many of the pages count as free."""
        return sum(self._references[page] == 0 for page in pages)

    def clear(self) -> None:
        """Forget all references and contents."""
        self._references = [0] * self.num_pages
        self._empty = list(reversed(range(self.num_pages)))  # a stack: used ones are still warm
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached, the longest unused first
        self._known: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}  # of each known page

    def _take(self) -> int:
        if self._empty:
            page = self._empty.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            del self._known[self._digests.pop(page)]
        self._references[page] = 1
        return page

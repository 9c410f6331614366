"""Allocates the pages of a KV cache: reference counts, and a prefix cache of full pages.

It only handles page numbers; the runner holds their content. A full page is identified by a digest
of its own tokens and all tokens before it, and of the adapter. An unused page stays cached until
its memory is needed; the least recently used is evicted first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

DIGEST_BYTES = 16  # the collision probability is 2^-64 after 2^32 pages


def extend_digests(
    digests: list[bytes], tokens: Sequence[int], page_size: int, salt: bytes = b""
) -> None:
    """Append the missing digests of the full pages of `tokens`.

    Args:
        salt: identifies what else keys and values depend on: the adapter.
    """
    for start in range(len(digests) * page_size, len(tokens) - page_size + 1, page_size):
        ids = np.array(tokens[start : start + page_size], dtype=np.int32)
        before = digests[-1] if digests else salt
        digests.append(blake2b(before + ids.tobytes(), digest_size=DIGEST_BYTES).digest())


class PagePool:
    """Reference-counts `num_pages` pages, and finds cached ones by their digests.

    Args:
        num_pages: pages in the cache.
        caching: whether full pages are cached by content.
    """

    def __init__(self, num_pages: int, *, caching: bool) -> None:
        self.num_pages = num_pages
        self.caching = caching
        self.clear()

    @property
    def free(self) -> int:
        """Unreferenced pages, including cached ones."""
        return len(self._empty) + len(self._unused)

    @property
    def cached(self) -> int:
        """Unreferenced pages that hold a cached prefix."""
        return len(self._unused)

    def references(self, page: int) -> int:
        return self._references[page]

    def take(self, count: int) -> list[int]:
        """Allocate `count` pages with one reference each; that many must be free."""
        return [self._take() for _ in range(count)]

    def share(self, pages: Iterable[int]) -> None:
        """Add a reference to each."""
        for page in pages:
            if self._references[page] == 0:
                del self._unused[page]
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop a reference to each of a sequence's pages, given in sequence order."""
        # The end of a prefix is useless without its start, so evict it first.
        for page in reversed(pages):
            assert self._references[page] > 0
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._digests:
                    self._unused[page] = None
                else:
                    self._empty.append(page)

    def register(self, page: int, digest: bytes) -> None:
        """Cache a full page by its content, unless another page has the same content."""
        if self.caching and digest not in self._known:
            self._known[digest] = page
            self._digests[page] = digest

    def forget(self, pages: Iterable[int]) -> None:
        """Drop these referenced pages from the prefix cache."""
        for page in pages:
            if (digest := self._digests.pop(page, None)) is not None:
                del self._known[digest]

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The cached pages of the longest known prefix; takes no references."""
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
        """Drop all references and cached content."""
        self._references = [0] * self.num_pages
        self._empty = list(reversed(range(self.num_pages)))  # a stack: recently used pages are warm
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached, least recently used first
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

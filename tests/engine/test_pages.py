"""PagePool: references are counted, equal prefixes found, and the longest unused goes first."""

from __future__ import annotations

import random

from gptj.engine.page_pool import PagePool, extend_digests

SIZE = 4


def digests(tokens: list[int]) -> list[bytes]:
    found: list[bytes] = []
    extend_digests(found, tokens, SIZE)
    return found


def filled(pool: PagePool, tokens: list[int]) -> list[int]:
    """Pages with these tokens, registered and then given back."""
    known = digests(tokens)
    pages = pool.take(len(known))
    for page, digest in zip(pages, known, strict=True):
        pool.register(page, digest)
    pool.release(pages)
    return pages


def test_a_shared_page_is_freed_with_its_last_reference() -> None:
    pool = PagePool(3, caching=True)
    pages = pool.take(2)
    pool.share(pages[:1])
    assert pool.free == 1
    assert pool.references(pages[0]) == 2
    pool.release(pages)
    assert pool.free == 2
    pool.release(pages[:1])
    assert pool.free == 3
    assert sorted(pool.take(3)) == [0, 1, 2]


def test_the_longest_cached_prefix_is_found() -> None:
    pool = PagePool(8, caching=True)
    pages = filled(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
    assert pool.find(digests([1, 2, 3, 4, 5, 6, 7, 8, 9])) == pages[:2]
    assert pool.find(digests([1, 2, 3, 4, 0, 6, 7, 8, 9, 10, 11, 12])) == pages[:1]
    assert pool.find(digests([1, 2, 3])) == []


def test_equal_tokens_after_different_prefixes_are_different_pages() -> None:
    pool = PagePool(8, caching=True)
    filled(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    assert pool.find(digests([4, 3, 2, 1, 5, 6, 7, 8])) == []
    assert pool.find(digests([5, 6, 7, 8])) == []


def test_digests_can_be_extended_incrementally() -> None:
    tokens = list(range(19))
    known = digests(tokens[:9])
    assert len(known) == 2
    extend_digests(known, tokens, SIZE)
    assert known == digests(tokens)
    assert len(known) == 4


def test_a_cached_page_in_use_is_not_reallocated() -> None:
    pool = PagePool(3, caching=True)
    pages = filled(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    assert pool.free == 3
    assert pool.cached == 2
    assert pool.unused(pages) == 2
    pool.share(pages)
    assert pool.free == 1
    assert pool.cached == 0
    assert pool.unused(pages) == 0
    assert pool.take(1)[0] not in pages


def test_eviction_is_lru_and_from_the_end_of_a_prefix() -> None:
    pool = PagePool(5, caching=True)
    first, second = [1, 2, 3, 4, 5, 6, 7, 8], [9, 9, 9, 9, 8, 8, 8, 8]
    old = filled(pool, first)
    filled(pool, second)
    pool.take(1)  # the empty one
    pool.take(1)
    assert pool.find(digests(first)) == old[:1]
    pool.share(old[:1])  # used again, it is no longer the longest unused
    pool.release(old[:1])
    pool.take(2)
    assert pool.find(digests(second)) == []
    assert pool.find(digests(first)) == old[:1]


def test_without_caching_nothing_is_found() -> None:
    pool = PagePool(4, caching=False)
    filled(pool, [1, 2, 3, 4])
    assert pool.find(digests([1, 2, 3, 4])) == []
    assert pool.cached == 0


def test_a_forgotten_page_is_not_found() -> None:
    pool = PagePool(2, caching=True)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    pages = filled(pool, tokens)
    pool.share(pages)
    pool.forget(pages[1:])
    pool.release(pages)
    assert pool.find(digests(tokens)) == pages[:1]
    assert len(pool.take(2)) == 2


def test_a_cleared_pool_is_like_new() -> None:
    pool = PagePool(3, caching=True)
    filled(pool, [1, 2, 3, 4])
    pool.take(2)
    pool.clear()
    assert pool.free == 3
    assert pool.cached == 0
    assert pool.find(digests([1, 2, 3, 4])) == []


def test_random_use_neither_double_allocates_nor_leaks_pages() -> None:
    rng = random.Random(0)
    pool = PagePool(12, caching=True)
    held: list[list[int]] = []
    for _ in range(3000):
        text = [rng.randrange(2) for _ in range(4 * rng.randrange(1, 5))]
        known = digests(text)
        hits = pool.find(known)
        if len(known) - len(hits) <= pool.free - pool.unused(hits) and rng.random() < 0.6:
            pool.share(hits)
            new = pool.take(len(known) - len(hits))
            assert not {*new} & {page for pages in held for page in pages}
            for page, digest in zip(new, known[len(hits) :], strict=True):
                pool.register(page, digest)
            held.append([*hits, *new])
        elif held:
            pool.release(held.pop(rng.randrange(len(held))))
        used = {page for pages in held for page in pages}
        assert pool.free == 12 - len(used)
        for page in used:
            assert pool.references(page) == sum(page in pages for pages in held)
    for pages in held:
        pool.release(pages)
    assert pool.free == 12

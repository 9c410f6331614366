"""Stream S3 objects in order with prefetching, several files in parallel.

The number of parts in flight bounds the memory, whatever the sizes of the files.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

from gptj import storage

Item = TypeVar("Item")


Part = list[memoryview]  # buffers filled by one request


def stream(
    address: str, start: int, parts: Iterable[Part], fetchers: Executor, ahead: int
) -> Iterator[Part]:
    """Fill the parts in order from an S3 object, starting at byte `start`.

    Each is yielded once it is full; at most `ahead` are in flight. A part should have at most
    storage.PART_BYTES.

    Raises:
        storage.StorageError: if the object ends early, or cannot be read.
    """
    coming: deque[tuple[Future[None], Part]] = deque()
    position = start
    try:
        for part in parts:
            future = fetchers.submit(storage.read_scattered, address, position, part)
            coming.append((future, part))
            position += sum(len(each) for each in part)
            if len(coming) == ahead:
                yield _first(coming)
        while coming:
            yield _first(coming)
    finally:
        for future, _ in coming:
            future.cancel()


def new_parts(size: int) -> Iterator[Part]:
    """Newly allocated parts for a whole file."""
    for start in range(0, size, storage.PART_BYTES):
        yield [memoryview(bytearray(min(storage.PART_BYTES, size - start)))]


def merged(sources: Sequence[Iterator[Item]], threads: int) -> Iterator[Item]:
    """Merge several iterators, in order of arrival; one thread each, at most `threads` at a time.

    Each runs at most one item ahead. The first error stops all and is raised. Items must not be
    None.
    """
    ready: SimpleQueue[tuple[Item | None, BaseException | None]] = SimpleQueue()
    room = threading.Semaphore(threads)
    ended = threading.Event()

    def drain(source: Iterator[Item]) -> None:
        try:
            while not ended.is_set():
                item = next(source, None)
                if item is None:
                    break
                room.acquire()
                ready.put((item, None))
                del item  # now owned by the consumer, which may want to free it
            ready.put((None, None))
        except BaseException as error:  # re-raised in the consumer
            ready.put((None, error))

    with ThreadPoolExecutor(threads) as pool:
        try:
            for source in sources:
                pool.submit(drain, source)
            running = len(sources)
            while running:
                item, error = ready.get()
                if error is not None:
                    raise error
                if item is None:
                    running -= 1
                    continue
                room.release()
                taken = [item]
                del item
                yield taken.pop()
        finally:
            ended.set()
            room.release(len(sources) + 1)


def _first(coming: deque[tuple[Future[None], Part]]) -> Part:
    future, part = coming.popleft()
    future.result()
    return part

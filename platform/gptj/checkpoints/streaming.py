"""Bytes of S3 in order, while those that follow are on their way; several files side by side.

The memory that is in flight is bounded by the number of parts, whatever the sizes of the files.
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


Part = list[memoryview]  # buffers that one request fills


def stream(
    address: str, start: int, parts: Iterable[Part], fetchers: Executor, ahead: int
) -> Iterator[Part]:
    """Fill the parts one after the other from byte `start` of an object of S3 on.

    Each is yielded when it is full, in their order; at most `ahead` are being filled. A part
    should have storage.PART_BYTES at most.

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
    """Parts in memory of their own, for all of a file."""
    for start in range(0, size, storage.PART_BYTES):
        yield [memoryview(bytearray(min(storage.PART_BYTES, size - start)))]


def merged(sources: Sequence[Iterator[Item]], threads: int) -> Iterator[Item]:
    """What several iterators give, as it comes; a thread each, at most `threads` at a time.

    Each computes at most one item more than was asked for. The first error ends them all, and is
    raised. Items are not None.
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
                del item  # it is the consumer's alone, who may want its memory back
            ready.put((None, None))
        except BaseException as error:  # raised again where the items are used
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

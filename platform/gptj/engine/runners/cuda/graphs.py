"""Steps of single tokens, recorded once for each of some batch sizes and then replayed whole.

A replayed step costs the host one call, where its hundreds of kernels would each cost one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch

SIZES: tuple[int, ...] = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 257, 32))
MAX_SIZE = SIZES[-1]  # beyond it a kernel takes longer than its call


def size_for(count: int) -> int:
    """The least of SIZES that has room for so many, at most MAX_SIZE."""
    return SIZES[bisect_left(SIZES, count)]


class Graphs:
    """Recorded at once, the largest first: they share the memory that it needs.

    The device must be the current one.

    Args:
        step: computes a step of the given size, on static tensors only, at the same addresses
            each time; what it computes stands in one of them.
        stream: to record on. cuBLAS has a workspace for each, and keeps it: graphs that replace
            others are recorded on the same.
    """

    def __init__(self, step: Callable[[int], None], stream: torch.cuda.Stream) -> None:
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(SIZES):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(size)  # what is done once, such as compiling, cannot be recorded
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls are of the record: others may go on with theirs.
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                step(size)
            self._graphs[size] = graph

    def replay(self, size: int) -> None:
        self._graphs[size].replay()

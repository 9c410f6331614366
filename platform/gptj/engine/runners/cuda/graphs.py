"""CUDA graphs of decode steps, captured for a few batch sizes and replayed.

A replay costs the host one launch instead of hundreds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch

SIZES: tuple[int, ...] = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 257, 32))
MAX_SIZE = SIZES[-1]  # beyond it kernels take longer than their launches


def size_for(count: int) -> int:
    """The smallest of SIZES that holds `count` rows, at most MAX_SIZE."""
    return SIZES[bisect_left(SIZES, count)]


class Graphs:
    """Captures all graphs, largest first, so that the others share its memory.

    Their device must be current.

    Args:
        step: computes a step of the given size on static tensors.
        stream: to capture on. cuBLAS keeps a workspace for each stream: capture graphs that
            replace others on the same stream.
    """

    def __init__(self, step: Callable[[int], None], stream: torch.cuda.Stream) -> None:
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(SIZES):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(size)  # warm up: compilation cannot be captured
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may keep using CUDA.
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                step(size)
            self._graphs[size] = graph

    def replay(self, size: int) -> None:
        self._graphs[size].replay()

"""What the parts of the check share: the device, its clock and its memory, and a place for results.

On a GPU time is measured by its own events, after a warm-up, and a figure is a median. A rehearsal
runs the same lines on the CPU, with tiny shapes.
"""

from __future__ import annotations

import gc
import logging
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from results import Results, Row

from gptj import GPTJConfig

T = TypeVar("T")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Device(Protocol):
    kind: str  # as PyTorch names it

    def synchronize(self) -> None:
        """Wait until it has done everything."""

    def seconds(self, function: Callable[[], object], calls: int) -> float:
        """Of a call, on the mean of some that follow each other."""

    def captured(self, function: Callable[[], object]) -> Callable[[], object]:
        """The same work without the host's: a graph of it, as steps that decode are replayed."""

    def memory(self) -> dict[str, float]:
        """In GB: free and in all; PyTorch's own, now and at most since `reset_peak`."""

    def reset_peak(self) -> None: ...

    def empty(self) -> None:
        """Give back what PyTorch keeps."""


class Cuda:
    kind = "cuda"

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, function: Callable[[], object], calls: int) -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def captured(self, function: Callable[[], object]) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # compiling cannot be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            function()
        return graph.replay

    def memory(self) -> dict[str, float]:
        free, total = torch.cuda.mem_get_info()
        return {
            "free_gb": free / 1e9,
            "total_gb": total / 1e9,
            "allocated_gb": torch.cuda.memory_allocated() / 1e9,
            "reserved_gb": torch.cuda.memory_reserved() / 1e9,
            "peak_allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
            "peak_reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        }

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def empty(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class Cpu:
    """Stands in for a GPU in a rehearsal."""

    kind = "cpu"

    def synchronize(self) -> None:
        pass

    def seconds(self, function: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    def captured(self, function: Callable[[], object]) -> Callable[[], object]:
        return function

    def memory(self) -> dict[str, float]:
        pages = {"free_gb": os.sysconf("SC_AVPHYS_PAGES"), "total_gb": os.sysconf("SC_PHYS_PAGES")}
        return {name: count * os.sysconf("SC_PAGE_SIZE") / 1e9 for name, count in pages.items()}

    def reset_peak(self) -> None:
        pass

    def empty(self) -> None:
        gc.collect()


class Check:
    """One part of the check."""

    def __init__(self, part: str, out: Path) -> None:
        self.rehearsal = bool(os.environ.get("GPTJ_CHECK_REHEARSE"))
        if not self.rehearsal and not torch.cuda.is_available():
            raise SystemExit("PyTorch finds no CUDA device; --rehearse runs the check without one")
        self.part = part
        self.out = out
        self.results = Results(out, part)
        self.device: Device = Cpu() if self.rehearsal else Cuda()
        self._end = time.monotonic() + float(os.environ.get("GPTJ_CHECK_SECONDS", "600"))

    def pick(self, real: T, tiny: T) -> T:
        """What the check uses, or its rehearsal."""
        return tiny if self.rehearsal else real

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def config(self, layers: int = 28) -> GPTJConfig:
        """GPT-J 6B's shapes; in a rehearsal tiny ones, and one layer in place of many."""
        if not self.rehearsal:
            return GPTJConfig(n_layer=layers)
        tiny = {"vocab_size": 112, "n_positions": 48, "n_embd": 32, "n_head": 2, "rotary_dim": 8}
        return GPTJConfig(n_layer=3 if layers == 3 else 1, **tiny)

    def add(self, what: str, **values: Any) -> Row:
        return self.results.add(what, **values)

    def found(self, what: str) -> Row:
        """An earlier line, of any part; empty if it is not there."""
        return next((row for row in reversed(self.results.all()) if row["what"] == what), {})

    @property
    def bandwidth(self) -> float:
        """Bytes a second that the card can read, as part `card` has measured; NaN if it has not."""
        return float(self.found("read bandwidth").get("gb_per_s", "nan")) * 1e9

    @property
    def matrix_peak(self) -> float:
        """Floating-point operations a second in fp16, likewise."""
        return float(self.found("matrix peak").get("tflops", "nan")) * 1e12

    @contextmanager
    def attempt(self, what: str, **values: Any) -> Iterator[None]:
        """A block whose error is a line of the results and ends nothing else."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(what, **values, error=f"{type(error).__name__}: {error}"[:600])
        finally:
            self.device.empty()

    def late(self, what: str, seconds: float, **values: Any) -> bool:
        """Whether too little time is left for something, which is then a line of the results."""
        if self.rehearsal or self.seconds_left > seconds:
            return False
        self.add(what, **values, skipped="no time left")
        return True

    def time(
        self, function: Callable[[], object], *, warm_up: int = 3, repeats: int = 7, calls: int = 10
    ) -> dict[str, Any]:
        """Milliseconds of a call: the median over `repeats` of the mean of `calls`."""
        if self.rehearsal:
            warm_up, repeats, calls = 0, 1, 1
        for _ in range(warm_up):
            function()
        self.device.synchronize()
        times = sorted(self.device.seconds(function, calls) * 1e3 for _ in range(repeats))
        return {
            "ms": statistics.median(times),
            "ms_least": times[0],
            "ms_most": times[-1],
            "repeats": repeats,
            "calls": calls,
        }

    def wall(self, function: Callable[[], T]) -> tuple[float, T]:
        """Seconds from an idle device to an idle device, and the result."""
        self.device.synchronize()
        start = time.perf_counter()
        result = function()
        self.device.synchronize()
        return time.perf_counter() - start, result


class _LinesOfTheLibrary(logging.Handler):
    """What gptj logs becomes lines of the results: which products were chosen, say."""

    def __init__(self, check: Check) -> None:
        super().__init__(logging.INFO)
        self._check = check

    def emit(self, record: logging.LogRecord) -> None:
        self._check.add("log", level=record.levelname, message=record.getMessage()[:300])


def run(part: Callable[[Check], None]) -> None:
    """The `main` of a part, whose name is its file's."""
    path = Path(sys.argv[0])
    check = Check(path.stem, Path(sys.argv[1]))
    logger = logging.getLogger("gptj")
    logger.setLevel(logging.INFO)
    logger.addHandler(_LinesOfTheLibrary(check))
    part(check)
    assert "ray" not in sys.modules, "the check needs no Ray"

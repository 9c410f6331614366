"""The attention kernels with their tunables beside PyTorch's attention; copies of pages.

PyTorch's sees contiguous keys and values, ours scattered pages. FlashInfer is left out: its wheel
alone is larger than all that may be carried.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from checking import Check
from models import cache_bytes_a_token, new_model, new_runner
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.jit import KernelInterface

from gptj.engine.runners.base import PageCopy, StepBatch
from gptj.engine.runners.cuda import launch
from gptj.engine.runners.cuda.fp8 import FP8
from gptj.engine.runners.cuda.inputs import InputsMaker
from gptj.engine.runners.cuda.launch import TritonOperations
from gptj.engine.runners.cuda.operations import Cache, Inputs

PAGE = 16
SINGLES = ((64, 1024), (1, 1024), (64, 192), (256, 192), (8, 2048))  # sequences, context
GROUPED = (256, 4, 54, 930)  # beams: rows, rows of a prompt, pages that they share, context
CYCLED_BYTES = 256 * 10**6  # five times an H100's cache
CHUNKS = (2048, 512, 128)  # tokens of one prompt without a past
# What is tried beside our own choice, each a compilation: a kernel, and its constants.
DECODE_KERNEL, PROMPT_KERNEL = "paged_decode_attention", "paged_prefill_attention"
TUNED_SINGLES: tuple[dict[str, int], ...] = (
    {"STAGES": 3},
    {"STAGES": 7},
    {"num_warps": 4},
    {"BLOCK_PLACES": 32, "STAGES": 3, "num_warps": 4},
    {"BLOCK_PLACES": 32, "num_warps": 4},
    {"BLOCK_PLACES": 64, "STAGES": 3, "num_warps": 4},
)
TUNED = 2  # of SINGLES: each combination of constants is compiled, which takes a second
# Of a cache in fp8, with the first of SINGLES: what compiles without spills.
TUNED_FP8: tuple[dict[str, int], ...] = (
    {"num_warps": 2},
    {"STAGES": 4},
    {"STAGES": 6},
    {"STAGES": 3},
)
LAUNCHED_SINGLES: tuple[dict[str, int], ...] = ({"PROGRAMS": 2}, {"PROGRAMS": 8})  # of launch.py
TUNED_CHUNKS: tuple[dict[str, int], ...] = (
    {"BLOCK_PLACES": 32, "num_warps": 8},
    {"BLOCK_PLACES": 32, "STAGES": 3, "num_warps": 8},
    {"STAGES": 3},
)
UNCHANGED: AbstractContextManager[Any] = nullcontext()
OPTIONS = ("num_warps", "num_stages", "maxnreg")  # of any kernel's launch
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@contextmanager
def overriding(name: str, changes: Mapping[str, int]) -> Iterator[None]:
    """A kernel is launched with some of its constants replaced.

    LookupError if it has no such constant, or was not launched: then nothing has been tried.
    """
    launching = KernelInterface.__getitem__
    launches = 0

    def changed(kernel: Any, grid: object) -> Callable[..., object]:
        launch_kernel = launching(kernel, grid)
        function = kernel
        while hasattr(function, "fn"):
            function = function.fn
        if function.__name__ != name:
            return launch_kernel
        if unknown := set(changes) - {*inspect.signature(function).parameters, *OPTIONS}:
            raise LookupError(f"{name} has no {', '.join(sorted(unknown))}")

        def call(*arguments: object, **names: object) -> object:
            nonlocal launches
            launches += 1
            return launch_kernel(*arguments, **{**names, **changes})

        return call

    with mock.patch.object(KernelInterface, "__getitem__", changed):
        yield
    if not launches:
        raise LookupError(f"no kernel {name} was launched, so that {changes} changed nothing")


class Layer:
    """Random keys and values of one layer, and our operations on them."""

    def __init__(self, check: Check, pages: int, dtype: torch.dtype = torch.float16) -> None:
        self.config = check.config()
        self.kind = check.device.kind
        self.operations = TritonOperations(self.config, torch.float16, processors=1)
        if not check.rehearsal:
            self.operations = TritonOperations.on(
                torch.device("cuda", 0), self.config, torch.float16
            )
        shape = (pages, self.config.n_head, PAGE, self.config.head_dim)
        cache = Cache.zeros(self.config, 1, pages, dtype, torch.device(self.kind))
        for part in cache.data:
            part.copy_(self.random(*shape))
        (self.cache,) = cache.layers()
        self.dtype = "fp8" if dtype == FP8 else "fp16"
        self.token_bytes = cache_bytes_a_token(self.config, dtype) // self.config.n_layer
        max_pages = self.config.n_positions // PAGE
        self.maker = InputsMaker(
            torch.device(self.kind), max_pages, PAGE, pages - 1, 256, self.operations.tile
        )
        self.pages = pages

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.kind, dtype=torch.float32).half()

    def inputs(
        self,
        lengths: list[int],
        contexts: list[int],
        skipped: int = 0,
        together: int = 1,
        shared: int = 0,
    ) -> Inputs:
        """The last `length` tokens of each context, whose pages lie scattered.

        Args:
            skipped: pages, which other inputs use.
            together: rows that share their first pages.
            shared: how many of them.
        """
        counts = [-(-context // PAGE) for context in contexts]
        pages = np.random.default_rng(0).permutation(self.pages - 1)
        table = np.zeros((len(contexts), max(counts)), np.int32)
        for row, count in enumerate(counts):
            table[row, :count] = np.resize(np.roll(pages, -skipped - row * count), count)
            table[row, :shared] = table[row - row % together, :shared]
        positions = [
            np.arange(context - length, context)
            for length, context in zip(lengths, contexts, strict=True)
        ]
        tokens = sum(lengths)
        return self.maker.of(
            StepBatch(
                np.zeros(tokens, np.int32),
                np.concatenate(positions).astype(np.int32),
                np.cumsum([0, *lengths]).astype(np.int32),
                table,
                np.arange(tokens, dtype=np.int32),
            )
        )

    def attending(self, inputs: Inputs) -> Callable[[], object]:
        tokens = len(inputs.ids_T)
        q_THK = self.random(tokens, self.config.n_head, self.config.head_dim)
        attn_mlp = self.random(tokens, self.config.n_embd + self.config.inner_dim)
        return lambda: self.operations.paged_attention(q_THK, inputs, self.cache, attn_mlp)


def measure(check: Check) -> None:
    layer = Layer(check, check.pick(4096, 64) + 1)  # 1.1 GB: no cache holds it
    for number, (count, context) in enumerate(check.pick(SINGLES, ((2, 20),))):
        with check.attempt("attention of single tokens", rows=count, context=context):
            tuned = check.pick(TUNED_SINGLES, TUNED_SINGLES[:1]) if number < TUNED else ()
            decode(check, layer, count, context, tuned)
    with check.attempt("attention of groups"):
        grouped(check, layer)
    for tokens in check.pick(CHUNKS, (20,)):
        with check.attempt("attention of a prompt", tokens=tokens):
            prompt(check, layer, tokens)
    del layer
    with check.attempt("copies of pages"):
        copies(check)


def measure_fp8(check: Check) -> None:
    """Of single tokens and beams, with a cache in fp8."""
    layer = Layer(check, check.pick(4096, 64) + 1, FP8)
    decode(check, layer, *check.pick(SINGLES[0], (2, 20)), check.pick(TUNED_FP8, TUNED_FP8[:1]))
    grouped(check, layer)


def decode(
    check: Check, layer: Layer, count: int, context: int, tuned: Sequence[dict[str, int]]
) -> None:
    """Bound by reading keys and values once: shares are of the read bandwidth.

    Small ones would stay in the card's own cache from call to call: several take turns, as a
    step's layers do, and a figure is of one.
    """
    config = layer.config
    moved = count * context * layer.token_bytes
    values = {"cache": layer.dtype, "rows": count, "context": context}
    pages = count * -(-context // PAGE)
    turns = max(1, min(check.pick(CYCLED_BYTES, 2 * moved) // moved, (layer.pages - 1) // pages))
    functions = [
        layer.attending(layer.inputs([1] * count, [context] * count, turn * pages))
        for turn in range(turns)
    ]

    def add(
        way: str,
        functions: Sequence[Callable[[], object]],
        changing: AbstractContextManager[Any] = UNCHANGED,
    ) -> None:
        with check.attempt("attention of single tokens", way=way, **values):
            with changing:
                timing = check.time(
                    check.device.captured(lambda: [function() for function in functions]), repeats=5
                )
            for name in ("ms", "ms_least", "ms_most"):
                timing[name] /= turns
            rate = moved / timing["ms"] * 1e3
            share = rate / check.bandwidth
            check.add(
                "attention of single tokens",
                way=way,
                **values,
                turns=turns,
                gb_per_s=rate / 1e9,
                share_of_read_bandwidth=share,
                **timing,
            )

    add("ours", functions)
    for changes in tuned:
        if not check.late("attention of single tokens", 4, way=str(changes), **values):
            add(f"ours, {changes}", functions, overriding(DECODE_KERNEL, changes))
    for changes in check.pick(LAUNCHED_SINGLES, LAUNCHED_SINGLES[:1]) if tuned else ():
        add(f"ours, {changes}", functions, mock.patch.dict(vars(launch), changes))
    if layer.cache.key_scales is not None:
        return
    heads, width = config.n_head, config.head_dim
    q = layer.random(count, heads, 1, width)

    def contiguous() -> Callable[[], object]:
        keys, others = (layer.random(count, heads, context, width) for _ in range(2))
        return lambda: F.scaled_dot_product_attention(q, keys, others)

    add("PyTorch, contiguous", [contiguous() for _ in range(turns)])


def grouped(check: Check, layer: Layer) -> None:
    """Beams: pages that several share are to be read once."""
    rows, together, shared, context = check.pick(GROUPED, (4, 2, 4, 70))
    inputs = layer.inputs([1] * rows, [context] * rows, 0, together, shared)
    alone = rows * (context - shared * PAGE)
    read = (alone + rows // together * shared * PAGE) * layer.token_bytes
    timing = check.time(layer.attending(inputs), repeats=5)
    rate = read / timing["ms"] * 1e3
    check.add(
        "attention of groups",
        cache=layer.dtype,
        rows=rows,
        together=together,
        shared_tokens=shared * PAGE,
        context=context,
        groups=int((inputs.groups_R2[:, 0] > 0).sum()),
        gb_per_s=rate / 1e9,
        share_of_read_bandwidth=rate / check.bandwidth,
        **timing,
    )


def prompt(check: Check, layer: Layer, tokens: int) -> None:
    """Bound by arithmetic: shares are of the matrix peak, of the causal half."""
    config = layer.config
    function = layer.attending(layer.inputs([tokens], [tokens]))
    operations = 2.0 * config.n_embd * tokens * (tokens + 1)

    def add(
        way: str, function: Callable[[], object], changing: AbstractContextManager[Any] = UNCHANGED
    ) -> None:
        with check.attempt("attention of a prompt", way=way, tokens=tokens):
            with changing:
                timing = check.time(check.device.captured(function), repeats=5)
            rate = operations / timing["ms"] * 1e3
            check.add(
                "attention of a prompt",
                way=way,
                tokens=tokens,
                tflops=rate / 1e12,
                share_of_matrix_peak=rate / check.matrix_peak,
                **timing,
            )

    add("ours", function)
    for changes in check.pick(TUNED_CHUNKS, TUNED_CHUNKS[:1]):
        if not check.late("attention of a prompt", 4, way=str(changes), tokens=tokens):
            add(f"ours, {changes}", function, overriding(PROMPT_KERNEL, changes))
    q, k, v = (layer.random(1, config.n_head, tokens, config.head_dim) for _ in range(3))

    def theirs() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    add("PyTorch", theirs)
    for backend in check.pick(BACKENDS, ()):
        try:
            with sdpa_kernel(backend):
                theirs()
                add(f"PyTorch, {backend.name}", theirs)
        except RuntimeError as error:  # not for this head width, card or build
            check.add(
                "attention of a prompt",
                way=f"PyTorch, {backend.name}",
                tokens=tokens,
                missing=str(error).splitlines()[0][:200],
            )


def copies(check: Check) -> None:
    """Pages of all layers, as beams that part copy them: read and written once."""
    runner = new_runner(check, new_model(check, check.config(layers=2), torch.float16), 513)
    layers = runner.config.n_layer
    size = cache_bytes_a_token(runner.config, torch.float16) * PAGE
    for count in check.pick((1, 64, 192), (1, 2)):
        pages = [PageCopy(source, 256 + source, filled=PAGE) for source in range(count)]
        timing = check.time(partial(runner.copy_pages, pages), repeats=5, calls=5)
        check.add(
            "copies of pages",
            pages=count,
            layers=layers,
            gb_per_s=2 * size * count / timing["ms"] / 1e6,
            **timing,
        )
    runner.close()

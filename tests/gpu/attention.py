"""Part 6: the attention kernels with their tunables beside PyTorch's attention; copies of pages.

PyTorch's sees contiguous keys and values, ours scattered pages. FlashInfer is left out: its wheel
alone is larger than all that may be carried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from gptj.engine.runners.cuda.inputs import InputsMaker
from gptj.engine.runners.cuda.launch import TritonOperations
from gptj.engine.runners.cuda.operations import Inputs, LayerCache

PAGE = 16
SINGLES = ((64, 1024), (1, 1024), (64, 192), (256, 192), (8, 2048))  # sequences, context
CHUNKS = (2048, 512, 128)  # tokens of one prompt without a past
TUNED_SINGLES = (
    {"STAGES": 1},
    {"STAGES": 2},
    {"STAGES": 4},
    {"num_warps": 1},
    {"num_warps": 2},
    {"num_warps": 8},
    {"STAGES": 2, "num_warps": 2},
    {"STAGES": 4, "num_warps": 2},
)
TUNED = 2  # of SINGLES: each combination of constants is compiled, which takes a second
PROGRAMS = (4, 16)  # a multiprocessor, beside our own choice
TUNED_CHUNKS = (
    {"BLOCK_PLACES": 64, "num_warps": 8},
    {"BLOCK_PLACES": 64, "num_warps": 4},
    {"BLOCK_PLACES": 32, "num_warps": 8},
    {"BLOCK_PLACES": 16, "num_warps": 4},
    {"STAGES": 1},
    {"STAGES": 3},
)
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@contextmanager
def overriding(**changes: int) -> Iterator[None]:
    """Kernels are launched with some of their constants replaced."""
    launching = KernelInterface.__getitem__

    def changed(kernel: Any, grid: object) -> Callable[..., object]:
        launch_kernel = launching(kernel, grid)

        def call(*arguments: object, **names: object) -> object:
            attends = str(getattr(kernel, "__name__", "")).startswith("attend")
            ours = changes if attends else {}
            return launch_kernel(*arguments, **{**names, **ours})

        return call

    with mock.patch.object(KernelInterface, "__getitem__", changed):
        yield


class Layer:
    """Random keys and values of one layer, and our operations on them."""

    def __init__(self, check: Check, pages: int) -> None:
        self.config = check.config()
        self.kind = check.device.kind
        processors = 1
        if not check.rehearsal:
            processors = torch.cuda.get_device_properties(0).multi_processor_count
        self.operations = TritonOperations(self.config, torch.float16, processors)
        shape = (pages, self.config.n_head, PAGE, self.config.head_dim)
        self.cache = LayerCache(self.random(*shape), self.random(*shape))
        max_pages = self.config.n_positions // PAGE
        self.maker = InputsMaker(
            torch.device(self.kind), max_pages, PAGE, pages - 1, 256, self.operations.tile
        )
        self.pages = pages

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.kind, dtype=torch.float32).half()

    def inputs(self, lengths: list[int], contexts: list[int]) -> Inputs:
        """The last `length` tokens of each context, whose pages lie scattered."""
        counts = [-(-context // PAGE) for context in contexts]
        pages = np.random.default_rng(0).permutation(self.pages - 1)
        table = np.zeros((len(contexts), max(counts)), np.int32)
        for row, count in enumerate(counts):
            table[row, :count] = np.resize(np.roll(pages, -row * count), count)
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
            decode(check, layer, count, context, tuned=number < TUNED)
    for tokens in check.pick(CHUNKS, (20,)):
        with check.attempt("attention of a prompt", tokens=tokens):
            prompt(check, layer, tokens)
    del layer
    with check.attempt("copies of pages"):
        copies(check)


def decode(check: Check, layer: Layer, count: int, context: int, *, tuned: bool) -> None:
    """Bound by reading keys and values once: shares are of the read bandwidth."""
    config = layer.config
    function = layer.attending(layer.inputs([1] * count, [context] * count))
    moved = 2 * count * context * config.n_embd * 2
    values = {"rows": count, "context": context}

    def add(way: str, function: Callable[[], object]) -> None:
        with check.attempt("attention of single tokens", way=way, **values):
            timing = check.time(function, repeats=5)
            rate = moved / timing["ms"] * 1e3
            share = rate / check.bandwidth
            check.add(
                "attention of single tokens",
                way=way,
                **values,
                gb_per_s=rate / 1e9,
                share_of_read_bandwidth=share,
                **timing,
            )

    add("ours", function)
    for changes in check.pick(TUNED_SINGLES, TUNED_SINGLES[:1]) if tuned else ():
        if not check.late("attention of single tokens", 4, way=str(changes), **values):
            with overriding(**changes):
                add(f"ours, {changes}", function)
    for programs in check.pick(PROGRAMS, PROGRAMS[:1]) if tuned else ():
        with mock.patch.object(launch, "PROGRAMS", programs):
            add(f"ours, PROGRAMS={programs}", function)
    heads, width = config.n_head, config.head_dim
    q = layer.random(count, heads, 1, width)
    keys, others = (layer.random(count, heads, context, width) for _ in range(2))
    add("PyTorch, contiguous", lambda: F.scaled_dot_product_attention(q, keys, others))


def prompt(check: Check, layer: Layer, tokens: int) -> None:
    """Bound by arithmetic: shares are of the matrix peak, of the causal half."""
    config = layer.config
    function = layer.attending(layer.inputs([tokens], [tokens]))
    operations = 2.0 * config.n_embd * tokens * (tokens + 1)

    def add(way: str, function: Callable[[], object]) -> None:
        with check.attempt("attention of a prompt", way=way, tokens=tokens):
            timing = check.time(function, repeats=5)
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
            with overriding(**changes):
                add(f"ours, {changes}", function)
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

"""Weights in 8 and 4 bits: products by kernel, decoding, steps beside plain ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from checking import Check, run
from models import new_model, new_runner, one_chunk, plain_runner, prompts
from speed import decode
from torch import Tensor

from gptj import GPTJConfig
from gptj.engine.runners.base import StepBatch
from gptj.engine.runners.cuda.quantized_linear import (
    ROWS,
    Blocks,
    QuantizedLinear,
    RowBlocks,
    candidates,
)
from gptj.engine.runners.cuda.quantized_matrix import Bits, QuantizedMatrix, pack
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.engine.runners.cuda.tuned_linear import seconds_of
from gptj.engine.runners.cuda.weights import BITS, Format

BATCHES = (1, 8, 64)
MAX_NUM_BATCHED_TOKENS = 1024
TIMED_ROWS = (1, 16, 64, 8, 128, 256, 32, 3, 17, 65, 300)
PYTORCH = ("fp16", "dequantizing")  # kinds that use its product
L2_BYTES = 300e6  # several times the cache: weights are read from memory
DIFFERENCE = 0.03  # of logits, in their standard deviations: weights of the plain ones are in fp16


def main(check: Check) -> None:
    kinds: tuple[Format, ...] = ("int4", "int8")
    for each in (*kinds, None):
        name = each or "fp16"
        if not check.late("decode", 12, dtype=name):
            with check.attempt("decode", dtype=name):
                decoding(check, each)
    for kind in kinds:
        with check.attempt("quantized steps", kind=kind):
            steps(check, kind)
    for bits in BITS.values():
        with check.attempt("quantized product", bits=bits):
            products(check, bits)


def config_of(check: Check, layers: int) -> GPTJConfig:
    """As in other parts; a rehearsal's widths are whole groups."""
    config = check.config(layers)
    if check.rehearsal:
        config.n_embd = 64
    return config


def products(check: Check, bits: Bits) -> None:
    """All kernels that could be chosen for the 6B's matrices, and the way without kernels."""
    config = config_of(check, 28)
    width, inner = config.n_embd, config.inner_dim
    shapes = {"qkv_fc_in": (3 * width + inner, width), "out_proj_fc_out": (width, width + inner)}
    if bits == 8:
        shapes["head"] = (config.vocab_size, width)
    chooser = QuantizedLinear(
        1 if check.rehearsal else torch.cuda.get_device_properties(0).multi_processor_count
    )
    for name, shape in shapes.items():
        weight = pack([torch.randn(shape, device=check.device.kind).mul_(0.02).half()], bits)
        copies = [weight] + [
            QuantizedMatrix(bits, weight.words.clone(), weight.scales.clone(), weight.inputs)
            for _ in range(check.pick(int(L2_BYTES // weight.nbytes), 0))
        ]
        dequantized = weight.dequantized(torch.float32)
        for rows in check.pick(TIMED_ROWS, (1, 3)):
            values = {"bits": bits, "matrix": name, "shape": list(shape), "rows": rows}
            if check.late("quantized product", 30, **values):
                continue
            x = torch.randn(rows, shape[1], device=check.device.kind).half()
            expected = x.float() @ dequantized[:1024].t()
            for kind, multiply in _ways(check, chooser, x, dequantized, bits):
                with check.attempt("quantized product", kind=kind, **values):
                    _time(check, multiply, copies, expected, kind=kind, **values)
        del weight, copies, dequantized
        check.device.empty()


def _ways(
    check: Check, chooser: QuantizedLinear, x: Tensor, dequantized: Tensor, bits: Bits
) -> Iterator[tuple[str, Callable[[QuantizedMatrix], Tensor]]]:
    """What multiplies by a matrix, with its name; the first one by the matrix in fp16."""
    half = dequantized.half()
    yield "fp16", lambda weight: F.linear(x, half)

    def multiply(weight: QuantizedMatrix, blocks: Blocks | None) -> Tensor:
        return chooser.multiply_with(blocks, x, weight, wide=len(x) % 2 == 1)

    yield "dequantizing", partial(multiply, blocks=None)
    if len(x) <= ROWS[-1]:
        rows = next(each for each in ROWS if each >= len(x))
        for blocks in [*candidates(rows, bits)][: check.pick(99, 1)]:
            if isinstance(blocks, RowBlocks):
                name = f"{blocks.columns} columns, {blocks.quads} quads, {blocks.warps} warps"
            else:
                name = f"{blocks.rows} x {blocks.columns}, {blocks.warps} warps, "
                name += f"{blocks.stages} stages, {blocks.programs} programs"
            yield name, partial(multiply, blocks=blocks)


def _time(
    check: Check,
    multiply: Callable[[QuantizedMatrix], Tensor],
    weights: Sequence[QuantizedMatrix],
    expected: Tensor,
    **values: object,
) -> None:
    found = multiply(weights[0])[:, :1024].float()
    error = float((found - expected).norm() / expected.norm())
    if check.rehearsal:
        seconds = check.time(lambda: multiply(weights[0]))["ms"] / 1e3
    else:
        ours = values["kind"] not in PYTORCH
        seconds = seconds_of(multiply, weights, in_graph=ours)
    read = weights[0].nbytes
    if values["kind"] == "fp16":
        read = 2 * weights[0].shape.numel()
    check.add(
        "quantized product",
        **values,
        ms=seconds * 1e3,
        gb_per_s=read / seconds / 1e9,
        share_of_read_bandwidth=read / seconds / check.bandwidth,
        relative_error=error,
        right=error < 1e-3,  # fp16 has 11 bits
    )


def steps(check: Check, kind: Format) -> None:
    """With two layers: a prompt, and as many rows as there are kernels for; by graphs and not."""
    config = config_of(check, 2)
    model = new_model(check, config, torch.float16)
    rows = check.pick((1, 2, 17, 64, 130), (1, 2))
    plain = plain_runner(copy.deepcopy(model), max(rows), quantization=kind)
    runner = new_runner(check, model, max(rows), quantization=kind, interpreted=True)
    length = check.pick(300, 20)
    (ids,) = prompts(config, [length])
    pages = list(range(-(-length // CudaRunner.page_size)))
    batches = [("a prompt", one_chunk(ids, pages))]
    for count in rows:
        batches.append((f"{count} rows", first_tokens(config, count)))
    none = replace(batches[0][1], logits_indices=np.empty(0, np.int32))
    check.add("quantized steps", kind=kind, step="no logits", right=not len(runner.step(none)))
    for what, batch in batches:
        found, expected = runner.step(batch), plain.step(batch)
        difference = float((found - expected).abs().max() / expected.std())
        check.add(
            "quantized steps",
            kind=kind,
            step=what,
            difference=difference,
            same=float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
            right=difference < DIFFERENCE,
        )
    runner.close()
    plain.close()


def first_tokens(config: GPTJConfig, count: int) -> StepBatch:
    """A decode step of sequences of one token, each with a page of its own."""
    (ids,) = prompts(config, [count], seed=1)
    numbers = np.arange(count + 1, dtype=np.int32)
    return StepBatch(
        np.array(ids, np.int32),
        np.zeros(count, np.int32),
        numbers,
        numbers[:-1, None],
        numbers[:-1],
    )


def decoding(check: Check, kind: Format | None) -> None:
    name = kind or "fp16"
    config = config_of(check, 28)
    batches = check.pick(BATCHES, (1, 3))
    model = new_model(check, config, torch.float16)
    check.device.reset_peak()
    pages = max(batches) * check.pick(18, 2)
    seconds, runner = check.wall(lambda: new_runner(check, model, pages, quantization=kind))
    check.add("memory", when=f"{name}: the runner is made", **check.device.memory())
    check.add("making a runner", dtype=name, seconds=seconds, weights_gb=runner.bytes_read / 1e9)
    try:
        for batch in batches:
            values = {"batch": batch, "dtype": name}
            if not check.late("decode", 5, **values):
                with check.attempt("decode", **values):
                    decode(check, runner, batch, check.pick(MAX_NUM_BATCHED_TOKENS, 16), dtype=name)
    finally:
        runner.close()


if __name__ == "__main__":
    run(main)

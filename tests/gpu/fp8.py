"""Weights, activations and cache in fp8: decoding, prefill, beams, products, steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import attention
import torch
import triton_interpreter
from checking import Check, run
from models import new_model, new_runner, one_chunk, plain_runner, prompts
from plain_operations import multiply_fp8
from quantized import L2_BYTES, first_tokens
from speed import beams, decode, prefill
from steps import decoding
from torch import Tensor

from gptj.engine.backends import KVCacheDtype
from gptj.engine.cache_size import page_bytes
from gptj.engine.runners.cuda.fp8 import Fp8Matrix, Product, parts_of, quantize
from gptj.engine.runners.cuda.fp8_linear import (
    CANDIDATES,
    Fp8Linear,
    apply_scales,
    quantize_rows,
)
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.engine.runners.cuda.tuned_linear import Blocks, seconds_of

BATCHES = (64, 1, 256, 8)
MAX_NUM_BATCHED_TOKENS = 2048
ROWS = (1, 8, 64, 256, 2048)
STEP_ROWS = (1, 2, 17, 64, 130)
APART = 0.04  # logits, relative to their norm: fp16's last bit decides some numbers
SUMS = 0.004  # products, likewise: tensor cores keep fewer bits of a sum than fp32 has
LEFT_BYTES = 10e9  # of the GPU by the cache: graphs, logits and long steps
MAX_TOKENS = 160_000  # of the cache
WITH_CACHE = "fp8, fp8 KV cache"


def main(check: Check) -> None:
    triton_interpreter.repair()
    with check.attempt("fp8 steps"):
        steps(check)
    with check.attempt("decode", dtype="fp8"):
        speed(check, "auto")
    with check.attempt("decode", dtype=WITH_CACHE):
        speed(check, "fp8")
    with check.attempt("attention to fp8"):
        attention.measure_fp8(check)
    with check.attempt("fp8 product"):
        products(check)


def speed(check: Check, kv_cache_dtype: KVCacheDtype) -> None:
    """With a cache of nearly all memory."""
    config = check.config()
    dtype = "fp8" if kv_cache_dtype == "auto" else WITH_CACHE
    model = new_model(check, config, torch.float16)
    seconds, runner = check.wall(
        lambda: new_runner(check, model, 64, quantization="fp8", kv_cache_dtype=kv_cache_dtype)
    )
    check.add("making a runner", dtype=dtype, seconds=seconds, weights_gb=runner.bytes_read / 1e9)
    check.add("memory", when=f"{dtype}: the runner is made", **check.device.memory())
    pages = check.pick(MAX_TOKENS, 512) // runner.page_size
    if not check.rehearsal:
        free = check.device.memory()["free_gb"] * 1e9 - LEFT_BYTES
        pages = min(pages, int(free / page_bytes(config, runner.cache_dtype)))
    runner.resize(pages)
    tokens = check.pick(MAX_NUM_BATCHED_TOKENS, 16)
    try:
        for batch in check.pick(BATCHES, (1, 3)):
            if not check.late("decode", 5, batch=batch, dtype=dtype):
                with check.attempt("decode", batch=batch, dtype=dtype):
                    decode(check, runner, batch, tokens, dtype=dtype)
        with check.attempt("prefill", dtype=dtype):
            prefill(check, runner, dtype=dtype)
        if not check.late("beams", 10, dtype=dtype):
            with check.attempt("beams", dtype=dtype):
                beams(check, runner, dtype=dtype)
        with check.attempt("decode step", dtype=dtype):
            decoding(check, runner, check.pick(64, 3), dtype=dtype)
    finally:
        runner.close()


def steps(check: Check) -> None:
    """With two layers: a prompt, and rows by graphs, beside plain operations in fp8."""
    config = check.config(2)
    model = new_model(check, config, torch.float16)
    rows = check.pick(STEP_ROWS, (1, 2))
    plain = plain_runner(copy.deepcopy(model), max(rows), quantization="fp8")
    whole = plain_runner(copy.deepcopy(model), max(rows))
    runner = new_runner(check, model, max(rows), quantization="fp8", interpreted=True)
    (ids,) = prompts(config, [check.pick(300, 20)])
    batches = [("a prompt", one_chunk(ids, range(-(-len(ids) // CudaRunner.page_size))))]
    batches += [(f"{count} rows", first_tokens(config, count)) for count in rows]
    for what, batch in batches:
        found, expected, unquantized = (each.step(batch) for each in (runner, plain, whole))
        difference = _apart(found, expected)
        check.add(
            "quantized steps",
            kind="fp8",
            step=what,
            difference=difference,
            from_fp16=_apart(found, unquantized),
            same=float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
            right=difference < APART,
        )
    for each in (runner, plain, whole):
        each.close()


def products(check: Check) -> None:
    """All ways to multiply, for the 6B's matrices; and what quantizing the activations takes."""
    config = check.config()
    width, inner = config.n_embd, config.inner_dim
    shapes = {"qkv_fc_in": (3 * width + inner, width), "out_proj_fc_out": (width, width + inner)}
    for name, shape in shapes.items():
        weight = quantize([torch.randn(shape, device=check.device.kind).mul_(0.02).half()])
        copies = [weight] + [
            Fp8Matrix(weight.values.clone(), weight.product_scales.clone())
            for _ in range(check.pick(int(L2_BYTES // weight.nbytes), 0))
        ]
        part = Fp8Matrix(weight.values[:1024], weight.product_scales[:1024])
        for rows in check.pick(ROWS, (1, 3)):
            values = {"matrix": name, "rows": rows}
            if check.late("fp8 product", 5, **values):
                continue
            x = torch.randn(rows, shape[1], device=check.device.kind).half()
            expected = multiply_fp8(x, part)
            wide = name == "out_proj_fc_out"
            for kind, multiply in _ways(x, wide):
                with check.attempt("fp8 product", kind=kind, **values):
                    _time(check, multiply, copies, expected, kind=kind, **values)
            if not check.rehearsal:
                seconds = seconds_of(partial(_quantize_instead, x), copies, in_graph=True)
                check.add("fp8 product", kind="quantizing x", ms=seconds * 1e3, **values)


def _quantize_instead(x: Tensor, weight: Fp8Matrix) -> Tensor:
    values, _ = quantize_rows(x)
    return values


def _ways(x: Tensor, wide: bool) -> Iterator[tuple[str, Callable[[Fp8Matrix], Product]]]:
    linear = Fp8Linear()
    for blocks in (None, *(CANDIDATES if len(x) == 1 else ())):
        name = "cuBLAS" if blocks is None else str(blocks)
        yield name, partial(_multiply, linear, blocks, x, wide)
    yield "cuBLAS, fast sums", partial(_with_fast_sums, linear, x, wide)


def _multiply(
    linear: Fp8Linear, blocks: Blocks | None, x: Tensor, wide: bool, weight: Fp8Matrix
) -> Product:
    return linear.multiply_with(blocks, x, weight, wide=wide)


def _with_fast_sums(linear: Fp8Linear, x: Tensor, wide: bool, weight: Fp8Matrix) -> Product:
    """Without moving partial sums of a few bits into fp32."""
    plain = torch._scaled_mm

    def fast(*arguments: Any, **names: Any) -> Tensor:
        return plain(*arguments, **{**names, "use_fast_accum": True})

    with mock.patch.object(torch, "_scaled_mm", fast):
        return linear.multiply_with(None, x, weight, wide=wide)


def _time(
    check: Check,
    multiply: Callable[[Fp8Matrix], Product],
    weights: Sequence[Fp8Matrix],
    expected: Tensor,
    **values: object,
) -> None:
    found = apply_scales(multiply(weights[0]))[:, : expected.shape[1]].float()
    error = _apart(found, expected)
    if check.rehearsal:
        seconds = check.time(lambda: multiply(weights[0]))["ms"] / 1e3
    else:
        seconds = seconds_of(lambda weight: parts_of(multiply(weight))[0], weights, in_graph=True)
    check.add(
        "fp8 product",
        **values,
        ms=seconds * 1e3,
        gb_per_s=weights[0].nbytes / seconds / 1e9,
        share_of_read_bandwidth=weights[0].nbytes / seconds / check.bandwidth,
        tflops=2.0 * len(found) * weights[0].shape.numel() / seconds / 1e12,
        relative_error=error,
        right=error < SUMS,
    )


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


if __name__ == "__main__":
    run(main)

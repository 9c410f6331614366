"""Matrix products of the model's shapes, in fp16, for 1 to 2,048 rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from checking import Check
from torch import Tensor

from gptj.engine.runners.cuda.tuned_linear import CANDIDATES, Blocks, multiply_row

ROWS = (1, 4, 16, 64, 256, 1024, 2048, 2, 8, 32, 128, 512)


def measure(check: Check) -> None:
    config = check.config()
    width, inner = config.n_embd, config.inner_dim
    shapes = {
        "qkv_fc_in": (3 * width + inner, width),
        "out_proj_fc_out": (width, width + inner),
        "head": (config.vocab_size, width),
    }
    weights = {
        name: torch.randn(shape, device=check.device.kind).mul_(0.02).half()
        for name, shape in shapes.items()
    }
    for rows in check.pick(ROWS, (1, 16)):
        for name, weight in weights.items():
            values = {"matrix": name, "shape": list(weight.shape), "rows": rows}
            if check.late("product", 3, **values):
                continue
            x = torch.randn(rows, weight.shape[1], device=check.device.kind).half()
            for kind, ready in products(x, weight, check.pick(CANDIDATES, CANDIDATES[2:3])):
                with check.attempt("product", kind=kind, **values):
                    function, stored = ready()
                    _add(check, function, stored, x, weight, kind=kind, **values)


def products(
    x: Tensor, weight: Tensor, candidates: Sequence[Blocks]
) -> Iterator[tuple[str, Callable[[], tuple[Callable[[], Tensor], Tensor]]]]:
    """Kinds of products; each makes a function and the weight as it is stored."""
    yield "fp16", lambda: (lambda: F.linear(x, weight), weight)
    if len(x) == 1:
        for blocks in candidates:
            yield (
                f"fp16, our kernel {blocks.columns} x {blocks.inputs}, {blocks.warps} warps",
                partial(_ours, x, weight, blocks),
            )


def _ours(x: Tensor, weight: Tensor, blocks: Blocks) -> tuple[Callable[[], Tensor], Tensor]:
    return partial(multiply_row, x, weight, blocks, wide=False), weight


def _add(
    check: Check,
    function: Callable[[], Tensor],
    stored: Tensor,
    x: Tensor,
    weight: Tensor,
    **values: object,
) -> None:
    expected = x.float() @ weight[:1024].float().t()
    found = function()[:, :1024].float()
    error = float((found - expected).norm() / expected.norm())
    timing = check.time(function, repeats=5, calls=10)
    seconds = timing["ms"] / 1e3
    operations = 2.0 * x.shape[0] * weight.numel()
    check.add(
        "product",
        **values,
        tflops=operations / seconds / 1e12,
        gb_per_s=stored.nbytes / seconds / 1e9,
        share_of_read_bandwidth=stored.nbytes / seconds / check.bandwidth,
        share_of_matrix_peak=operations / seconds / check.matrix_peak,
        relative_error=error,
        right=error < 1e-3,  # 11 bits
        **timing,
    )

"""The GPU's products with weights in 8 and 4 bits, against their dequantized weights.

Without a GPU the kernels run in Triton's interpreter, which cannot multiply or round in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from test_cuda_kernels import ERRORS, Broken
from torch import Tensor

from gptj.engine.runners.cpu import packing
from gptj.engine.runners.cuda import quantized_kernels as kernels
from gptj.engine.runners.cuda import quantized_linear
from gptj.engine.runners.cuda.quantized_linear import (
    ROW_CANDIDATES,
    ROWS,
    ROWS_CANDIDATES,
    QuantizedLinear,
    RowBlocks,
    RowsBlocks,
    candidates,
    multiply_row,
    multiply_rows,
    splits_for,
)
from gptj.engine.runners.cuda.quantized_matrix import Bits, QuantizedMatrix, pack
from gptj.layers import int4

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# Of a product rounded once, relative to its largest number: 11 and 8 bits.
TOLERANCES = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
SUMS = 1e-4  # in fp32, in another order, and truncated by tensor cores
SHAPES = [(37, 64), (70, 320), (67, 704)]

both = pytest.mark.parametrize("bits", [8, 4], ids=["int8", "int4"])
dtypes = pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(
            torch.bfloat16, marks=pytest.mark.skipif(not ON_GPU, reason="not interpreted")
        ),
    ],
    ids=["fp16", "bf16"],
)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    difference = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert float(difference) < tolerance


def product(x_TC: Tensor, weight: QuantizedMatrix) -> Tensor:
    """In fp64."""
    return x_TC.double() @ weight.dequantized(torch.float32).double().T


@both
@pytest.mark.parametrize(("columns", "inputs"), [(5, 64), (600, 320), (3, 704)])
def test_packed_weights_are_those_of_the_cpu(bits: Bits, columns: int, inputs: int) -> None:
    """Of several matrices, one after another or beside each other, in any number of pieces."""
    torch.manual_seed(0)
    parts = [random(columns, inputs), random(columns, 128)]
    whole = torch.cat(parts, dim=1)
    found = pack(parts, bits, beside=True)
    assert found.shape == whole.shape
    if bits == 8:
        numbers, scales = packing.quantized(whole)
        expected = (numbers.float() - 128) * scales[:, None]
    else:
        stored = [int4.quantize(part) for part in parts]
        expected = torch.cat([each.dequantized(torch.float32) for each in stored], dim=1)
        assert torch.equal(pack(stored, 4, beside=True).words, found.words)
    assert torch.equal(found.dequantized(torch.float32), expected)
    below = pack([whole, whole[:2]], bits)
    assert torch.equal(below.dequantized(torch.float32), torch.cat((expected, expected[:2])))


def test_int8_packs_any_number_of_inputs() -> None:
    weight = random(5, 100)
    numbers, scales = packing.quantized(weight)
    found = pack([weight], 8)
    expected = (numbers.float() - 128) * scales[:, None]
    assert torch.equal(found.dequantized(torch.float32), expected)


@pytest.mark.parametrize(("bits", "size"), [(8, 1 + 4 / 4096), (4, 0.5 + 2 / 64)])
def test_packed_weights_take_the_documented_memory(bits: Bits, size: float) -> None:
    assert pack([torch.zeros(8, 4096)], bits).nbytes == 8 * 4096 * size


@pytest.mark.slow
@both
@dtypes
@pytest.mark.parametrize(("columns", "inputs"), SHAPES)
def test_one_row(bits: Bits, dtype: torch.dtype, columns: int, inputs: int) -> None:
    """With blocks that end within and after the columns and inputs."""
    torch.manual_seed(0)
    weight = pack([random(columns, inputs)], bits)
    x_1C = random(1, inputs, dtype=dtype)
    expected = product(x_1C, weight)
    for blocks in (RowBlocks(4, 8, 1), RowBlocks(16, 64, 4)):
        near(multiply_row(x_1C, weight, blocks, wide=True), expected, SUMS)
        near(multiply_row(x_1C, weight, blocks, wide=False), expected, TOLERANCES[dtype])


@pytest.mark.slow
@both
@dtypes
@pytest.mark.parametrize(
    ("rows", "columns", "inputs", "splits"),
    [
        (2, *SHAPES[0], 1),
        (3, *SHAPES[1], 2),
        (16, *SHAPES[1], 1),
        (17, *SHAPES[2], 4),
        (64, *SHAPES[0], 1),
        (65, *SHAPES[1], 1),
        (300, *SHAPES[0], 1),
    ],
)
def test_some_rows(
    bits: Bits, dtype: torch.dtype, rows: int, columns: int, inputs: int, splits: int
) -> None:
    """With the inputs in any number of splits, also where the last one has fewer blocks."""
    torch.manual_seed(0)
    weight = pack([random(columns, inputs)], bits)
    x_TC = random(rows, inputs, dtype=dtype)
    expected = product(x_TC, weight)
    blocks = RowsBlocks(64 if rows > 32 else 16, 64, 4, 3)
    near(multiply_rows(x_TC, weight, blocks, splits, wide=True), expected, SUMS)
    near(multiply_rows(x_TC, weight, blocks, splits, wide=False), expected, TOLERANCES[dtype])


@pytest.mark.slow
@both
@dtypes
@pytest.mark.parametrize("rows", ROWS)
def test_every_candidate(bits: Bits, dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    weight = pack([random(131, 256)], bits)
    x_TC = random(rows, 256, dtype=dtype)
    expected = product(x_TC, weight)
    chooser = QuantizedLinear(processors=1)
    for blocks in candidates(rows, bits):
        near(chooser.multiply_with(blocks, x_TC, weight, wide=True), expected, SUMS)


@both
@dtypes
def test_no_rows_have_no_products(bits: Bits, dtype: torch.dtype) -> None:
    """Of a step whose chunks do not end their prompts; with a kernel chosen for one row."""
    weight = pack([random(7, 128)], bits)
    chooser = QuantizedLinear(processors=1)
    chooser._chosen[bits, weight.shape, 1] = ROW_CANDIDATES[bits][0]
    for wide in (False, True):
        none = chooser.multiply(random(3, 128, dtype=dtype)[:0], weight, wide=wide)
        assert none.shape == (0, 7)
        assert none.dtype == (torch.float32 if wide else dtype)


@both
def test_int8_of_odd_widths(bits: Bits) -> None:
    """Inputs that fill no block; int4 has whole groups."""
    torch.manual_seed(0)
    inputs = 100 if bits == 8 else 192
    weight = pack([random(7, inputs)], bits)
    for rows in (1, 5):
        x_TC = random(rows, inputs, dtype=torch.float16)
        expected = product(x_TC, weight)
        if rows == 1:
            ours = multiply_row(x_TC, weight, RowBlocks(4, 16, 1), wide=True)
        else:
            ours = multiply_rows(x_TC, weight, RowsBlocks(16, 64, 4, 2), 1, wide=True)
        near(ours, expected, SUMS)


@pytest.mark.slow
@both
@dtypes
def test_weights_are_dequantized_for_pytorch(bits: Bits, dtype: torch.dtype) -> None:
    """The same scratch memory for all; each weight is rounded once."""
    torch.manual_seed(0)
    chooser = QuantizedLinear(processors=1)
    for columns, inputs, rows in ((5, 320, 300), (9, 192, 1), (7, 64, 2)):
        weight = pack([random(columns, inputs)], bits)
        assert torch.equal(chooser._dequantized(weight, dtype), weight.dequantized(dtype))
        x_TC = random(rows, inputs, dtype=dtype)
        expected = x_TC.double() @ weight.dequantized(dtype).double().T
        near(chooser.multiply(x_TC, weight, wide=True), expected, SUMS)
        near(chooser.multiply(x_TC, weight), expected, TOLERANCES[dtype])


@both
def test_zeros_and_extreme_weights_are_exact(bits: Bits) -> None:
    """A row of zeros, whose scale is 0, and the smallest and largest numbers of the format."""
    weight = torch.zeros(3, 128)
    weight[1, ::2], weight[1, 1::2] = -8.0, 7.0
    weight[2, 5] = -1.0
    packed = pack([weight.to(DEVICE)], bits)
    x_TC = torch.eye(128, dtype=torch.float16, device=DEVICE)
    ours = multiply_rows(x_TC, packed, RowsBlocks(64, 64, 4, 2), 1, wide=True)
    torch.testing.assert_close(ours.cpu().T, weight, rtol=0, atol=0.04 if bits == 8 else 0)
    single = multiply_row(x_TC[5:6], packed, RowBlocks(4, 8, 1), wide=True)
    torch.testing.assert_close(single, ours[5:6], rtol=1e-5, atol=1e-6)


@both
def test_sums_may_exceed_fp16(bits: Bits) -> None:
    weight = pack([torch.full((2, 256), 7.0, device=DEVICE)], bits)
    x_TC = torch.full((2, 256), 6e4, dtype=torch.float16, device=DEVICE)
    expected = product(x_TC, weight)
    near(multiply_row(x_TC[:1], weight, RowBlocks(4, 16, 1), wide=True), expected[:1], SUMS)
    blocks = RowsBlocks(16, 64, 4, 2)
    near(multiply_rows(x_TC, weight, blocks, 1, wide=True), expected, SUMS)


def test_splits_occupy_all_multiprocessors() -> None:
    """Of an H100 with the 6B's matrices, and never more than a small matrix has blocks."""

    def splits(rows: int, columns: int, inputs: int, blocks: RowsBlocks) -> int:
        words = torch.empty(columns, inputs // 128, 16, dtype=torch.int32, device="meta")
        scales = torch.empty(columns, inputs // 64, dtype=torch.bfloat16, device="meta")
        return splits_for(rows, QuantizedMatrix(4, words, scales, inputs), blocks, 132)

    small, large = RowsBlocks(16, 64, 4, 4, programs=3), RowsBlocks(64, 128, 8, 3, programs=3)
    assert splits(16, 28672, 4096, small) == 1
    assert splits(16, 4096, 20480, small) == 8
    assert splits(64, 28672, 4096, large) == 2
    assert splits(16, 64, 640, small) == 1


@both
def test_the_fastest_kernel_is_chosen_for_each_number_of_rows(
    bits: Bits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the GEMV kernel, the last GEMM for up to 32 rows, and PyTorch's product for more."""
    torch.manual_seed(0)
    weight = pack([random(9, 128)], bits)
    fastest = (ROW_CANDIDATES[bits][1], ROWS_CANDIDATES[16][-1], ROWS_CANDIDATES[32][-1])
    tried = []
    chooser = QuantizedLinear(processors=1)

    def seconds(
        multiply: Callable[[QuantizedMatrix], Tensor],
        weights: Sequence[QuantizedMatrix],
        *,
        in_graph: bool,
    ) -> float:
        (blocks,) = multiply.__defaults__  # type: ignore[attr-defined]
        tried.append(blocks)
        return 1.0 if blocks in fastest else 2.0

    monkeypatch.setattr(quantized_linear, "seconds_of", seconds)
    chooser.tune([weight], torch.float16, wide=True)
    assert set(tried) >= {None, *fastest}
    used = []
    plain = chooser.multiply_with
    monkeypatch.setattr(
        chooser,
        "multiply_with",
        lambda blocks, *others, **names: used.append(blocks) or plain(blocks, *others, **names),
    )
    for rows in (1, 2, 16, 17, 33, 300):
        x_TC = random(rows, 128, dtype=torch.float16)
        near(chooser.multiply(x_TC, weight, wide=True), product(x_TC, weight), 1e-3)
    assert used == [fastest[0], fastest[1], fastest[1], fastest[2], None, None]


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", ["multiply_row", "multiply_rows"])
def test_a_kernel_that_does_not_compile_is_not_chosen(
    name: str, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def seconds(
        multiply: Callable[[QuantizedMatrix], Tensor],
        weights: Sequence[QuantizedMatrix],
        *,
        in_graph: bool,
    ) -> float:
        multiply(weights[0])
        return 1.0

    weight = pack([random(7, 128)], 4)
    monkeypatch.setattr(quantized_linear, "seconds_of", seconds)
    monkeypatch.setattr(quantized_linear, "ROWS", (1, 16))
    monkeypatch.setattr(kernels, name, Broken(error))
    chooser = QuantizedLinear(processors=1)
    chooser.tune([weight], torch.float16, wide=True)
    broken = ROW_CANDIDATES[4] if name == "multiply_row" else ROWS_CANDIDATES[16]
    assert caplog.text.count("is not available") == len(broken)
    x_TC = random(1 if name == "multiply_row" else 2, 128, dtype=torch.float16)
    near(chooser.multiply(x_TC, weight, wide=True), product(x_TC, weight), 1e-3)

"""The GPU's products in fp8, against the same numbers multiplied in fp32.

Without a GPU the kernels run in Triton's interpreter, and PyTorch's product on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
import triton_interpreter
from plain_operations import multiply_fp8
from test_cuda_kernels import ERRORS, Broken
from test_cuda_quantized import dtypes, random
from test_cuda_quantized_runner import (
    CONFIG,
    IDS,
    PAGES,
    plain_operations,
    prompt,
    random_adapter,
    random_model,
)
from test_cuda_runner import ElsewhereModel, decode_batch
from torch import Tensor

from gptj import GPTJConfig
from gptj.engine import backends as choice
from gptj.engine.runners.cpu.library import UnsupportedError
from gptj.engine.runners.cuda import fp8_linear, kernels
from gptj.engine.runners.cuda.fp8 import (
    FP8,
    Fp8Matrix,
    UnscaledProduct,
    fp8_bytes,
    quantize,
    quantized_rows,
    scales_for,
)
from gptj.engine.runners.cuda.fp8_linear import (
    CANDIDATES,
    Fp8Linear,
    apply_scales,
    quantize_rows,
)
from gptj.engine.runners.cuda.launch import TritonOperations
from gptj.engine.runners.cuda.operations import Operations
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.engine.runners.cuda.support import operations_for
from gptj.engine.runners.cuda.tuned_linear import Blocks, multiply_row
from gptj.engine.runners.cuda.weights import freed_by_packing, take
from gptj.engine.runners.lora import NONE, LoRALimits, LoRAWeights
from gptj.layers import int4

triton_interpreter.repair()
ON_GPU = torch.cuda.is_available()
if ON_GPU and torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("the GPU has no fp8", allow_module_level=True)
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# Of a product, relative to its largest number: rounded before its scales and after them to 11 or 8
# bits; on tensor cores summed with less than fp32's.
TOLERANCES = {torch.float16: 1.5e-3, torch.bfloat16: 8e-3, torch.float32: 1e-3}

# Of logits: fp16's last bit decides between two neighbours in e4m3.
FLIPS = 0.04


def near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    difference = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert float(difference) < TOLERANCES[ours.dtype]


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the interpreter
def test_scales_are_the_least_powers_of_2_that_bring_numbers_into_range() -> None:
    numbers = torch.tensor(
        [0.0, 2.0**-120, 1e-6, 447, 448, 448.01, 896, 1e30, torch.inf, torch.nan]
    )
    expected = [2.0**-108, 2.0**-108, 2.0**-28, 1, 1, 2, 2, 2.0**91, torch.nan, torch.nan]
    torch.testing.assert_close(
        scales_for(numbers), torch.tensor(expected), rtol=0, atol=0, equal_nan=True
    )
    ours = torch.cat([quantize_rows(each[None, None].to(DEVICE))[1] for each in numbers[:-1]])
    assert torch.equal(ours.nan_to_num(), scales_for(numbers[:-1]).nan_to_num().to(DEVICE))


def test_weights_are_the_nearest_numbers_with_a_scale_for_each_column() -> None:
    weight = random(700, 48) * torch.logspace(-6, 3, 700, device=DEVICE)[:, None]
    weight[3] = 0
    found = quantize([weight[:650], weight[650:]])
    assert found.values.dtype == FP8
    assert found.shape == weight.shape
    assert found.nbytes == fp8_bytes(700, 48)
    assert torch.equal(found.scales, scales_for(weight.abs().amax(1)))
    # e4m3 has 4 significant bits: half a unit of the last one is 1/16 of the number's power of 2.
    error = (found.dequantized(torch.float32) - weight).abs()
    least = found.scales[:, None] * 2**-10  # half of the smallest number
    assert bool((error <= torch.maximum(weight.abs() / 16, least)).all())
    assert bool((found.dequantized(torch.float32)[3] == 0).all())


def test_weights_beside_each_other_share_scales() -> None:
    first, second = random(5, 32), 100 * random(5, 16)
    found = quantize([first, second], beside=True)
    whole = quantize([torch.cat([first, second], dim=1)])
    assert torch.equal(found.values.float(), whole.values.float())
    assert torch.equal(found.scales, whole.scales)


@dtypes
@pytest.mark.parametrize("inputs", [48, 64, 1000])
def test_rows_are_quantized_each_by_itself(dtype: torch.dtype, inputs: int) -> None:
    x = (
        random(7, inputs)
        * torch.tensor([1e-6, 1e-3, 1.0, 10.0, 100.0, 0.0, 1.0]).to(DEVICE)[:, None]
    )
    x = x.to(dtype)
    values, scales = quantize_rows(x)
    expected, expected_scales = quantized_rows(x.float())
    assert torch.equal(scales, expected_scales)
    assert torch.equal(values.float(), expected.float())
    one, scale = quantize_rows(x[4:5])
    assert torch.equal(one.float(), values[4:5].float())
    assert torch.equal(scale, scales[4:5])


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the interpreter
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nan_and_infinity_make_a_whole_row_nan(number: float) -> None:
    """Else a broken activation would become a text that looks right."""
    x = random(2, 64, dtype=torch.float16)
    x[1, 5] = number
    product = apply_scales(Fp8Linear().multiply(x, quantize([random(16, 64)])))
    assert not bool(product[0].isnan().any())
    assert bool(product[1].isnan().all())


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_products_equal_those_in_fp32(dtype: torch.dtype, wide: bool, rows: int) -> None:
    weight = quantize([random(3072, 4096) * torch.logspace(-3, 1, 3072, device=DEVICE)[:, None]])
    x = (random(rows, 4096) * torch.logspace(-3, 1, rows, device=DEVICE)[:, None]).to(dtype)
    ours = apply_scales(Fp8Linear().multiply(x, weight, wide=wide))
    assert ours.dtype == (torch.float32 if wide else dtype)
    theirs = multiply_fp8(x, weight)
    for row in range(rows):
        near(ours[row], theirs[row])


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("blocks", CANDIDATES, ids=str)
def test_the_kernel_for_one_row_equals_the_product_in_fp32(
    dtype: torch.dtype, blocks: Blocks
) -> None:
    for columns, inputs in ((37, 64), (16, 4100)):
        weight, x = quantize([random(columns, inputs)]), random(1, inputs, dtype=dtype)
        values, scales = quantize_rows(x)
        for wide in (False, True):
            ours = multiply_row(
                values, weight.values, blocks, wide=wide, dtype=dtype, factor=weight.factor
            )
            ours = apply_scales(UnscaledProduct(ours, scales, weight.product_scales))
            near(ours, multiply_fp8(x, weight))


def test_the_largest_sums_fit_into_fp16() -> None:
    """Of all numbers, if they are the largest: before scales are applied, and after."""
    for inputs in (64, 4096, 20480):
        weight = quantize([torch.full((16, inputs), 1.75, device=DEVICE)])
        x = torch.full((2, inputs), 1.75, dtype=torch.float16, device=DEVICE)
        near(
            apply_scales(Fp8Linear().multiply(x, weight)),
            torch.full((2, 16), 1.75**2 * inputs, device=DEVICE),
        )


def test_sums_may_exceed_fp16_if_wide() -> None:
    weight = quantize([torch.full((16, 4096), 192.0, device=DEVICE)])
    x = torch.full((2, 4096), 192.0, dtype=torch.float16, device=DEVICE)
    expected = torch.full((2, 16), 192.0 * 192 * 4096, device=DEVICE)
    near(apply_scales(Fp8Linear().multiply(x, weight, wide=True)), expected)


@pytest.mark.parametrize("fastest", [None, CANDIDATES[2]], ids=str)
def test_the_fastest_way_is_chosen_for_one_row(
    fastest: Blocks | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = quantize([random(16, 64)])

    def seconds(
        multiply: Callable[[Fp8Matrix], Tensor], weights: Sequence[Fp8Matrix], *, in_graph: bool
    ) -> float:
        """In a graph: the host may take longer to launch a product than the GPU to compute it."""
        assert in_graph
        assert len(weights) == 2
        (blocks,) = multiply.__defaults__  # type: ignore[attr-defined]
        return 1.0 if blocks == fastest else 2.0

    monkeypatch.setattr(fp8_linear, "seconds_of", seconds)
    chooser = Fp8Linear()
    chooser.tune([weight, weight], torch.float16)
    asked: list[Blocks | None] = []
    monkeypatch.setattr(
        chooser, "multiply_with", lambda blocks, x, weight, *, wide: asked.append(blocks)
    )
    for rows in (1, 2, 300):
        chooser.multiply(random(rows, 64, dtype=torch.float16), weight)
    assert asked == [fastest, None, None]


@pytest.mark.slow
def test_steps_compute_in_fp8(device: torch.device) -> None:
    """A prompt, and tokens after it, as plain operations do; near the weights' own logits."""
    model = random_model(device)
    expected = copy.deepcopy(model).cpu().float()(torch.tensor([IDS])).logits[0]
    plain = CudaRunner(copy.deepcopy(model).cpu(), 4, plain_operations(), quantization="fp8")
    operations: Operations
    if device.type == "cuda":
        operations = operations_for(model, None, "fp8")
    else:
        operations = TritonOperations(CONFIG, torch.float16, processors=1)
    runner = CudaRunner(model, 4, operations, quantization="fp8", release=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == 0
    batches = [prompt(IDS[:20])]
    batches += [decode_batch(IDS[at : at + 1], [at], PAGES) for at in range(20, 24)]
    for batch, logits in zip(batches, (expected[:20], *expected[20:24]), strict=True):
        ours, theirs = runner.step(batch).cpu(), plain.step(batch)
        assert apart(ours, theirs) < FLIPS
        assert 0.01 < apart(ours, logits) < 0.1  # fp16 is closer
    runner.close()
    plain.close()


def test_the_head_and_the_embedding_keep_their_dtype() -> None:
    model = random_model()
    before = sum(
        getattr(parent, name).weight.nbytes
        for block in model.transformer.h
        for parent, name in int4.block_linears(block)
    )
    freed = freed_by_packing(model, "fp8")
    weights = take(model, release=False, quantization="fp8")
    after = 0
    for layer in weights.layers:
        assert isinstance(layer.qkv_fc_in, Fp8Matrix)
        assert isinstance(layer.out_proj_fc_out, Fp8Matrix)
        after += layer.qkv_fc_in.nbytes + layer.out_proj_fc_out.nbytes
    assert freed == before - after
    assert isinstance(weights.head_VD, Tensor)
    assert weights.head_VD.dtype == weights.embedding_VD.dtype == torch.float16


@pytest.mark.slow
def test_adapters_are_added_to_products_in_fp8(device: torch.device) -> None:
    """The adapters themselves are not in fp8."""
    model = random_model(device)
    layers = random_adapter()
    limits = LoRALimits(max_loras=2, max_lora_rank=4)
    plain = CudaRunner(
        copy.deepcopy(model).cpu(), 4, plain_operations(), quantization="fp8", lora=limits
    )
    operations = TritonOperations(CONFIG, torch.float16, processors=1)
    runner = CudaRunner(model, 4, operations, quantization="fp8", lora=limits)
    for each in (plain, runner):
        each.load_adapter(1, LoRAWeights(3, layers, b""))
    without = plain.step(prompt(IDS[:9], adapter=NONE))
    expected = plain.step(prompt(IDS[:9], adapter=1))
    assert apart(without, expected) > 0.2
    ours = runner.step(prompt(IDS[:9], adapter=1)).cpu()
    assert apart(ours, expected) < FLIPS
    plain.close()
    runner.close()


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_int4_weights_are_not_quantized_again(quantization: choice.Quantization) -> None:
    model = ElsewhereModel(CONFIG)
    int4.quantize_blocks(model.transformer.h)
    with pytest.raises(ValueError, match=f"{quantization} needs the original weights"):
        choice.best_runner(model, 64, quantization=quantization)


def test_a_cpu_has_no_fp8() -> None:
    with pytest.raises(
        UnsupportedError, match=r"quantization=fp8 is not available: fp8 needs a GPU.*int8"
    ):
        choice.best_runner(random_model(), 64, quantization="fp8")


def test_widths_that_tensor_cores_cannot_multiply_are_refused() -> None:
    config = GPTJConfig(**{**CONFIG.to_dict(), "n_inner": 100})
    with pytest.raises(UnsupportedError, match="n_inner=100 to be multiples of 16"):
        operations_for(ElsewhereModel(config).half(), quantization="fp8")


def test_gpus_without_fp8_are_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    ampere = SimpleNamespace(name="NVIDIA A100", major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: ampere)
    with pytest.raises(UnsupportedError, match=r"A100 has .* 8\.0, but fp8 needs 8\.9.*int8"):
        operations_for(ElsewhereModel(CONFIG).half(), quantization="fp8")


@pytest.mark.parametrize("error", ERRORS, ids=lambda each: type(each).__name__)
def test_a_kernel_that_fails_is_not_chosen(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "multiply_row", Broken(error))
    times: list[float] = []

    def seconds(
        multiply: Callable[[Fp8Matrix], Tensor], weights: Sequence[Fp8Matrix], *, in_graph: bool
    ) -> float:
        multiply(weights[0])
        times.append(1.0)
        return 1.0

    monkeypatch.setattr(fp8_linear, "seconds_of", seconds)
    chooser = Fp8Linear()
    chooser.tune([quantize([random(16, 64)])], torch.float16)
    assert len(times) == 1  # PyTorch's
    assert not chooser._chosen

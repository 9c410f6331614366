"""The GPU's runner with weights in 8 and 4 bits, against a model of the dequantized weights.

Without a GPU it runs on the CPU, with plain operations or interpreted kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_caller import tokens
from plain_operations import PlainOperations
from test_cuda_kernels import ERRORS, Broken
from test_cuda_runner import ElsewhereModel, decode_batch
from torch import Tensor

from gptj import GPTJConfig, GPTJForCausalLM
from gptj.adapters.config import TARGET_MODULES
from gptj.engine import backends as choice
from gptj.engine.adapter_weights import shape_of
from gptj.engine.runners.base import StepBatch
from gptj.engine.runners.cpu import packing
from gptj.engine.runners.cpu.library import UnsupportedError
from gptj.engine.runners.cuda import quantized_kernels, quantized_linear
from gptj.engine.runners.cuda.fp8 import Fp8Matrix
from gptj.engine.runners.cuda.launch import TritonOperations
from gptj.engine.runners.cuda.operations import Operations
from gptj.engine.runners.cuda.quantized_linear import Blocks
from gptj.engine.runners.cuda.quantized_matrix import QuantizedMatrix
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.engine.runners.cuda.support import operations_for, try_out
from gptj.engine.runners.cuda.weights import BITS, Format, freed_by_packing, take
from gptj.engine.runners.lora import NONE, LoRALimits, LoRAPair, LoRAWeights
from gptj.layers import int4

CONFIG = GPTJConfig(
    vocab_size=97, n_positions=48, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_inner=192
)
PAGES = [[2, 0, 1]]
IDS = tokens(40)
# Largest difference of logits in their standard deviations: fp16's 11 bits.
TOLERANCE = 0.01

both = pytest.mark.parametrize("quantization", ["int8", "int4"])


def random_model(device: torch.device | str = "cpu") -> GPTJForCausalLM:
    """In fp16."""
    torch.manual_seed(0)
    model = GPTJForCausalLM(CONFIG).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.to(device, torch.float16).requires_grad_(False)


def dequantized(model: GPTJForCausalLM, quantization: Format) -> GPTJForCausalLM:
    """In fp32, on the CPU: layers in 8 bits, with a scale for each output, or in 4; heads in 8."""
    plain = copy.deepcopy(model).cpu().float()
    for block in plain.transformer.h:
        attn, mlp = block.attn, block.mlp
        if quantization == "int8":
            for linear in (attn.q_proj, attn.k_proj, attn.v_proj, mlp.fc_in):
                linear.weight.data = in_8_bits(linear.weight)
            outputs = (attn.out_proj.weight, mlp.fc_out.weight)  # which share scales
            parts = in_8_bits(torch.cat(outputs, dim=1)).split([CONFIG.n_embd, 192], dim=1)
            attn.out_proj.weight.data, mlp.fc_out.weight.data = parts
        else:
            for parent, name in int4.block_linears(block):
                weight = getattr(parent, name).weight
                weight.data = int4.quantize(weight).dequantized(torch.float32)
    plain.lm_head.weight.data = in_8_bits(plain.lm_head.weight)
    return plain


def in_8_bits(weight: Tensor) -> Tensor:
    numbers, scales = packing.quantized(weight)
    return (numbers.float() - 128) * scales[:, None]


def plain_operations() -> PlainOperations:
    return PlainOperations(torch.float16, CONFIG.layer_norm_epsilon)


def operations(device: torch.device, quantization: Format) -> Operations:
    if device.type == "cuda":
        return operations_for(random_model(device), LoRALimits(), quantization)
    return plain_operations()


def random_adapter() -> tuple[dict[str, LoRAPair], ...]:
    """Of rank 3, on all modules of each layer."""
    shapes = {module: shape_of(CONFIG, module) for module in TARGET_MODULES}
    return tuple(
        {
            module: LoRAPair(0.1 * torch.randn(3, inputs), 0.1 * torch.randn(outputs, 3))
            for module, (outputs, inputs) in shapes.items()
        }
        for _ in range(CONFIG.n_layer)
    )


def prompt(ids: list[int], adapter: int | None = None) -> StepBatch:
    """A step of one sequence, with logits after each token."""
    count = len(ids)
    numbers = np.arange(count, dtype=np.int32)
    starts, pages = np.array([0, count], np.int32), np.array(PAGES, np.int32)
    adapters = None if adapter is None else np.array([adapter], np.int32)
    return StepBatch(np.array(ids, np.int32), numbers, starts, pages, numbers, adapters)


def near(logits: Tensor, expected: Tensor) -> None:
    difference = (logits.cpu() - expected).abs().max() / expected.std()
    assert float(difference) < TOLERANCE


@both
def test_logits_are_those_of_the_dequantized_weights(
    device: torch.device, quantization: Format
) -> None:
    """Of a prompt, and of the tokens after it, one by one."""
    model = random_model(device)
    expected = dequantized(model, quantization)(torch.tensor([IDS])).logits[0]
    runner = CudaRunner(
        model, 4, operations(device, quantization), quantization=quantization, release=True
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == 0
    near(runner.step(prompt(IDS[:30])), expected[:30])
    for position in range(30, 40):
        logits = runner.step(decode_batch(IDS[position : position + 1], [position], PAGES))
        near(logits, expected[position : position + 1])
    runner.close()


@pytest.mark.slow
@both
def test_kernels_compute_a_step_of_one_row_and_of_some(
    quantization: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all products chosen as if the kernels were the fastest."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked: list[Blocks | None] = []

    def seconds(
        multiply: Callable[[QuantizedMatrix], Tensor],
        weights: Sequence[QuantizedMatrix],
        *,
        in_graph: bool,
    ) -> float:
        (blocks,) = multiply.__defaults__  # type: ignore[attr-defined]
        return 2.0 if blocks is None else 1.0

    monkeypatch.setattr(quantized_linear, "seconds_of", seconds)
    model = random_model(device)
    expected = dequantized(model, quantization)(torch.tensor([IDS])).logits[0]
    kernels = TritonOperations(CONFIG, torch.float16, processors=1)
    runner = CudaRunner(model, 4, kernels, quantization=quantization)
    kernels.prepare(runner._weights)
    plain = kernels._quantized_linear.multiply_with
    monkeypatch.setattr(
        kernels._quantized_linear,
        "multiply_with",
        lambda blocks, *others, **names: asked.append(blocks) or plain(blocks, *others, **names),
    )
    none = replace(prompt(IDS[:20]), logits_indices=np.empty(0, np.int32))
    assert runner.step(none).shape == (0, CONFIG.vocab_size)  # of a prompt that goes on
    asked.clear()
    near(runner.step(prompt(IDS[:20])), expected[:20])
    if device.type == "cpu":  # without graphs
        assert len(asked) == 2 * CONFIG.n_layer + 1 and None not in asked
    near(runner.step(decode_batch(IDS[20:21], [20], PAGES)), expected[20:21])
    assert None not in asked
    runner.close()


@both
def test_packing_frees_the_difference_of_the_weights_sizes(quantization: Format) -> None:
    model = random_model()
    weights = [model.lm_head.weight]
    for block in model.transformer.h:
        weights += [getattr(parent, name).weight for parent, name in int4.block_linears(block)]
    before = sum(weight.nbytes for weight in weights)
    freed = freed_by_packing(model, quantization)
    packed = take(model, release=False, quantization=quantization)
    matrices = [packed.head_VD]
    for layer in packed.layers:
        matrices += [layer.qkv_fc_in, layer.out_proj_fc_out]
    assert freed == before - sum(matrix.nbytes for matrix in matrices)
    assert choice.freed_memory(model, "int4") == 0  # on a CPU


@both
def test_steps_read_packed_weights(quantization: Format) -> None:
    runner = CudaRunner(random_model(), 4, plain_operations(), quantization=quantization)
    size, inner = CONFIG.n_embd, CONFIG.inner_dim
    weights = CONFIG.n_layer * (4 * size * size + 2 * size * inner)
    if quantization == "int8":
        packed = weights + CONFIG.n_layer * 4 * (4 * size + inner)
    else:  # q_proj and the like have 64 inputs, half a block
        packed = CONFIG.n_layer * (2 * (3 * size + inner) * 34 + size * (size + inner) * 34 // 64)
    head = CONFIG.vocab_size * (size + 4)
    biases = sum(p.numel() for p in random_model().parameters() if p.dim() == 1)
    assert runner.bytes_read == packed + head + 4 * biases
    runner.close()


def test_4_bit_weights_are_served_as_they_were_loaded(device: torch.device) -> None:
    """They give the logits of weights that are quantized at load."""
    found, read = [], []
    for stored in (False, True):
        model = random_model(device)
        if stored:
            int4.quantize_blocks(model.transformer.h)
            assert int4.is_int4(model)
        runner = CudaRunner(model, 4, operations(device, "int4"), quantization="int4", release=True)
        found.append(runner.step(prompt(IDS)))
        read.append(runner.bytes_read)
        runner.close()
    assert torch.equal(*found)
    assert read[0] == read[1]


def test_a_tied_head_is_quantized_and_the_embedding_is_not(device: torch.device) -> None:
    model = random_model(device)
    model.lm_head.weight = model.transformer.wte.weight
    expected = dequantized(model, "int8")
    expected.transformer.wte.weight = torch.nn.Parameter(model.transformer.wte.weight.cpu().float())
    runner = CudaRunner(model, 4, operations(device, "int8"), quantization="int8", release=True)
    near(runner.step(prompt(IDS)), expected(torch.tensor([IDS])).logits[0].detach())
    runner.close()


@both
def test_adapters_are_added_to_quantized_products(
    device: torch.device, quantization: Format
) -> None:
    model = random_model(device)
    plain = dequantized(model, quantization)
    layers = random_adapter()
    limits = LoRALimits(max_loras=2, max_lora_rank=4)
    runner = CudaRunner(
        model, 4, operations(device, quantization), quantization=quantization, lora=limits
    )
    runner.load_adapter(1, LoRAWeights(3, layers, b""))
    near(runner.step(prompt(IDS, adapter=NONE)), plain(torch.tensor([IDS])).logits[0])
    for block, pairs in zip(plain.transformer.h, layers, strict=True):
        for parent, name in int4.block_linears(block):
            getattr(parent, name).weight.data += pairs[name].b_OR @ pairs[name].a_RI
    expected = plain(torch.tensor([IDS])).logits[0]
    near(runner.step(prompt(IDS, adapter=1)), expected)
    runner.close()


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_a_gpu_gets_a_runner_with_quantized_weights(
    name: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plain operations in place of a GPU's."""
    asked = []

    def plain(
        model: GPTJForCausalLM, lora: LoRALimits | None, quantization: Format, cache_dtype: object
    ) -> Operations:
        asked.append((lora, quantization))
        return plain_operations()

    monkeypatch.setattr(choice, "operations_for", plain)
    lora = LoRALimits()
    runner = choice._gpu_runner(random_model(), 4, name, "auto", lora, release=True)
    assert asked == [(lora, name)]
    assert isinstance(runner, CudaRunner)
    layer = runner._weights.layers[0]
    if name == "fp8":
        assert isinstance(layer.qkv_fc_in, Fp8Matrix)
    else:
        assert isinstance(layer.qkv_fc_in, QuantizedMatrix)
        assert layer.qkv_fc_in.bits == BITS[name]
    runner.close()


def test_a_models_own_4_bit_weights_stay_in_4_bits_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(choice, "_gpu_runner", lambda *arguments: asked.append(arguments[2]))
    model = ElsewhereModel(CONFIG)
    int4.quantize_blocks(model.transformer.h)
    choice.best_runner(model, 64)
    assert asked == ["int4"]
    with pytest.raises(ValueError, match="int8 needs the original weights"):
        choice.best_runner(model, 64, quantization="int8")


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_activations_must_be_in_16_bits(quantization: Format) -> None:
    with pytest.raises(UnsupportedError, match=r"in float16 or bfloat16.*remedy: dtype=b?float16"):
        operations_for(ElsewhereModel(CONFIG), quantization=quantization)


def test_widths_that_are_not_whole_groups_are_refused() -> None:
    config = GPTJConfig(**{**CONFIG.to_dict(), "n_inner": 100})
    model = ElsewhereModel(config).half()
    with pytest.raises(UnsupportedError, match="n_inner=100 to be multiples of 64"):
        operations_for(model, quantization="int4")


@pytest.mark.slow
def test_dequantizing_is_tried_before_the_weights_are_released(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other kernels are tried while they are measured, with this one in their place."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = TritonOperations(CONFIG, torch.float16, processors=1)
    try_out(kernels, device, quantization="int4")
    monkeypatch.setattr(quantized_kernels, "dequantize", Broken(ERRORS[0]))
    try_out(kernels, device)
    with pytest.raises(UnsupportedError, match="OutOfResources"):
        try_out(kernels, device, quantization="int4")

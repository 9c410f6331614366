"""Quantized frozen weights: against the definitions of their codes, and against plain weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gptj import GPTJConfig, GPTJForCausalLM
from gptj.adapters.config import TARGET_MODULES, LoRAConfig
from gptj.adapters.lora import adapter_parameters, add_lora, merge_lora
from gptj.adapters.quantization import (
    BLOCK,
    Quantization,
    QuantizedLinear,
    count_weights,
    quantize_blocks,
)
from gptj.training.live_bytes import LiveBytes

# Appendix E of the QLoRA paper.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "n_positions": 32,
    "n_embd": 48,  # whose matrices do not fill their last block
    "n_layer": 3,
    "n_head": 4,
    "rotary_dim": 4,
    "initializer_range": 0.2,
}
EVERYWHERE = LoRAConfig(rank=4, target_modules=TARGET_MODULES)
SOME = LoRAConfig(rank=4, target_modules=("q_proj", "fc_in"))
KINDS = pytest.mark.parametrize("quantization", ["int8", "nf4"])


def expected(weight: torch.Tensor, quantization: Quantization) -> np.ndarray[Any, Any]:
    """The nearest values of the type, block by block, in double precision."""
    values = np.array(NF4) if quantization == "nf4" else np.arange(-127, 128) / 127
    flat = weight.detach().double().flatten().numpy()
    found = np.empty_like(flat)
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        scale = np.abs(block).max()
        nearest = np.abs(block[:, None] / scale - values).argmin(axis=1)
        found[start : start + BLOCK] = values[nearest] * scale
    return found.reshape(weight.shape)


@KINDS
@pytest.mark.parametrize("shape", [(48, 40), (3, 5), (64, 64), (96, 4), (32, 3)])
def test_weights_are_rounded_to_the_nearest_values(
    quantization: Quantization, shape: tuple[int, int], device: torch.device
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(*shape)
    layer = QuantizedLinear(linear, quantization).to(device)
    found = layer.dequantized(torch.float32).cpu().double().numpy()
    np.testing.assert_allclose(found, expected(linear.weight, quantization), rtol=0, atol=1e-6)


def pair(
    quantization: Quantization, adapter: LoRAConfig, device: torch.device, dtype: torch.dtype
) -> tuple[GPTJForCausalLM, GPTJForCausalLM]:
    """A quantized model, and a plain one of its dequantized weights, with the same adapter."""
    torch.manual_seed(0)
    quantized = GPTJForCausalLM(GPTJConfig(**SHAPE))
    plain = GPTJForCausalLM(GPTJConfig(**SHAPE))
    plain.load_state_dict(quantized.state_dict())
    quantize_blocks(quantized, quantization)
    for name, layer in quantized.named_modules():
        if isinstance(layer, QuantizedLinear):
            weight = plain.get_submodule(name).weight
            weight.data.copy_(torch.from_numpy(expected(weight, quantization)))
    for model in (quantized, plain):
        torch.manual_seed(1)
        add_lora(model, adapter)
        for parameter in adapter_parameters(model).values():
            nn.init.normal_(parameter, std=0.1)  # B is 0 in a new adapter
        model.to(device, dtype)
    return quantized, plain


@KINDS
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("adapter", [EVERYWHERE, SOME], ids=["everywhere", "some"])
def test_logits_and_gradients_equal_those_of_the_dequantized_weights(
    quantization: Quantization, adapter: LoRAConfig, recompute: bool, device: torch.device
) -> None:
    """In fp32 to 1e-5: scales and values are rounded once."""
    models = pair(quantization, adapter, device, torch.float32)
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(2)).to(device)
    logits, gradients = [], []
    for model in models:
        if recompute:
            model.gradient_checkpointing_enable()
        output = model.train()(ids, labels=ids)
        output.loss.backward()
        logits.append(output.logits)
        gradients.append({name: p.grad for name, p in adapter_parameters(model).items()})
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


def test_codes_survive_a_change_of_precision() -> None:
    """Codes and scales are as they were; a model in bf16 computes with weights rounded to it."""
    quantized, plain = pair("nf4", SOME, torch.device("cpu"), torch.bfloat16)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(quantized(ids).logits, plain(ids).logits)


@KINDS
def test_dequantized_weights_are_not_kept_for_the_backward_pass(quantization: Quantization) -> None:
    quantized, plain = pair(quantization, SOME, torch.device("cpu"), torch.float32)
    ids = torch.arange(20)[None]
    kept = []
    for model in (quantized, plain):
        with LiveBytes() as memory:
            loss = model(ids, labels=ids, skip_logits=True).loss
            kept.append(memory.now)
        loss.backward()
    assert kept[0] <= kept[1] * 1.01


@KINDS
def test_weights_take_the_documented_memory(quantization: Quantization) -> None:
    """A model on the meta device has the same shapes."""
    linear = nn.Linear(256, 128)
    for layer in (
        QuantizedLinear(linear, quantization),
        QuantizedLinear(linear.to("meta"), quantization),
    ):
        taken = sum(p.numel() for n, p in layer.named_parameters() if n != "bias")
        each = {"int8": 1 + 4 / BLOCK, "nf4": 0.5 + 4 / BLOCK}
        assert taken == 256 * 128 * each[quantization]
        assert count_weights(layer) == 256 * 128 + 128


@KINDS
def test_parameters_are_counted_as_the_weights_that_the_codes_stand_for(
    quantization: Quantization,
) -> None:
    quantized, plain = pair(quantization, SOME, torch.device("cpu"), torch.float32)
    assert quantized.num_parameters() == plain.num_parameters() == count_weights(quantized)
    trained = plain.num_parameters(only_trainable=True)
    assert quantized.num_parameters(only_trainable=True) == trained


def test_an_adapter_is_not_merged_into_quantized_weights() -> None:
    model, _ = pair("int8", SOME, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match=r"quantized weights; remedy: .*jobs/merge_adapter\.py"):
        merge_lora(model)
    assert model.adapter is not None

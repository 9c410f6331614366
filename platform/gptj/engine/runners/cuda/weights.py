"""A model's weights, fused into two matrices per layer for the GPU.

In GPT-J's parallel block the four projections of the norm form one matrix product, and the two
output projections another. These can be quantized: to integers, and with them the head to int8, as
in the CPU's runner; or to fp8, without the head. Shape suffixes: D width, I inner width of the MLP,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gptj.engine.runners.cuda.fp8 import Fp8Matrix, fp8_bytes, quantize
from gptj.engine.runners.cuda.quantized_matrix import (
    Bits,
    QuantizedMatrix,
    pack,
    packed_bytes,
)
from gptj.layers.int4 import Int4Linear, Int4Weight, is_int4
from gptj.model import GPTJBlock, GPTJForCausalLM, Rotary

Matrix = Tensor | QuantizedMatrix | Fp8Matrix
Format = Literal["int8", "int4", "fp8"]  # of quantized weights

BITS: dict[Format, Bits] = {"int8": 8, "int4": 4}
HEAD_BITS: Bits = 8  # of the head beside layers of integers


@dataclass(frozen=True)
class Norm:
    """A layer norm's parameters in fp32, like its input."""

    weight_D: Tensor
    bias_D: Tensor


@dataclass(frozen=True)
class Layer:
    norm: Norm
    qkv_fc_in: Matrix  # (3D + I, D): q_proj, k_proj, v_proj, fc_in
    fc_in_bias_I: Tensor  # of fc_in, fp32
    out_proj_fc_out: Matrix  # (D, D + I): out_proj, fc_out
    fc_out_bias_D: Tensor  # of fc_out, fp32


@dataclass(frozen=True)
class Weights:
    embedding_VD: Tensor
    layers: tuple[Layer, ...]
    norm: Norm
    head_VD: Matrix
    head_bias_V: Tensor  # fp32
    sines: Tensor  # (positions, rotated / 2), fp32
    cosines: Tensor

    @property
    def bytes_read(self) -> int:
        """Bytes read by one step: all except the embedding, of which it reads one row per token."""
        tensors: list[Matrix] = [*_tensors(self.norm), self.head_VD, self.head_bias_V]
        for layer in self.layers:
            tensors += [*_tensors(layer.norm), layer.qkv_fc_in, layer.fc_in_bias_I]
            tensors += [layer.out_proj_fc_out, layer.fc_out_bias_D]
        return sum(tensor.nbytes for tensor in tensors)


def freed_by_packing(model: GPTJForCausalLM, quantization: Format) -> int:
    """Bytes less that quantized weights take than the model's, by their shapes."""
    config = model.config
    width, inner = config.n_embd, config.inner_dim
    shapes = [(3 * width + inner, width), (width, width + inner)] * config.n_layer
    before = model.dtype.itemsize
    if quantization == "fp8":
        return sum(each[0] * each[1] * before - fp8_bytes(*each) for each in shapes)
    matrices = [(len(model.lm_head.weight), width, HEAD_BITS)]
    if not is_int4(model):
        matrices += [(*each, BITS[quantization]) for each in shapes]
    return sum(
        columns * inputs * before - packed_bytes(columns, inputs, bits)
        for columns, inputs, bits in matrices
    )


@torch.inference_mode()
def take(model: GPTJForCausalLM, *, release: bool, quantization: Format | None = None) -> Weights:
    """Fuse the layers' weights; embedding and head, if not quantized, are the model's own tensors.

    Args:
        quantization: of the weights.
        release: free each layer's weights in the model once copied, so that at most one layer is
            in memory twice; the model is unusable afterwards.
    """
    assert quantization == "int4" or not is_int4(model), "4-bit weights stay in 4 bits"
    layers = []
    for block in model.transformer.h:
        assert isinstance(block, GPTJBlock)
        layers.append(_layer(block, quantization))
        if release:
            _release(block)
            if model.device.type == "cuda":
                torch.cuda.empty_cache()  # freed blocks are too small for the next layer
    rotary = Rotary.at(
        torch.arange(model.config.n_positions, device=model.device)[None], model.config
    )
    head_VD = model.lm_head.weight.detach()
    weights = Weights(
        model.transformer.wte.weight.detach(),
        tuple(layers),
        _norm(model.transformer.ln_f),
        pack([head_VD], HEAD_BITS) if quantization in BITS else head_VD,
        _copied(model.lm_head.bias),
        rotary.sin_BL1R[0, :, 0, ::2].contiguous(),
        rotary.cos_BL1R[0, :, 0, ::2].contiguous(),
    )
    if release:
        _release(model)
    return weights


def _layer(block: GPTJBlock, quantization: Format | None) -> Layer:
    attn, mlp = block.attn, block.mlp
    return Layer(
        _norm(block.ln_1),
        _fused((attn.q_proj, attn.k_proj, attn.v_proj, mlp.fc_in), quantization),
        _copied(mlp.fc_in.bias),
        _fused((attn.out_proj, mlp.fc_out), quantization, beside=True),
        _copied(mlp.fc_out.bias),
    )


def _fused(
    linears: Sequence[nn.Module], quantization: Format | None, *, beside: bool = False
) -> Matrix:
    """One matrix of several: columns, or inputs if `beside`, one after another."""
    if quantization in BITS:
        return pack([_weight(each) for each in linears], BITS[quantization], beside=beside)
    weights = [each.get_parameter("weight").detach() for each in linears]
    if quantization == "fp8":
        return quantize(weights, beside=beside)
    return torch.cat(weights, dim=int(beside))


def _weight(linear: nn.Module) -> Tensor | Int4Weight:
    if isinstance(linear, Int4Linear):
        return linear.int4_weight
    return linear.get_parameter("weight").detach()


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(_copied(norm.weight), _copied(norm.bias))


def _copied(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.float32, copy=True)


def _release(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)


def _tensors(norm: Norm) -> Iterator[Tensor]:
    yield norm.weight_D
    yield norm.bias_D

"""A model's weights, fused into two matrices per layer for the GPU.

In GPT-J's parallel block the four projections of the norm form one matrix product, and the two
output projections another. With `bits` these are quantized, and so is the head, in 8 bits: the same
matrices as in the CPU's runner. Shape suffixes: D width, I inner width of the MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptj.engine.runners.cuda.quantized_matrix import (
    Bits,
    QuantizedMatrix,
    pack,
    packed_bytes,
)
from gptj.int4 import Int4Linear, Int4Weight, is_int4
from gptj.model import GPTJBlock, GPTJForCausalLM, Rotary

Matrix = Tensor | QuantizedMatrix

HEAD_BITS: Bits = 8  # of the head beside quantized layers


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


def freed_by_packing(model: GPTJForCausalLM, bits: Bits) -> int:
    """Bytes less that quantized weights take than the model's, by their shapes."""
    config = model.config
    width, inner = config.n_embd, config.inner_dim
    matrices = [(len(model.lm_head.weight), width, HEAD_BITS)]
    if not is_int4(model):
        layer = [(3 * width + inner, width, bits), (width, width + inner, bits)]
        matrices += config.n_layer * layer
    return sum(
        columns * inputs * model.dtype.itemsize - packed_bytes(columns, inputs, each)
        for columns, inputs, each in matrices
    )


@torch.inference_mode()
def take(model: GPTJForCausalLM, *, release: bool, bits: Bits | None = None) -> Weights:
    """Fuse the layers' weights; embedding and head, if not quantized, are the model's own tensors.

    Args:
        bits: of quantized weights.
        release: free each layer's weights in the model once copied, so that at most one layer is
            in memory twice; the model is unusable afterwards.
    """
    assert bits == 4 or not is_int4(model), "4-bit weights stay in 4 bits"
    layers = []
    for block in model.transformer.h:
        assert isinstance(block, GPTJBlock)
        layers.append(_layer(block, bits))
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
        head_VD if bits is None else pack([head_VD], HEAD_BITS),
        _copied(model.lm_head.bias),
        rotary.sin_BL1R[0, :, 0, ::2].contiguous(),
        rotary.cos_BL1R[0, :, 0, ::2].contiguous(),
    )
    if release:
        _release(model)
    return weights


def _layer(block: GPTJBlock, bits: Bits | None) -> Layer:
    attn, mlp = block.attn, block.mlp
    return Layer(
        _norm(block.ln_1),
        _fused((attn.q_proj, attn.k_proj, attn.v_proj, mlp.fc_in), bits),
        _copied(mlp.fc_in.bias),
        _fused((attn.out_proj, mlp.fc_out), bits, beside=True),
        _copied(mlp.fc_out.bias),
    )


def _fused(linears: Sequence[nn.Module], bits: Bits | None, *, beside: bool = False) -> Matrix:
    """One matrix of several: columns, or inputs if `beside`, one after another."""
    if bits is None:
        return torch.cat([linear.get_parameter("weight") for linear in linears], dim=int(beside))
    return pack([_weight(linear) for linear in linears], bits, beside=beside)


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

"""A model's weights, fused into two matrices per layer for the GPU.

In GPT-J's parallel block the four projections of the norm form one matrix product, and the two
output projections another. Shape suffixes: D width, I inner width of the MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptj.model import GPTJBlock, GPTJForCausalLM, Rotary


@dataclass(frozen=True)
class Norm:
    """A layer norm's parameters in fp32, like its input."""

    weight_D: Tensor
    bias_D: Tensor


@dataclass(frozen=True)
class Layer:
    norm: Norm
    qkv_fc_in: Tensor  # (3D + I, D): q_proj, k_proj, v_proj, fc_in
    fc_in_bias_I: Tensor  # of fc_in, fp32
    out_proj_fc_out: Tensor  # (D, D + I): out_proj, fc_out
    fc_out_bias_D: Tensor  # of fc_out, fp32


@dataclass(frozen=True)
class Weights:
    embedding_VD: Tensor
    layers: tuple[Layer, ...]
    norm: Norm
    head_VD: Tensor
    head_bias_V: Tensor  # fp32
    sines: Tensor  # (positions, rotated / 2), fp32
    cosines: Tensor

    @property
    def bytes_read(self) -> int:
        """Bytes read by one step: all except the embedding, of which it reads one row per token."""
        tensors = [*_tensors(self.norm), self.head_VD, self.head_bias_V]
        for layer in self.layers:
            tensors += [*_tensors(layer.norm), layer.qkv_fc_in, layer.fc_in_bias_I]
            tensors += [layer.out_proj_fc_out, layer.fc_out_bias_D]
        return sum(tensor.nbytes for tensor in tensors)


@torch.inference_mode()
def take(model: GPTJForCausalLM, *, release: bool) -> Weights:
    """Fuse the layers' weights; embedding and head are the model's own tensors.

    Args:
        release: free each layer's weights in the model once copied, so that at most one layer is
            in memory twice; the model is unusable afterwards.
    """
    layers = []
    for block in model.transformer.h:
        assert isinstance(block, GPTJBlock)
        layers.append(_layer(block))
        if release:
            _release(block)
            if model.device.type == "cuda":
                torch.cuda.empty_cache()  # freed blocks are too small for the next layer
    rotary = Rotary.at(
        torch.arange(model.config.n_positions, device=model.device)[None], model.config
    )
    weights = Weights(
        model.transformer.wte.weight.detach(),
        tuple(layers),
        _norm(model.transformer.ln_f),
        model.lm_head.weight.detach(),
        _copied(model.lm_head.bias),
        rotary.sin_BL1R[0, :, 0, ::2].contiguous(),
        rotary.cos_BL1R[0, :, 0, ::2].contiguous(),
    )
    if release:
        _release(model)
    return weights


def _layer(block: GPTJBlock) -> Layer:
    attn, mlp = block.attn, block.mlp
    return Layer(
        _norm(block.ln_1),
        torch.cat((attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight, mlp.fc_in.weight)),
        _copied(mlp.fc_in.bias),
        torch.cat((attn.out_proj.weight, mlp.fc_out.weight), dim=1),
        _copied(mlp.fc_out.bias),
    )


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

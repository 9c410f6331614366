"""Frozen linear layers in 8 or 4 bits; combined with LoRA, QLoRA.

Weights are quantized in blocks of BLOCK consecutive values, each scaled by the block's largest
absolute value in fp32:

- `int8`: integer multiples of 1/127, 1.06 bytes per weight.
- `nf4`: 16 values, quantiles of a normal distribution, 0.56 bytes per weight. Dettmers et al.,
  "QLoRA", 2023, https://arxiv.org/abs/2305.14314; without double quantization.

A layer dequantizes its weights temporarily for each product, once in the forward and once in the
backward pass. The kernels are bitsandbytes', on CPUs and GPUs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptj.adapters.config import TARGET_MODULES
from gptj.adapters.model import AdaptableModel
from gptj.environment.extras import require

Quantization = Literal["int8", "nf4"]

BLOCK = 64


class QuantizedLinear(nn.Module):
    """W x + b with a frozen, quantized W. Gradients flow only to x.

    Codes and scales are uint8 parameters: converting the model's dtype leaves them unchanged, and
    they are moved and broadcast with the model's parameters.

    Args:
        linear: the layer to replace. On the meta device, only its shape matters.
    """

    def __init__(self, linear: nn.Linear, quantization: Quantization) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype  # of the weights that were quantized
        self.quantization = quantization
        with torch.no_grad():
            codes, scales = _quantize(linear.weight.detach(), quantization)
        self.weight_codes = nn.Parameter(codes, requires_grad=False)
        self.weight_scales = nn.Parameter(scales.view(torch.uint8), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """W (out, in), as used in computation."""
        scales = self.weight_scales.view(torch.float32)
        shape = (self.out_features, self.in_features)
        _library()
        operations = torch.ops.bitsandbytes
        if self.quantization == "nf4":
            codes, size = self.weight_codes[:, None], shape[0] * shape[1]
            # With AVX-512, bitsandbytes 0.50.2 takes wrong scales if a block spans several rows.
            rows = (size // BLOCK, BLOCK) if size % BLOCK == 0 else (1, size)
            flat = operations.dequantize_4bit(codes, scales, BLOCK, "nf4", rows, dtype)
            weight: Tensor = flat.view(shape)
        else:
            codes, values = self.weight_codes.view(shape), _int8_values(self.weight_codes.device)
            weight = operations.dequantize_blockwise(codes, scales, values, BLOCK, dtype)
        return weight

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.quantization}"


class _FrozenProduct(torch.autograd.Function):
    """x W^T; W is dequantized again for the gradient of x rather than saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantized(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantized(grad.dtype), None


def quantize_blocks(
    model: AdaptableModel,
    quantization: Quantization,
    device: torch.device | str | None = None,
) -> None:
    """Quantize all linear layers of a model's blocks, but not embedding, norms and heads.

    Args:
        device: where to quantize the weights, one layer at a time; None: where they are.
    """
    blocks: Any = model.base_model.get_submodule("h").children()
    for block in blocks:
        for parent in (block.attn, block.mlp):
            for name in TARGET_MODULES:
                if hasattr(parent, name):
                    linear: nn.Linear = getattr(parent, name)
                    place = linear.weight.device
                    if device is not None and place.type != "meta":
                        linear = linear.to(device)
                    setattr(parent, name, QuantizedLinear(linear, quantization).to(place))


def count_weights(model: nn.Module) -> int:
    """Number of a model's weights, including quantized ones and ZeRO-3's other partitions."""
    plain = [p for p in model.parameters() if p.is_floating_point()]
    coded = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    return sum(getattr(p, "ds_numel", p.numel()) for p in plain) + sum(
        layer.in_features * layer.out_features for layer in coded
    )


def _library() -> Any:
    return require("bitsandbytes", "quantized weights (adapter.quantization)")


def _quantize(weight: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """Codes, and one scale per block."""
    if weight.device.type == "meta":
        count = weight.numel()
        codes = count if quantization == "int8" else -(-count // 2)
        blocks = -(-count // BLOCK)
        return (
            torch.empty(codes, dtype=torch.uint8, device="meta"),
            torch.empty(blocks, dtype=torch.float32, device="meta"),
        )
    if quantization == "int8":
        return _quantize_int8(weight)
    _library()
    quantize = torch.ops.bitsandbytes.quantize_4bit
    codes, scales = quantize(weight.contiguous(), BLOCK, "nf4", torch.uint8)
    return codes.flatten(), scales.float()


def _quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round to nearest; bitsandbytes' own function may be off by one code."""
    flat = weight.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    multiples = (blocks * (127 / scales.clamp_min(1e-30))[:, None]).round_().flatten()[: len(flat)]
    codes = multiples + 127 + (multiples > 0)  # see _int8_values
    return codes.to(torch.uint8), scales


@lru_cache
def _int8_values(device: torch.device) -> Tensor:
    """Values of the 256 codes: -127/127 to 0, and 0 to 127/127."""
    values = torch.arange(-127, 128) / 127
    return torch.cat((values[:128], values[127:])).to(device)

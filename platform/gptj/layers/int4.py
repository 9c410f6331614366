"""Linear layers with 4-bit weights, symmetric, in groups of 64 inputs that share a scale.

A weight is (code - 8) * scale, with a code of 0 to 15 and a bf16 scale: 4.25 bits per weight. Model
folders store it in the format `pack-quantized` of compressed-tensors, which vLLM reads
(https://github.com/vllm-project/compressed-tensors). In place of `weight` a layer has
`weight_packed`, int32 (outputs, inputs / 8), with input 8i + j in bits 4j to 4j + 3 of word i;
`weight_scale`, bf16 (outputs, inputs / 64); and `weight_shape`. All linear layers of the blocks are
quantized; embedding, norms and heads are not.

The engine's kernels pack the same codes in layouts of their own. In PyTorch a layer dequantizes its
weights for each product, which is slow, and the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptj.adapters.config import TARGET_MODULES
from gptj.errors import CheckpointError

GROUP_SIZE = 64  # inputs that share a scale
ZERO_POINT = 8  # the code of 0
CONFIG_FIELD = "quantization_config"  # in config.json
PARAMETERS = ("weight_packed", "weight_scale", "weight_shape")  # in place of `weight`


@dataclass(frozen=True)
class Int4Weight:
    """A quantized matrix (outputs, inputs), or some of its rows."""

    packed: Tensor  # (outputs, inputs / 8), int32
    scales: Tensor  # (outputs, inputs / GROUP_SIZE), bf16

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.packed), 8 * self.packed.shape[1]

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, rows: slice) -> Int4Weight:
        return Int4Weight(self.packed[rows], self.scales[rows])

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """(outputs, inputs), computed in fp32 and rounded once, to `dtype`."""
        pairs = self.packed.contiguous().view(torch.uint8)
        codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
        groups = (codes.float() - ZERO_POINT).unflatten(1, (-1, GROUP_SIZE))
        values: Tensor = groups * self.scales.float()[:, :, None]
        return values.flatten(1).to(dtype)


def quantize(weight: Tensor) -> Int4Weight:
    """Round to nearest. On the meta device, only the shape matters."""
    outputs, inputs = weight.shape
    if weight.is_meta:  # where arithmetic would make PyTorch import its compiler
        return Int4Weight(
            torch.empty(outputs, inputs // 8, dtype=torch.int32, device="meta"),
            torch.empty(outputs, inputs // GROUP_SIZE, dtype=torch.bfloat16, device="meta"),
        )
    scales = group_scales(weight)
    units = scales.float()
    units = torch.where(units == 0, 1.0, units)[:, :, None]
    steps = weight.float().unflatten(1, (-1, GROUP_SIZE)) / units
    return pack_codes(steps.round_().clamp_(-ZERO_POINT, 15 - ZERO_POINT).flatten(1), scales)


def group_scales(weight: Tensor) -> Tensor:
    """Scales (outputs, groups) that give each group's weight of largest magnitude the code 0.

    A scale therefore has the opposite of that weight's sign, and all 16 codes are used.
    """
    low, high = weight.float().unflatten(1, (-1, GROUP_SIZE)).aminmax(dim=-1)
    return (torch.where(-low >= high, low, high) / -ZERO_POINT).bfloat16()


def pack_codes(steps: Tensor, scales: Tensor) -> Int4Weight:
    """From multiples of the scales, whole numbers of -8 to 7 (outputs, inputs)."""
    codes = (steps + ZERO_POINT).to(torch.uint8)
    pairs = codes[:, ::2] | codes[:, 1::2] << 4
    return Int4Weight(pairs.contiguous().view(torch.int32), scales)  # a transpose's are not


class Int4Linear(nn.Module):
    """W x + b in PyTorch, dequantizing W for each product."""

    def __init__(self, weight: Int4Weight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight_packed = nn.Parameter(weight.packed, requires_grad=False)
        self.weight_scale = nn.Parameter(weight.scales, requires_grad=False)
        self.weight_shape = nn.Parameter(torch.tensor(weight.shape), requires_grad=False)
        self.bias = bias

    @property
    def int4_weight(self) -> Int4Weight:
        return Int4Weight(self.weight_packed.detach(), self.weight_scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.int4_weight.dequantized(x.dtype), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and convert as usual, but leave scales in bf16, the only dtype of the format."""
        scales = self.weight_scale.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != scales.dtype:
            self.weight_scale.data = scales.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, int4"


def block_linears(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The parent and name of each linear layer of a block."""
    for parent in block.children():
        for name in TARGET_MODULES:
            if hasattr(parent, name):
                yield parent, name


def quantize_blocks(blocks: nn.Module) -> None:
    """Replace the linear layers of all blocks by quantized ones, rounding to nearest.

    Raises:
        ValueError: if the number of a layer's inputs is not a multiple of GROUP_SIZE.
    """
    for block in blocks.children():
        for parent, name in block_linears(block):
            linear: nn.Linear = getattr(parent, name)
            if linear.in_features % GROUP_SIZE:
                raise ValueError(
                    f"int4 needs layers with a multiple of {GROUP_SIZE} inputs (n_embd and "
                    f"n_inner), and {name} has {linear.in_features}"
                )
            setattr(parent, name, Int4Linear(quantize(linear.weight.detach()), linear.bias))


def is_quantized(config: object) -> bool:
    """Whether a configuration's weights are quantized, in whatever way. A null means no."""
    return getattr(config, CONFIG_FIELD, None) is not None


def is_int4(model: nn.Module) -> bool:
    return any(isinstance(module, Int4Linear) for module in model.modules())


def config_fields(**weights: Any) -> dict[str, Any]:
    """The value of CONFIG_FIELD. `weights`: more fields of `weights`, such as `actorder`."""
    group = {
        "targets": ["Linear"],
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": GROUP_SIZE,
            "dynamic": False,
            **weights,
        },
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def check_config_fields(fields: Any, folder: str) -> None:
    """CheckpointError unless they describe this module's format."""
    wanted = config_fields()
    found = fields if isinstance(fields, Mapping) else {}
    problems = [
        f"{name} is {shown(found.get(name))}"
        for name in ("quant_method", "format", "ignore")
        if found.get(name) != wanted[name]
    ]
    groups = found.get("config_groups")
    group = groups.get("group_0") if isinstance(groups, Mapping) and len(groups) == 1 else None
    if not problems and not isinstance(group, Mapping):
        problems.append(f"config_groups is {shown(groups)}")
    if not problems:
        problems = _differences(wanted["config_groups"]["group_0"], group, "")
    if problems:
        raise CheckpointError(
            f"{folder} has weights quantized in a way that is not supported: {problems[0]} in its "
            f"{CONFIG_FIELD}; remedy: quantize the original model with jobs/quantize.py"
        )


def _differences(wanted: Mapping[str, Any], found: Any, prefix: str) -> list[str]:
    if not isinstance(found, Mapping):
        return [f"{prefix.rstrip('.')} is {shown(found)}"]
    differences = []
    for name, value in wanted.items():
        if isinstance(value, Mapping):
            differences += _differences(value, found.get(name), f"{prefix}{name}.")
        elif found.get(name) != value:
            differences.append(f"{prefix}{name} is {shown(found.get(name))}, not {value}")
    return differences

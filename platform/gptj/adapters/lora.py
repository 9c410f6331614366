"""LoRA in a model: two small trainable matrices beside each frozen linear layer.

Linear layers keep their parameter names, so checkpoints of the base model load into an adapted one;
A and B have PEFT's names (`…q_proj.lora_A.weight`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gptj.adapters.config import TARGET_MODULES, LoRAConfig
from gptj.adapters.model import AdaptableModel
from gptj.adapters.quantization import QuantizedLinear

# Heads that a base model usually lacks and that are trained with an adapter, by model class.
NEW_HEADS = {
    "GPTJForSequenceClassification": ("score",),
    "GPTJForQuestionAnswering": ("qa_outputs",),
}


class _LoRA(nn.Module):
    """Mixin that adds scaling * B A dropout(x) to a linear layer.

    A (rank, in) is initialised like nn.Linear's weight (Kaiming-uniform with a = sqrt 5, as in
    PEFT) and B (out, rank) with zeros, so a new adapter changes nothing.
    """

    in_features: int
    out_features: int

    def _add(self, config: LoRAConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.scaling = config.scaling
        self.lora_dropout = nn.Dropout(config.dropout)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lora_A = nn.Linear(self.in_features, config.rank, bias=False, **place)
        self.lora_B = nn.Linear(config.rank, self.out_features, bias=False, **place)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.lora_B(self.lora_A(self.lora_dropout(x)))
        frozen: Tensor = super().forward(x)  # the frozen layer's
        return frozen + added * self.scaling


class LoRALinear(_LoRA, nn.Linear):
    """W x + b + scaling * B A dropout(x), with W and b from the layer it replaces."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate weights
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self._add(config, linear.weight.device, linear.weight.dtype)

    def merged(self) -> nn.Linear:
        """An equivalent plain layer, which takes over this one's weights, merged in place."""
        add_product(self.weight, self.lora_A.weight, self.lora_B.weight, self.scaling)
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        return linear


class LoRAQuantizedLinear(_LoRA, QuantizedLinear):
    """Like LoRALinear, with a quantized W."""

    def __init__(self, linear: QuantizedLinear, config: LoRAConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.quantization = linear.dtype, linear.quantization
        self.weight_codes, self.weight_scales = linear.weight_codes, linear.weight_scales
        self.bias = linear.bias
        self._add(config, linear.weight_codes.device, linear.dtype)


def add_lora(model: AdaptableModel, config: LoRAConfig) -> None:
    """Freeze a model and add A and B to its target modules; only they and saved heads train.

    ValueError if it already has an adapter, lacks a head in modules_to_save, or has weights of a
    4-bit model folder.
    """
    if model.adapter is not None:
        raise ValueError("the model already has an adapter; remedy: merge it first (merge_lora)")
    for head in config.modules_to_save:
        if not hasattr(model, head):
            raise ValueError(f"modules_to_save: a {type(model).__name__} has no {head}")
        if head == "lm_head" and model.config.tie_word_embeddings:
            raise ValueError("modules_to_save: lm_head is tied to the embedding, which is frozen")
    targets = [
        (parent, name)
        for block in model.base_model.get_submodule("h").children()
        for parent in (block.attn, block.mlp)
        for name in TARGET_MODULES
        if name in config.target_modules and hasattr(parent, name)
    ]
    for parent, name in targets:
        if not isinstance(getattr(parent, name), nn.Linear | QuantizedLinear):
            raise ValueError(
                "the model has 4-bit weights, beside which no adapter can be trained; remedy: the "
                "model that they were made from, perhaps with adapter.quantization"
            )
    model.requires_grad_(False)
    for parent, name in targets:
        setattr(parent, name, _adapted(getattr(parent, name), config))
    for head in config.modules_to_save:
        model.get_submodule(head).requires_grad_(True)
    model.adapter = config


def _adapted(layer: nn.Linear | QuantizedLinear, config: LoRAConfig) -> nn.Module:
    if isinstance(layer, QuantizedLinear):
        return LoRAQuantizedLinear(layer, config)
    return LoRALinear(layer, config)


def adapter_parameters(model: AdaptableModel) -> dict[str, nn.Parameter]:
    """The adapter's parameters by the model's names: A, B, and the saved heads."""
    heads = tuple(f"{head}." for head in model.adapter.modules_to_save) if model.adapter else ()
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name or name.startswith(heads)
    }


def merge_lora(model: AdaptableModel) -> None:
    """Merge the adapter into the weights in place, leaving a plain model.

    Does nothing to a model without an adapter. ValueError if the weights are quantized.
    """
    if model.adapter is None:
        return
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(
            "an adapter cannot be merged into quantized weights; remedy: merge it into the base "
            "model that it was trained on (jobs/merge_adapter.py)"
        )
    for parent in [module for module in model.modules() if not isinstance(module, LoRALinear)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.merged())
    model.adapter = None
    model.requires_grad_(True)


@torch.no_grad()
def add_product(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> None:
    """W += scaling * B A, summed in fp32 and rounded once."""
    wide = weight_OI.float()  # no copy if already fp32
    wide.addmm_(b_OR.to(wide), a_RI.to(wide), alpha=scaling)
    weight_OI.copy_(wide)

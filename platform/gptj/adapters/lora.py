"""LoRA in a model: linear layers with frozen weights become frozen weights and two small matrices.

A linear layer keeps its parameters' names, so that checkpoints of the base model fit an adapted
one; A and B are beside them, under PEFT's names (`…q_proj.lora_A.weight`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptj.adapters.config import TARGET_MODULES, LoRAConfig

if TYPE_CHECKING:
    from gptj.pretrained import GPTJPreTrainedModel

# Heads that a base model usually lacks, and that are trained with an adapter; by the model's class.
NEW_HEADS = {
    "GPTJForSequenceClassification": ("score",),
    "GPTJForQuestionAnswering": ("qa_outputs",),
}


class LoRALinear(nn.Linear):
    """W x + b + scaling * B A dropout(x), with W and b of the layer that it replaces.

    A (rank, in) begins as nn.Linear's weights do (Kaiming-uniform with a = sqrt 5, as PEFT's), and
    B (out, rank) with 0: a new adapter changes nothing.
    """

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make weights
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        place = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.scaling = config.scaling
        self.lora_dropout = nn.Dropout(config.dropout)
        self.lora_A = nn.Linear(self.in_features, config.rank, bias=False, **place)
        self.lora_B = nn.Linear(config.rank, self.out_features, bias=False, **place)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.lora_B(self.lora_A(self.lora_dropout(x)))
        return F.linear(x, self.weight, self.bias) + added * self.scaling

    def merged(self) -> nn.Linear:
        """The plain layer that computes the same; it has this one's weights, changed in place."""
        add_product(self.weight, self.lora_A.weight, self.lora_B.weight, self.scaling)
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        return linear


def add_lora(model: GPTJPreTrainedModel, config: LoRAConfig) -> None:
    """Freeze a model, and put A and B into its target modules; they and saved heads are trained.

    ValueError if it has an adapter already, or lacks a head that is to be saved.
    """
    if model.adapter is not None:
        raise ValueError("the model has an adapter already; remedy: merge it first (merge_lora)")
    for head in config.modules_to_save:
        if not hasattr(model, head):
            raise ValueError(f"modules_to_save: a {type(model).__name__} has no {head}")
        if head == "lm_head" and model.config.tie_word_embeddings:
            raise ValueError("modules_to_save: lm_head is tied to the embedding, which is frozen")
    model.requires_grad_(False)
    for block in model.base_model.get_submodule("h").children():
        for parent in (block.attn, block.mlp):
            for name in TARGET_MODULES:
                if name in config.target_modules and hasattr(parent, name):
                    setattr(parent, name, LoRALinear(getattr(parent, name), config))
    for head in config.modules_to_save:
        model.get_submodule(head).requires_grad_(True)
    model.adapter = config


def adapter_parameters(model: GPTJPreTrainedModel) -> dict[str, nn.Parameter]:
    """What an adapter consists of, by the model's names: A, B, and the heads that are saved."""
    heads = tuple(f"{head}." for head in model.adapter.modules_to_save) if model.adapter else ()
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name or name.startswith(heads)
    }


def merge_lora(model: GPTJPreTrainedModel) -> None:
    """Add the adapter to the weights, which it changes; afterwards the model is a plain one.

    Nothing happens to a model without one.
    """
    if model.adapter is None:
        return
    for parent in [module for module in model.modules() if not isinstance(module, LoRALinear)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.merged())
    model.adapter = None
    model.requires_grad_(True)


@torch.no_grad()
def add_product(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> None:
    """W += scaling * B A, summed in fp32 and rounded once."""
    wide = weight_OI.float()  # itself, if it is fp32
    wide.addmm_(b_OR.to(wide), a_RI.to(wide), alpha=scaling)
    weight_OI.copy_(wide)

"""Adapters made by PEFT on transformers' GPT-J, and the models that they make of a base."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from gptj import GPTJForCausalLM
from gptj.adapters.lora import merge_lora
from gptj.adapters.stored import put_adapter, read_adapter
from gptj.checkpoints.folder import ModelFolder
from gptj.engine.adapter_weights import lora_weights
from gptj.engine.runners.lora import MAX_RANK, LoRAWeights
from gptj.environment.extras import Extra

peft = Extra("peft", "adapters to compare ours with")  # takes seconds to import

# Kinds of adapters: on some modules or all, of several ranks, with both scalings.
KINDS: dict[str, dict[str, Any]] = {
    "queries": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "everything": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "use_rslora": True},
    "mlp": {"r": 1, "lora_alpha": 4, "target_modules": ["fc_in", "fc_out"]},
    "rank 64": {"r": 64, "lora_alpha": 64, "target_modules": ["k_proj", "out_proj"]},
}


@dataclass(frozen=True)
class Made:
    """An adapter in PEFT's format."""

    folder: Path
    theirs: Any  # PEFT's model with it
    merged: GPTJForCausalLM  # ours

    def weights(self) -> LoRAWeights:
        with ModelFolder.open(self.folder, weights=True) as folder:
            return lora_weights(read_adapter(folder), self.merged.config, MAX_RANK)


def make_adapter(base: GPTJForCausalLM, at: Path, seed: int = 0, **settings: Any) -> Made:
    """Random A and B, large enough to change outputs."""
    base.save_pretrained(at / "base")
    theirs = transformers.GPTJForCausalLM.from_pretrained(at / "base").eval()
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    model = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(at / "adapter")
    merged = copy.deepcopy(base)
    with ModelFolder.open(at / "adapter", weights=True) as folder:
        put_adapter(merged, read_adapter(folder))
    merge_lora(merged)
    return Made(at / "adapter", model, merged.eval())

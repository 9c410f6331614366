"""A LoRA adapter's settings: ours, and conversion from and to PEFT's `adapter_config.json`.

Method: Hu et al., "LoRA", 2021, https://arxiv.org/abs/2106.09685; rsLoRA's scaling:
Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

# A block's linear layers, in the model's order.
TARGET_MODULES = ("k_proj", "v_proj", "q_proj", "out_proj", "fc_in", "fc_out")
HEADS = ("lm_head", "score", "qa_outputs")

# Fields of PEFT's configuration that we read, and those without effect on a trained adapter. Any
# other field that is set is rejected: it would change what the adapter computes.
_READ = frozenset(
    {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"}
    | {"use_rslora", "init_lora_weights"}
)
_WITHOUT_EFFECT = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core"}
    | {"peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"}
)
# Initialisations that do not change the base model's weights.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
# A module in all blocks or, with a number, in one.
_PATH = re.compile(
    r"(?:(?:transformer\.)?h\.(?P<layer>\d{1,4})\.)?(?:(?:attn|mlp)\.)?(?P<name>\w+)"
)


@dataclass(frozen=True)
class LoRAConfig:
    """A LoRA adapter's shape and scaling.

    Attributes:
        rank: columns of B and rows of A.
        alpha: B A x is scaled by alpha / rank.
        dropout: probability of zeroing an input of A during training.
        target_modules: each block's linear layers that get A and B.
        rslora: scale by alpha / sqrt(rank) instead.
        modules_to_save: heads that are trained in full and stored with the adapter.

    Raises:
        ValueError: naming the value and the valid ones.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("v_proj", "q_proj")
    rslora: bool = False
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank must be a whole number of 1 or more, got {self.rank!r}")
        if not _is_number(self.alpha) or not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be a positive number, got {self.alpha!r}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if not self.target_modules:
            raise ValueError(f"target_modules is empty; choose from {', '.join(TARGET_MODULES)}")
        _check_names("target_modules", self.target_modules, TARGET_MODULES)
        _check_names("modules_to_save", self.modules_to_save, HEADS)
        for name, order in (("target_modules", TARGET_MODULES), ("modules_to_save", HEADS)):
            given = getattr(self, name)
            object.__setattr__(self, name, tuple(each for each in order if each in given))

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> LoRAConfig:
        """From PEFT's fields. ValueError if one is invalid, or would change what we compute."""
        if fields.get("peft_type") != "LORA":
            raise ValueError(
                f"peft_type is {shown(fields.get('peft_type'))}, but only LORA is supported"
            )
        for name, value in fields.items():
            if name not in _READ | _WITHOUT_EFFECT and not _is_unset(name, value):
                raise ValueError(f"{name}={shown(value)} is not supported")
        start = fields.get("init_lora_weights")
        if not any(start is each or start == each for each in _INITIALISATIONS):
            raise ValueError(
                f"init_lora_weights={shown(start)} is not supported: it changes the base model"
            )
        if type(fields.get("use_rslora", False)) is not bool:
            raise ValueError(f"use_rslora must be true or false, got {shown(fields['use_rslora'])}")
        return cls(
            rank=fields.get("r", 8),
            alpha=fields.get("lora_alpha", 8),
            dropout=fields.get("lora_dropout", 0.0),
            target_modules=_targets(fields.get("target_modules")),
            rslora=fields.get("use_rslora", False),
            modules_to_save=_saved(fields.get("modules_to_save")),
        )

    def to_peft(self) -> dict[str, Any]:
        """The same adapter as PEFT's fields; the others have their defaults."""
        whole = float(self.alpha).is_integer()
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": int(self.alpha) if whole else self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.target_modules),
            "modules_to_save": list(self.modules_to_save) or None,
            "use_rslora": self.rslora,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "inference_mode": True,
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_names(field: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{field}: {shown(name)} is not one of {', '.join(known)}")


def _is_unset(name: str, value: Any) -> bool:
    if name == "bias":
        return bool(value == "none")
    return value is None or value is False or (isinstance(value, dict | list | str) and not value)


def _targets(value: Any) -> tuple[str, ...]:
    """Names of a block's layers, from PEFT's list of path suffixes."""
    if value == "all-linear":
        return TARGET_MODULES
    if isinstance(value, str):
        raise ValueError(
            f"target_modules={shown(value)} is a pattern, which is not supported; remedy: use a "
            f"list of {', '.join(TARGET_MODULES)}"
        )
    layers: dict[str, set[int]] = {}  # blocks by module, where named one by one
    names = []
    for path in _strings("target_modules", value):
        match = _PATH.fullmatch(path)
        names.append(path if match is None else match["name"])
        if match is not None and match["layer"] is not None:
            layers.setdefault(match["name"], set()).add(int(match["layer"]))
    count = max(map(len, layers.values()), default=0)
    if any(each != set(range(count)) for each in layers.values()):
        raise ValueError("target_modules names modules of some layers only, which is not supported")
    return tuple(names)


def _saved(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    # PEFT also guesses "classifier" as the name of a classification head.
    return tuple(name for name in _strings("modules_to_save", value) if name != "classifier")


def _strings(field: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{field} must be a list of names, got {shown(value)}")
    return tuple(value)

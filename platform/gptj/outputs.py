"""Outputs of forward: named fields that also unpack like Hugging Face's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from gptj.kv_cache import KVCache


@dataclass
class ModelOutput:
    """Fields by name, by key (`output["logits"]`), or by index among those that are not None."""

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.keys())

    def keys(self) -> list[str]:
        return [each.name for each in fields(self) if getattr(self, each.name) is not None]

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass
class BaseModelOutput(ModelOutput):
    last_hidden_state: Tensor  # (B, L, D), after the last norm
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # n_layer + 1 of (B, L, D)
    attentions: tuple[Tensor, ...] | None = None  # n_layer of (B, H, L, S)


@dataclass
class CausalLMOutput(ModelOutput):
    loss: Tensor | None = None  # (), fp32
    logits: Tensor | None = None  # (B, L, V)
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class GenerateOutput(ModelOutput):
    """The result of generate with return_dict_in_generate; R = B * num_return_sequences."""

    sequences: Tensor  # (R, L + new)
    sequences_scores: Tensor | None = None  # (R), for beams: length-penalized
    # Per step: logits (R, V), or for beams log-probabilities (B * num_beams, V), after penalties,
    # temperature, top_k and so on.
    scores: tuple[Tensor, ...] | None = None
    # (R, new), for beams: the row of `scores` that each token came from, -1 after the end.
    beam_indices: Tensor | None = None
    past_key_values: KVCache | None = None


@dataclass
class SequenceClassifierOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None  # (B, num_labels)
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringOutput(ModelOutput):
    loss: Tensor | None = None
    start_logits: Tensor | None = None  # (B, L)
    end_logits: Tensor | None = None  # (B, L)
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

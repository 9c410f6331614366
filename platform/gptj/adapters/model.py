"""What adapters need of a model; GPTJPreTrainedModel, which is built on them, has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import nn

from gptj.adapters.config import LoRAConfig


class TiedConfig(Protocol):
    @property
    def tie_word_embeddings(self) -> bool: ...


class AdaptableModel(Protocol):
    """A module with a base model, whose blocks are in `h`.

    Attributes:
        adapter: unmerged; None: none.
        base_model: the model without its head; itself, if it has none.
        base_model_prefix: the base model's name in the model.
    """

    adapter: LoRAConfig | None
    base_model_prefix: str

    @property
    def config(self) -> TiedConfig: ...

    @property
    def base_model(self) -> AdaptableModel: ...

    def get_submodule(self, target: str) -> nn.Module: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def requires_grad_(self, requires_grad: bool = True) -> nn.Module: ...

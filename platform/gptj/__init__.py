"""GPT-J in PyTorch: model, tokenizer, training and serving parts."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptj.config import GPTJConfig
    from gptj.model import (
        GPTJForCausalLM,
        GPTJForQuestionAnswering,
        GPTJForSequenceClassification,
        GPTJModel,
    )
    from gptj.tokenizer import GPTJTokenizer

__version__ = "0.1.0"  # as in pyproject.toml

__all__ = [
    "GPTJConfig",
    "GPTJForCausalLM",
    "GPTJForQuestionAnswering",
    "GPTJForSequenceClassification",
    "GPTJModel",
    "GPTJTokenizer",
    "__version__",
]

_MODULES = {"GPTJConfig": "gptj.config", "GPTJTokenizer": "gptj.tokenizer"}


def __getattr__(name: str) -> Any:
    """Import a class on first use.

    Ray Serve's proxy uses parts of this package and restarts within a second without PyTorch.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES.get(name, "gptj.model")), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

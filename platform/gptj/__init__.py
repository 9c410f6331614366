"""GPT-J in PyTorch: model, tokenizer, training and serving parts."""

from gptj.config import GPTJConfig
from gptj.model import (
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
)
from gptj.tokenizer import GPTJTokenizer

__version__ = "0.1.0"  # that of pyproject.toml

__all__ = [
    "GPTJConfig",
    "GPTJForCausalLM",
    "GPTJForQuestionAnswering",
    "GPTJForSequenceClassification",
    "GPTJModel",
    "GPTJTokenizer",
    "__version__",
]

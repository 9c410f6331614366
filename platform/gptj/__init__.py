"""GPT-J in PyTorch: model, tokenizer, training and serving parts."""

from gptj.config import GPTJConfig
from gptj.model import (
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
)

__all__ = [
    "GPTJConfig",
    "GPTJForCausalLM",
    "GPTJForQuestionAnswering",
    "GPTJForSequenceClassification",
    "GPTJModel",
]

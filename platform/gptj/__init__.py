"""GPT-J in PyTorch: model, tokenizer, training and serving parts."""

from gptj.config import GPTJConfig
from gptj.model import (
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
)
from gptj.tokenizer import GPTJTokenizer

__all__ = [
    "GPTJConfig",
    "GPTJForCausalLM",
    "GPTJForQuestionAnswering",
    "GPTJForSequenceClassification",
    "GPTJModel",
    "GPTJTokenizer",
]

"""Language modelling: predict the next token; measured by perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from gptj.data.causal_lm import CausalLMData
from gptj.data.documents import messages_of
from gptj.data.labels import LabelSet
from gptj.data.prepared import Prepared
from gptj.data.rows import Row
from gptj.model import GPTJForCausalLM
from gptj.tokenizer import GPTJTokenizer
from gptj.training.sections import DataSettings
from gptj.training.tasks.base import Part, Task


class CausalLM(Task[CausalLMData]):
    name = "causal-lm"
    head = GPTJForCausalLM
    text_columns = ("text", "prompt", "completion")  # besides messages
    sample = "sample://documentation"
    own_settings = ("packing",)

    def texts(self, row: Row) -> list[str]:
        if "messages" not in row.values:
            return super().texts(row)
        contents = (message.get("content") for message in messages_of(row))
        return [content for content in contents if isinstance(content, str)]

    def read(
        self,
        rows: Iterable[Row],
        tokenizer: GPTJTokenizer,
        options: DataSettings,
        labels: LabelSet | None = None,
    ) -> CausalLMData:
        return CausalLMData(rows, tokenizer, options.sequence_length, options.packing)

    def write(
        self,
        folder: Path,
        prepared: Prepared,
        tokenizer: GPTJTokenizer,
        options: DataSettings,
        labels: LabelSet | None = None,
    ) -> None:
        CausalLMData.write(folder, prepared, tokenizer, options.sequence_length, options.packing)

    def load(self, folder: Path) -> CausalLMData:
        return CausalLMData.load(folder)

    def forward(self, model: nn.Module, batch: dict[str, Tensor], items: int) -> tuple[Tensor, Any]:
        # Not mean * items: without counted tokens the mean is undefined.
        output = model(**batch, use_cache=False, num_items_in_batch=1, skip_logits=True)
        return output.loss, output

    def metrics(self, data: CausalLMData, whole: Part) -> dict[str, float]:
        """`loss`, `perplexity`, `tokens` (predicted ones)."""
        loss = whole.loss / whole.items
        return {"loss": loss, "perplexity": _exp(loss), "tokens": whole.items}


def unigram_perplexity(train: CausalLMData, evaluation: CausalLMData) -> float:
    """Perplexity of a unigram model, over the tokens that a model is evaluated on.

    Uses the training tokens' frequencies with add-one smoothing.
    """
    if train.vocabulary != evaluation.vocabulary:
        raise ValueError(
            f"both need one tokenizer, got ids below {train.vocabulary} and "
            f"below {evaluation.vocabulary}"
        )
    counts = np.bincount(train.tokens, minlength=train.vocabulary) + 1.0
    losses = -np.log(counts / counts.sum())
    return math.exp(losses[evaluation.predicted_tokens().numpy()].mean())


def _exp(loss: float) -> float:
    """exp(loss), or infinity if that overflows."""
    return math.exp(loss) if loss < math.log(np.finfo(float).max) else math.inf

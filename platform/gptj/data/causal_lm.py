"""Language modelling: rows with `text` in, full sequences of token ids out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptj.data.examples import (
    Ids,
    count_real_tokens,
    groups,
    load_arrays,
    padded,
    padding_id,
    save_arrays,
)
from gptj.data.rows import DataError, Row
from gptj.model import IGNORED_LABEL
from gptj.tokenizer import GPTJTokenizer

DOCUMENTS_AT_ONCE = 64  # they may be long


class CausalLMData:
    """Documents one after the other, each followed by eos, cut into rows of `sequence_length`.

    Only the last row may be shorter; it is left out if it has nothing to predict.

    Args:
        rows: with the column `text`, a document each.
        sequence_length: tokens of an example, 2 or more.

    Raises:
        DataError: if a text is no text, or there are fewer than two tokens.
        ValueError: if the tokenizer has no eos token, or sequence_length is below 2.
    """

    labels = None  # there are none but the tokens

    def __init__(self, rows: Iterable[Row], tokenizer: GPTJTokenizer, sequence_length: int) -> None:
        if sequence_length < 2:
            raise ValueError(f"sequence_length must be 2 or more, got {sequence_length}")
        eos = tokenizer.eos_token_id
        if eos is None:
            raise ValueError("the tokenizer has no eos token to end documents with")
        self.sequence_length = sequence_length
        self.vocabulary = len(tokenizer)
        self._padding = padding_id(tokenizer)
        documents = [np.empty(0, np.int32)]
        source = ""
        for group in groups(rows, DOCUMENTS_AT_ONCE):
            texts = [row.text("text") for row in group]
            encoded = tokenizer(texts, return_attention_mask=False)["input_ids"]
            documents += [np.array([*ids, eos], dtype=np.int32) for ids in encoded]
            source = group[0].source
        tokens = np.concatenate(documents)
        if len(tokens) % sequence_length == 1:
            tokens = tokens[:-1]
        if not len(tokens):
            raise DataError(f"{source or 'the data'}: fewer than two tokens to learn from")
        self.tokens: Ids = tokens

    def save(self, folder: Path) -> None:
        fields = {
            "sequence_length": self.sequence_length,
            "vocabulary": self.vocabulary,
            "padding": self._padding,
        }
        save_arrays(folder, {"tokens": self.tokens}, fields)

    @classmethod
    def load(cls, folder: Path) -> CausalLMData:
        """What `save` has written, memory-mapped."""
        arrays, fields = load_arrays(folder)
        self = cls.__new__(cls)
        self.tokens = arrays["tokens"]
        self.sequence_length, self.vocabulary = fields["sequence_length"], fields["vocabulary"]
        self._padding = fields["padding"]
        return self

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.sequence_length)

    def __getitem__(self, index: int) -> Ids:
        """The token ids (sequence_length) of an example; of the last one perhaps fewer."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start = index * self.sequence_length
        return self.tokens[start : start + self.sequence_length]

    def first(self, count: int) -> CausalLMData:
        """The same data without what follows its first `count` examples."""
        part = copy.copy(self)
        part.tokens = self.tokens[: count * self.sequence_length]
        return part

    def collate(self, examples: Sequence[Ids]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels` (B, L) of int64; padding is never a label."""
        batch = padded(examples, self._padding, self.sequence_length)
        hidden = batch["attention_mask"] == 0
        batch["labels"] = batch["input_ids"].masked_fill(hidden, IGNORED_LABEL)
        return batch

    def count_items(self, batch: dict[str, Tensor]) -> int:
        """Tokens that the loss averages over: a row's first is predicted by nothing."""
        return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())

    def count_tokens(self, batch: dict[str, Tensor]) -> int:
        return count_real_tokens(batch)

    def summary(self) -> str:
        return f"{len(self.tokens)} tokens in {len(self)} rows of {self.sequence_length}"

    def predicted_tokens(self) -> Tensor:
        """All tokens that the loss counts, over the whole data set."""
        counted = np.ones(len(self.tokens), dtype=bool)
        counted[:: self.sequence_length] = False
        return torch.from_numpy(self.tokens[counted].astype(np.int64))

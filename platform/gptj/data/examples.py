"""Shared by all data sets: token ids in one array, in memory or memory-mapped, and padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gptj.data.arrays import Array
from gptj.tokenizer import GPTJTokenizer

PAD_MULTIPLE = 8  # of batch lengths: suits tensor cores and keeps the number of shapes small
TOKENIZED_AT_ONCE = 1000  # texts

Item = TypeVar("Item")
Ids = np.ndarray[Any, np.dtype[np.int32]]


class TokenLists:
    """Lists of token ids in one array, 4 bytes per token.

    List i is ids[ends[i]:ends[i + 1]].
    """

    def __init__(self, ids: Ids, ends: Array) -> None:
        self.ids = ids
        self.ends = ends

    @classmethod
    def of(cls, lists: Sequence[Ids]) -> TokenLists:
        ids = np.concatenate([np.empty(0, np.int32), *lists])
        return cls(ids, np.cumsum([0, *map(len, lists)]))

    @property
    def longest(self) -> int:
        """Tokens of the longest list."""
        return int(np.diff(self.ends).max())

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Ids:
        return self.ids[self.ends[index] : self.ends[index + 1]]


def compact(ids: Sequence[int]) -> Ids:
    """Convert a list of ids (36 bytes per token) to an array (4 bytes per token)."""
    return np.array(ids, dtype=np.int32)


def padded(
    lists: Sequence[Sequence[int] | Ids], padding: int, limit: int | None = None
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (B, L) int64, padded on the right.

    L is the longest length; with a `limit`, rounded up to a multiple of 8 but at most to `limit`.
    """
    length = longest = max(len(ids) for ids in lists)
    if limit is not None:
        length = max(longest, min(limit, -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE))
    input_ids = torch.full((len(lists), length), padding)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(lists):
        input_ids[row, : len(ids)] = torch.from_numpy(np.array(ids, dtype=np.int64))
        attention_mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def padding_id(tokenizer: GPTJTokenizer) -> int:
    """The padding id; any works, since padding is masked."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


def count_real_tokens(batch: dict[str, Tensor]) -> int:
    """Tokens of a batch that are not padding."""
    return int(batch["attention_mask"].sum())


def count_pairs(batch: dict[str, Tensor]) -> int:
    """The sum of the squared lengths of a batch's documents, without padding."""
    mask = batch["attention_mask"]
    if "cu_seqlens" in batch:  # padding counts as a document there
        before = torch.cat([torch.zeros(1, dtype=torch.long), mask.flatten().cumsum(0)])
        lengths = before[batch["cu_seqlens"].long()].diff()
    else:
        lengths = mask.sum(dim=1)
    return int((lengths**2).sum())


def groups(items: Iterable[Item], size: int = TOKENIZED_AT_ONCE) -> Iterator[list[Item]]:
    """The items in lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group

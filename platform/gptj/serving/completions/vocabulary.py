"""The ids of a model that stand for text, and the longest text of one."""

from __future__ import annotations

from dataclasses import dataclass

from gptj.tokenizer import GPTJTokenizer


@dataclass(frozen=True)
class Vocabulary:
    text_ids: frozenset[int]  # that stand for text
    unused_ids: tuple[int, ...]  # the model's other ids, which must not be generated
    longest: int  # bytes of an id's text

    @classmethod
    def of(cls, tokenizer: GPTJTokenizer, rows: int) -> Vocabulary:
        """For an embedding of `rows` rows, possibly more than the tokenizer has ids."""
        lengths = {}
        for token in set(range(rows)) - set(tokenizer.unused_ids):
            try:
                lengths[token] = len(tokenizer.token_bytes(token))
            except ValueError:  # unknown to the tokenizer
                continue
        unused = tuple(token for token in range(rows) if token not in lengths)
        return cls(frozenset(lengths), unused, max(lengths.values()))

    def least_tokens(self, text: str) -> int:
        """Lower bound on a text's number of tokens, without tokenizing it."""
        return -(-len(text.encode()) // self.longest)

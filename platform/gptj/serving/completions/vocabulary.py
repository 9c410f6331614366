"""What a model's ids stand for: which of them are text at all, and how much text one can be."""

from __future__ import annotations

from dataclasses import dataclass

from gptj.tokenizer import GPTJTokenizer


@dataclass(frozen=True)
class Vocabulary:
    text_ids: frozenset[int]  # those that stand for text
    unused_ids: tuple[int, ...]  # the model's other ids: never to be generated
    longest: int  # bytes of the longest id's text

    @classmethod
    def of(cls, tokenizer: GPTJTokenizer, rows: int) -> Vocabulary:
        """Of a model whose embedding has so many rows, which may be more than the tokenizer's."""
        lengths = {}
        for token in set(range(rows)) - set(tokenizer.unused_ids):
            try:
                lengths[token] = len(tokenizer.token_bytes(token))
            except ValueError:  # a row that the tokenizer does not know
                continue
        unused = tuple(token for token in range(rows) if token not in lengths)
        return cls(frozenset(lengths), unused, max(lengths.values()))

    def least_tokens(self, text: str) -> int:
        """So many tokens a text has at least: tells without tokenizing that one is too long."""
        return -(-len(text.encode()) // self.longest)

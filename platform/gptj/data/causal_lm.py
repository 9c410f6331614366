"""Language modelling: rows (see gptj.data.documents) in, packed rows of token ids out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptj.data.arrays import Array, ArrayWriter, load_arrays, writing_arrays
from gptj.data.documents import Documents, Mask, read_documents, windows
from gptj.data.examples import Ids, count_real_tokens, padded, padding_id
from gptj.data.packing import WINDOW, Packed, Packing, pack
from gptj.data.prepared import Prepared
from gptj.data.rows import DataError, Row
from gptj.data.shards import documents_in
from gptj.layers.linear_cross_entropy import IGNORED_LABEL
from gptj.tokenizer import GPTJTokenizer


class PackedRow(NamedTuple):
    """An example: concatenated documents."""

    ids: Ids  # (L)
    lengths: Array  # of its documents; they sum to L
    learned: Mask | None  # (L); None: all


class CausalLMData:
    """Documents, each ended by eos (chats by their template), in rows of `sequence_length` tokens.

    With best_fit, a row holds whole documents, each computed independently. A longer text is split
    into documents that fill a row; a longer prompt and completion lose the beginning of the prompt,
    of which at least half a row is kept, then the end of the completion. Documents with nothing to
    learn, such as empty texts, are dropped.

    With concatenate, the stream is cut wherever a row is full, and documents attend to those before
    them in the row. Only the last row may be shorter.

    Args:
        rows: with the column `text`, one document each; with `prompt` and `completion`, of which
            only the completion is learned; or with `messages`, of which only the assistant's are.
        sequence_length: most tokens per row, 2 or more.
        packing: best_fit, concatenate, or none for one document per row.

    Raises:
        DataError: if a row does not fit, or there is nothing to learn.
        ValueError: if the tokenizer has no eos token, or sequence_length is below 2.
    """

    labels = None  # only classifiers have them

    def __init__(
        self,
        rows: Iterable[Row],
        tokenizer: GPTJTokenizer,
        sequence_length: int,
        packing: Packing = "concatenate",
    ) -> None:
        source = "the data"

        def noted() -> Iterator[Row]:
            nonlocal source
            for row in rows:
                source = row.source
                yield row

        documents = windows(read_documents(noted(), tokenizer), WINDOW)
        self._hold(documents, tokenizer, sequence_length, packing)
        if not len(self.tokens):
            raise _nothing_in(source)

    def _hold(
        self,
        windows: Iterable[Documents],
        tokenizer: GPTJTokenizer,
        sequence_length: int,
        packing: Packing,
        most: int | None = None,
    ) -> None:
        """Pack windows in memory, until there are `most` examples."""
        _check_length(sequence_length)
        self.sequence_length = sequence_length
        self.packing = packing
        self.vocabulary = tokenizer.rows_needed
        self._padding = padding_id(tokenizer)
        parts: list[Packed] = []
        examples = 0
        for part in pack(windows, sequence_length, packing):
            parts.append(part)
            examples += len(part.row_ends) - 1
            if most is not None and examples >= most:
                break
        packed = Packed.joined(parts)
        self.tokens, self.row_ends, self.document_ends, self.learned, self.cut = packed

    @classmethod
    def start_of(
        cls,
        chunks: Iterable[Sequence[Row]],
        tokenizer: GPTJTokenizer,
        sequence_length: int,
        packing: Packing,
        count: int,
    ) -> CausalLMData:
        """The first `count` examples of `write`'s, reading no more chunks than they need.

        Args:
            chunks: rows, those of a shard at a time (gptj.data.preparing.chunks).
        """
        self = cls.__new__(cls)
        documents = (Documents.of(list(read_documents(rows, tokenizer))) for rows in chunks)
        self._hold(documents, tokenizer, sequence_length, packing, count)
        return self.first(count)

    @classmethod
    def write(
        cls,
        folder: Path,
        prepared: Prepared,
        tokenizer: GPTJTokenizer,
        sequence_length: int,
        packing: Packing = "concatenate",
    ) -> None:
        """Pack tokenized documents into a new folder, for `load`; holds one shard in memory.

        Raises:
            DataError: if they were prepared with another tokenizer, or there is nothing to learn.
            CheckpointError: for a damaged shard.
        """
        prepared.check("causal-lm", tokenizer)
        _check_length(sequence_length)
        fields: dict[str, Any] = {
            "sequence_length": sequence_length,
            "packing": packing,
            "vocabulary": tokenizer.rows_needed,
            "padding": padding_id(tokenizer),
            "cut": 0,
        }
        with writing_arrays(folder, fields) as arrays:
            documents = (documents_in(table.columns) for table in prepared.tables())
            for part in pack(documents, sequence_length, packing):
                _append_learned(arrays, part)
                arrays.append("tokens", part.ids)
                arrays.append_ends("row_ends", np.diff(part.row_ends))
                arrays.append_ends("document_ends", np.diff(part.document_ends))
                fields["cut"] += part.cut
            if not arrays.length("tokens"):
                raise _nothing_in(prepared.source)

    @classmethod
    def load(cls, folder: Path) -> CausalLMData:
        """Memory-map data written by `write`."""
        arrays, fields = load_arrays(folder)
        self = cls.__new__(cls)
        self.tokens, self.learned = arrays["tokens"], arrays.get("learned")
        self.row_ends, self.document_ends = arrays["row_ends"], arrays["document_ends"]
        self.sequence_length, self.vocabulary = fields["sequence_length"], fields["vocabulary"]
        self.packing, self.cut = fields["packing"], fields["cut"]
        self._padding = fields["padding"]
        return self

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(np.diff(self.row_ends).max())

    def __len__(self) -> int:
        return len(self.row_ends) - 1

    def __getitem__(self, index: int) -> PackedRow:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start, end = self.row_ends[index : index + 2]
        first, last = np.searchsorted(self.document_ends, (start, end))
        return PackedRow(
            self.tokens[start:end],
            np.diff(self.document_ends[first : last + 1]),
            None if self.learned is None else self.learned[start:end],
        )

    def first(self, count: int) -> CausalLMData:
        """The first `count` examples."""
        part = copy.copy(self)
        part.row_ends = self.row_ends[: count + 1]
        end = part.row_ends[-1]
        part.document_ends = self.document_ends[self.document_ends <= end]
        part.tokens = self.tokens[:end]
        part.learned = None if self.learned is None else self.learned[:end]
        return part

    def collate(self, examples: Sequence[PackedRow]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels` (B, L) int64, and perhaps `cu_seqlens`.

        Padding, prompts and documents' first tokens are masked in the labels. `cu_seqlens`
        (N + 1) int32 is included if any row has several documents: their boundaries in the
        flattened batch; a row's padding counts as a document.
        """
        batch = padded([row.ids for row in examples], self._padding, self.sequence_length)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
        length = labels.shape[1]
        ends = [0]
        for number, row in enumerate(examples):
            inner = np.cumsum(row.lengths)
            labels[number, torch.from_numpy(inner[:-1])] = IGNORED_LABEL
            if row.learned is not None:
                labels[number, : len(row.ids)][torch.from_numpy(~row.learned)] = IGNORED_LABEL
            ends += (number * length + inner).tolist()
            if inner[-1] < length:
                ends.append((number + 1) * length)
        batch["labels"] = labels
        if any(len(row.lengths) > 1 for row in examples):
            batch["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
        return batch

    def count_items(self, batch: dict[str, Tensor]) -> int:
        """Tokens that the loss averages over: all labels but the first, which nothing predicts."""
        return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())

    def count_tokens(self, batch: dict[str, Tensor]) -> int:
        return count_real_tokens(batch)

    @property
    def useful_share(self) -> float:
        """Share of the rows' capacity that tokens fill."""
        return len(self.tokens) / (len(self) * self.sequence_length)

    def summary(self) -> str:
        rows = f"{len(self.tokens)} tokens in {len(self)} rows of {self.sequence_length}"
        if self.packing != "concatenate":
            rows = f"{len(self.document_ends) - 1} documents, {rows}"
        rows += f", {self.useful_share:.1%} full"
        if self.learned is not None:
            rows += f"; {int(self.learned.sum())} of them are learned"
        if self.cut:
            rows += f"; {self.cut} documents were longer than a row and cut"
        return rows

    def predicted_tokens(self) -> Tensor:
        """All tokens that the loss counts, over the whole data set."""
        counted = np.ones(len(self.tokens), bool) if self.learned is None else self.learned.copy()
        counted[self.document_ends[:-1]] = False
        return torch.from_numpy(self.tokens[counted].astype(np.int64))


def _check_length(sequence_length: int) -> None:
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be 2 or more, got {sequence_length}")


def _nothing_in(source: str) -> DataError:
    return DataError(f"{source}: fewer than two tokens to learn from")


def _append_learned(arrays: ArrayWriter, part: Packed) -> None:
    """Append the mask, once any token is masked; call before appending the tokens."""
    before, added = arrays.length("tokens"), len(part.ids)
    if part.learned is None and not arrays.length("learned"):
        return
    while (missing := before - arrays.length("learned")) > 0:
        arrays.append("learned", np.ones(min(missing, WINDOW), bool))
    arrays.append("learned", np.ones(added, bool) if part.learned is None else part.learned)

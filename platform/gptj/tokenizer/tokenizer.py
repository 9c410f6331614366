"""The tokenizer's public interface, with Hugging Face's arguments and results.

Built on the `tokenizers` library. Truncation and padding are done here, because that library keeps
them as mutable settings, which concurrent calls would overwrite.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from operator import index as whole_number
from pathlib import Path
from reprlib import repr as shown
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import AddedToken, Encoding, Tokenizer, pre_tokenizers, trainers

from gptj import storage
from gptj.adapters.base import Base
from gptj.checkpoints.folder import ADAPTER_FILES, TOKENIZER_FILES, ModelFolder
from gptj.errors import CheckpointError, NoTokenizerError
from gptj.storage.addresses import normalized
from gptj.tokenizer.bpe import (
    BYTE_OF_CHARACTER,
    END_OF_TEXT,
    EXTRA,
    EXTRA_TOKENS,
    add_tokens,
    byte_level_bpe,
    check_byte_level,
)
from gptj.tokenizer.files import TokenizerFiles
from gptj.tokenizer.inputs import (
    STRATEGIES,
    Padding,
    Side,
    Truncation,
    as_lists,
    check_choice,
    checked_texts,
)
from gptj.tokenizer.rows import Encoded, Window, as_arrays, cut, truncate_pair

Ids = int | np.integer[Any] | Sequence[int] | torch.Tensor | np.ndarray[Any, Any]

# Those that we use ourselves; others are for chat templates.
MAIN_TOKENS = ("bos_token", "eos_token", "pad_token")


class GPTJTokenizer:
    """A byte-level BPE tokenizer with the special tokens of a model.

    Args:
        tokenizer: the vocabulary, merges and added tokens; its truncation and padding are disabled.
        bos_token, eos_token, pad_token: entries of the vocabulary, or None.
        other_tokens: further special tokens by name, such as sep_token, for chat templates;
            default: unk_token is eos_token.
        model_max_length: the model's longest input, in tokens; None if unknown.
        padding_side: the default side of padding.
        chat_template: Jinja for gptj.chat, or several by name; None: no template.

    Raises:
        ValueError: if an entry is neither an added token nor of byte-level BPE's characters.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        bos_token: str | None = END_OF_TEXT,
        eos_token: str | None = END_OF_TEXT,
        pad_token: str | None = None,
        model_max_length: int | None = None,
        padding_side: Side = "right",
        chat_template: str | dict[str, str] | None = None,
        other_tokens: Mapping[str, str] | None = None,
    ) -> None:
        check_byte_level(tokenizer)
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.pad_token = pad_token
        self.model_max_length = model_max_length
        self.padding_side: Side = padding_side
        self.chat_template = chat_template
        if other_tokens is None:
            other_tokens = {} if eos_token is None else {"unk_token": eos_token}
        self.other_tokens = dict(other_tokens)

    @classmethod
    def from_pretrained(
        cls,
        address: str | Path,
        *,
        revision: str | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        model_max_length: int | None = None,
        padding_side: Side | None = None,
    ) -> GPTJTokenizer:
        """Load tokenizer.json, or vocab and merges, from a folder, `s3://` address or hub id.

        An adapter without a tokenizer uses its base's.

        Args:
            revision: a branch, tag or commit of a hub id.
            bos_token, eos_token, pad_token, model_max_length, padding_side: override the folder's.

        Raises:
            NoTokenizerError: (a FileNotFoundError) if neither exists.
            ValueError: if a file cannot be parsed or does not match the folder's manifest.
        """
        given = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "pad_token": pad_token,
            "model_max_length": model_max_length,
            "padding_side": padding_side,
        }
        needed = (*TOKENIZER_FILES, *ADAPTER_FILES)
        with ModelFolder.open(address, revision=revision, files=needed) as folder:
            tokenizer = cls.from_folder(folder)
        for name, value in given.items():
            if value is not None:
                setattr(tokenizer, name, value)
        return tokenizer

    @classmethod
    def from_folder(cls, folder: ModelFolder) -> GPTJTokenizer:
        """The tokenizer of an open folder; see `from_pretrained`."""
        try:
            return cls.own(folder)
        except NoTokenizerError:
            if not folder.is_adapter:
                raise
            needed = (*TOKENIZER_FILES, *ADAPTER_FILES)
            with Base.of(folder).open(folder.address, files=needed) as base:
                return cls.from_folder(base)

    @classmethod
    def own(cls, folder: ModelFolder) -> GPTJTokenizer:
        """The tokenizer in an open folder, without looking elsewhere; see `from_pretrained`."""
        found = TokenizerFiles.read(folder)
        tokens = {name: found.special_tokens.get(name) for name in MAIN_TOKENS}
        others = found.special_tokens.items() - tokens.items()
        try:
            return cls(
                found.tokenizer,
                **tokens,
                other_tokens=dict(sorted(others)),
                model_max_length=found.model_max_length,
                padding_side=found.padding_side,
                chat_template=found.chat_template,
            )
        except ValueError as error:
            raise ValueError(f"cannot use the tokenizer of {folder.address}: {error}") from error

    @classmethod
    def from_vocabulary(
        cls, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]
    ) -> GPTJTokenizer:
        """GPT-J's tokenizer from GPT-2's 50257 entries and merges: 143 extra tokens are added.

        ValueError if they do not match, or `<|endoftext|>` is missing.
        """
        if END_OF_TEXT not in vocabulary:
            raise ValueError(f"the vocabulary of {len(vocabulary)} entries lacks {END_OF_TEXT!r}")
        tokenizer = byte_level_bpe(vocabulary, merges)
        add_tokens(tokenizer, {END_OF_TEXT: vocabulary[END_OF_TEXT]}, special=True)
        extra = {f"<|extratoken_{n + 1}|>": len(vocabulary) + n for n in range(EXTRA_TOKENS)}
        add_tokens(tokenizer, extra, special=False)
        return cls(tokenizer, model_max_length=2048)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> GPTJTokenizer:
        """Learn a vocabulary of `vocab_size` entries from texts, for small models.

        They include the 256 bytes and `<|endoftext|>` (bos, eos and padding). The result is
        deterministic, and smaller if the texts have too few pairs to merge.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be several strings, got one; remedy: [text]")
        smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 1
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size must be at least {smallest} (256 bytes and {END_OF_TEXT}), "
                f"got {vocab_size}"
            )
        tokenizer = byte_level_bpe({}, [])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(checked_texts(texts), trainer)
        return cls(tokenizer, pad_token=END_OF_TEXT)

    def save_pretrained(self, address: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder, local or `s3://`."""
        folder = normalized(address)
        for name, content in self.files().items():
            storage.write_bytes(storage.join(folder, name), content)

    def files(self) -> dict[str, bytes]:
        """The files' content, as `from_pretrained`, ours and Hugging Face's, reads them."""
        settings: dict[str, Any] = {
            "tokenizer_class": "GPT2Tokenizer",
            # Hugging Face's class reads this, not tokenizer.json's.
            "add_prefix_space": getattr(self._tokenizer.pre_tokenizer, "add_prefix_space", False),
            "clean_up_tokenization_spaces": False,
            "padding_side": self.padding_side,
            **{name: getattr(self, name) for name in MAIN_TOKENS},
            "unk_token": None,
            **self.other_tokens,
        }
        if self.model_max_length is not None:
            settings["model_max_length"] = self.model_max_length
        if isinstance(self.chat_template, dict):
            settings["chat_template"] = [
                {"name": name, "template": source} for name, source in self.chat_template.items()
            ]
        elif self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        return {
            "tokenizer.json": self._tokenizer.to_str(pretty=True).encode(),
            "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        }

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def vocab_size(self) -> int:
        """Number of entries without added tokens, as in Hugging Face."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=False))

    @property
    def rows_needed(self) -> int:
        """One more than the largest id, as a model's embedding needs a row for each.

        More than `len(tokenizer)` if there are gaps between the ids.
        """
        return max(self._known_ids, default=-1) + 1

    def check_rows(self, rows: int, model: str) -> None:
        """CheckpointError, with an id and its token, if an embedding of `rows` rows is too small.

        Args:
            model: whose embedding it is, for the message.
        """
        if self.rows_needed > rows:
            number = self.rows_needed - 1
            raise CheckpointError(
                f"{model}: the tokenizer has an id {number} (for the token "
                f"{shown(self._tokenizer.id_to_token(number))}), but the model's vocab_size is "
                f"{rows}: ids must be below it"
            )

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens that have names, by name, as in Hugging Face."""
        tokens = {name: getattr(self, name) for name in MAIN_TOKENS}
        return {**{n: each for n, each in tokens.items() if each is not None}, **self.other_tokens}

    @property
    def bos_token_id(self) -> int | None:
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self._id(self.eos_token)

    @property
    def pad_token_id(self) -> int | None:
        return self._id(self.pad_token)

    @property
    def default_chat_template(self) -> str | None:
        """The template for chats without tools, if there are several."""
        if isinstance(self.chat_template, dict):
            return self.chat_template.get("default")
        return self.chat_template

    @cached_property
    def unused_ids(self) -> tuple[int, ...]:
        """Ids without text (`<|extratoken_…|>`), which must never be sampled."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        return tuple(
            sorted(i for token, i in vocabulary.items() if re.fullmatch(EXTRA, token) is not None)
        )

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        padding: bool | Padding = False,
        truncation: bool | Truncation | None = None,
        max_length: int | None = None,
        stride: int = 0,
        pad_to_multiple_of: int | None = None,
        padding_side: Side | None = None,
        return_tensors: Literal["pt", "np"] | None = None,
        return_attention_mask: bool = True,
        return_overflowing_tokens: bool = False,
        return_offsets_mapping: bool = False,
        return_sequence_ids: bool = False,
    ) -> Encoded:
        """Encode one or more texts, with Hugging Face's arguments and results.

        Args:
            text, text_pair: one or more texts; a pair is encoded as text, then text_pair.
            padding: to the batch's longest (True), or to max_length.
            truncation: "only_first", "only_second" or "longest_first" (True); None means True if
                max_length is given without padding.
            max_length: in tokens; default model_max_length.
            stride: tokens of overlap between consecutive windows.
            return_overflowing_tokens: return truncated tokens as further rows, and in
                `overflow_to_sample_mapping` the index of each row's text.
            return_offsets_mapping: (start, end) of each token, in characters of its own text.
            return_sequence_ids: 0 or 1 for each token of text or text_pair, None on padding.

        Returns:
            `input_ids`, `attention_mask` and what else was requested: lists or, with
            return_tensors, int64 tensors or arrays (B, L).

        Raises:
            ValueError: with the value and the remedy.
        """
        check_choice("padding", padding, (False, True, "longest", "max_length", "do_not_pad"))
        check_choice("truncation", truncation, (None, False, True, *STRATEGIES))
        check_choice("padding_side", padding_side, (None, "left", "right"))
        check_choice("return_tensors", return_tensors, (None, "pt", "np"))
        pads = padding not in (False, "do_not_pad")
        if truncation is None:
            truncation = max_length is not None and padding is False
        truncates = truncation not in (False, "do_not_truncate")
        strategy = truncation if isinstance(truncation, str) else "longest_first"
        firsts, seconds = as_lists(text, text_pair)
        if max_length is None:
            max_length = self.model_max_length
        elif max_length < 1:
            raise ValueError(f"max_length must be 1 or more, got {max_length}")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be 1 or more, got {pad_to_multiple_of}")
        limit = None
        if truncates:
            limit = max_length
            if limit is None:
                raise ValueError(
                    "truncation needs max_length: this tokenizer has no default; remedy: "
                    "max_length=N or tokenizer.model_max_length = model.config.n_positions"
                )
            if not 0 <= stride < limit:
                raise ValueError(f"stride must be in [0, max_length={limit}), got {stride}")
            if pads and pad_to_multiple_of is not None and limit % pad_to_multiple_of:
                raise ValueError(
                    f"max_length={limit} is not a multiple of "
                    f"pad_to_multiple_of={pad_to_multiple_of}"
                )
            if strategy == "only_second" and seconds is None:
                raise ValueError("truncation='only_second' needs text_pair; remedy: True")
        most = None if return_overflowing_tokens else 1  # windows of a text or pair
        if seconds is None:
            rows = [
                [Window(part) for part in cut(encoding, limit, stride)[:most]]
                for encoding in self._encode_all(firsts)
            ]
        else:
            rows = [
                list(islice(truncate_pair(first, second, limit, stride, strategy), most))
                for first, second in zip(
                    self._encode_all(firsts), self._encode_all(seconds), strict=True
                )
            ]
        flat = [window for windows in rows for window in windows]
        if pads:
            length = max_length if padding == "max_length" else None
            if padding == "max_length" and length is None:
                raise ValueError("padding='max_length' needs max_length: there is no default")
            self._pad(flat, length, pad_to_multiple_of, padding_side or self.padding_side)
        result = Encoded(input_ids=[window.ids for window in flat])
        if return_attention_mask:
            result["attention_mask"] = [window.mask for window in flat]
        if return_offsets_mapping:
            result["offset_mapping"] = [window.offsets for window in flat]
        if return_sequence_ids:
            result["sequence_ids"] = [window.sequence_ids for window in flat]
        if return_overflowing_tokens:
            result["overflow_to_sample_mapping"] = [
                sample for sample, windows in enumerate(rows) for _ in windows
            ]
        if return_tensors is not None:
            return as_arrays(result, return_tensors)
        if isinstance(text, str) and not return_overflowing_tokens:
            return Encoded({name: values[0] for name, values in result.items()})
        return result

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return list(self._encode_all([text])[0].ids)

    def tokenize(self, text: str) -> list[str]:
        """Split a text into vocabulary entries; the first step of `encode`."""
        return self.convert_ids_to_tokens(self.encode(text))

    def decode(self, token_ids: Ids, skip_special_tokens: bool = False) -> str:
        """The ids' text; incomplete characters become U+FFFD.

        Ids without an entry are skipped: a model may have more rows than its tokenizer entries.
        """
        ids = _as_ids(token_ids)
        if ids and min(ids) < 0:
            raise ValueError(f"id {min(ids)} is negative (-100 in labels is not an id)")
        ids = [each for each in ids if each in self._known_ids]
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def batch_decode(
        self, sequences: Iterable[Ids], skip_special_tokens: bool = False
    ) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def convert_ids_to_tokens(self, ids: Ids) -> list[str]:
        """The ids' vocabulary entries, with bytes as printable characters."""
        return [str(self._tokenizer.id_to_token(i)) for i in self.check_ids(ids)]

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> list[int]:
        """The ids of vocabulary entries; a single string is one entry."""
        tokens = [tokens] if isinstance(tokens, str) else tokens
        return [self._required_id(token) for token in tokens]

    def get_vocab(self) -> dict[str, int]:
        """Every entry with its id, including added tokens."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def add_tokens(self, new_tokens: str | Sequence[str], special_tokens: bool = False) -> int:
        """Add tokens that are never split; returns how many are new as such.

        Existing vocabulary entries keep their ids. The model needs a row for each new id: call
        `model.resize_token_embeddings(tokenizer.rows_needed)`, unless it already has enough.

        Args:
            special_tokens: omit them where special tokens are skipped.
        """
        texts = [new_tokens] if isinstance(new_tokens, str) else list(new_tokens)
        if not all(isinstance(each, str) and each for each in texts):
            raise ValueError(f"new_tokens must be one or more non-empty strings, got {texts!r:.80}")
        added = [
            AddedToken(each, normalized=not special_tokens, special=special_tokens)
            for each in texts
        ]
        add = self._tokenizer.add_special_tokens if special_tokens else self._tokenizer.add_tokens
        count = int(add(added))
        self._forget()
        return count

    def add_special_tokens(self, special_tokens: Mapping[str, str]) -> int:
        """Set bos_token, eos_token or pad_token, adding new ones to the vocabulary.

        Returns the same as `add_tokens`.
        """
        for name in special_tokens:
            if name not in MAIN_TOKENS:
                raise ValueError(
                    f"{name} is not one of bos_token, eos_token and pad_token; remedy: "
                    f"add_tokens([…], special_tokens=True)"
                )
        count = self.add_tokens(list(special_tokens.values()), special_tokens=True)
        for name, token in special_tokens.items():
            setattr(self, name, token)
        return count

    def has_id(self, token_id: int) -> bool:
        """Whether an id has an entry."""
        return token_id in self._known_ids

    def token_bytes(self, token_id: int) -> bytes:
        """An id's bytes, perhaps only part of a character."""
        token = self.convert_ids_to_tokens(token_id)[0]
        if token_id in self._added_ids:
            return token.encode()
        return bytes(BYTE_OF_CHARACTER[character] for character in token)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` omits."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    @cached_property
    def _known_ids(self) -> frozenset[int]:
        # Not range(len(self)): some published vocabularies have gaps.
        return frozenset(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def _encode_all(self, texts: list[str]) -> list[Encoding]:
        try:
            return list(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        except (TypeError, UnicodeEncodeError):
            for _ in checked_texts(texts):
                pass
            raise

    def _pad(
        self, windows: list[Window], length: int | None, multiple: int | None, side: Side
    ) -> None:
        pad_id = self.pad_token_id
        if pad_id is None:
            raise ValueError(
                "padding needs a pad token, but this tokenizer has none; remedy: "
                "tokenizer.pad_token = tokenizer.eos_token"
            )
        check_choice("padding_side", side, ("left", "right"))
        if length is None:
            length = max((len(window.ids) for window in windows), default=0)
        if multiple is not None:
            length = -(-length // multiple) * multiple
        for window in windows:
            window.pad(length, pad_id, side)

    def check_ids(self, ids: Ids) -> list[int]:
        """The ids as a list. ValueError for one without an entry."""
        numbers = _as_ids(ids)
        for number in numbers:
            if number not in self._known_ids:
                raise ValueError(f"id {number} is not in the vocabulary of {len(self)} entries")
        return numbers

    def _forget(self) -> None:
        """Invalidate caches after a change of the vocabulary."""
        for name in ("unused_ids", "special_ids", "_added_ids", "_known_ids"):
            self.__dict__.pop(name, None)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._required_id(token)

    def _required_id(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"{token!r} is not in the vocabulary of {len(self)} entries")
        return int(number)


def _as_ids(ids: Ids) -> list[int]:
    if isinstance(ids, torch.Tensor | np.ndarray):
        ids = ids.tolist()
    try:
        items = [ids] if isinstance(ids, int | np.integer) else list(ids)
        return [whole_number(item) for item in items]
    except TypeError as error:
        raise ValueError(
            f"ids must be an integer or one list of them, got {ids!r:.80}; for several lists use "
            f"batch_decode"
        ) from error

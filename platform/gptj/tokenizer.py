"""Text in, token ids out, and back: GPT-2's byte-level BPE with GPT-J's 50400 entries.

Built on the `tokenizers` library; the call has Hugging Face's arguments and gives its results.
Truncation and padding are done here and not by the library's tokenizer, which would keep them as
settings of its own: calls from several threads must not meet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import index as whole_number
from pathlib import Path
from reprlib import repr as shown
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from tokenizers import AddedToken, Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers import processors as post_processors

from gptj import storage
from gptj.adapters.base import Base
from gptj.checkpoints.folder import ADAPTER_FILES, TOKENIZER_FILES, ModelFolder
from gptj.errors import NoTokenizerError
from gptj.serialization.json_object import parse_object
from gptj.storage.addresses import normalized

END_OF_TEXT = "<|endoftext|>"
EXTRA_TOKENS = 143  # <|extratoken_1|> … fill the embedding's 50400 rows; no text has them

Side = Literal["left", "right"]
Padding = Literal["longest", "max_length", "do_not_pad"]
Truncation = Literal["longest_first", "only_first", "only_second", "do_not_truncate"]
Ids = int | np.integer[Any] | Sequence[int] | torch.Tensor | np.ndarray[Any, Any]
Item = TypeVar("Item")


class Encoded(dict[str, Any]):
    """What the tokenizer returns: `encoded["input_ids"]` and `encoded.input_ids` are the same."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def to(self, device: torch.device | str) -> Encoded:
        """The same with every tensor on `device`."""
        return Encoded(
            {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.items()}
        )


class GPTJTokenizer:
    """A byte-level BPE tokenizer with the special tokens of a model.

    Args:
        tokenizer: the vocabulary, merges and added tokens; its truncation and padding are unset.
        bos_token, eos_token, pad_token: entries of the vocabulary, or None.
        model_max_length: the longest input of the model, in tokens; None where unknown.
        padding_side: where `padding` puts padding.
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
    ) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.pad_token = pad_token
        self.model_max_length = model_max_length
        self.padding_side: Side = padding_side

    @classmethod
    def from_pretrained(cls, address: str | Path, *, revision: str | None = None) -> GPTJTokenizer:
        """From a folder, an `s3://` address or a hub id: tokenizer.json, or vocab and merges.

        An adapter without a tokenizer has its base's.

        Raises NoTokenizerError (a FileNotFoundError) if neither is there, ValueError if a file
        cannot be read or is not what the folder's manifest says.
        """
        needed = (*TOKENIZER_FILES, *ADAPTER_FILES)
        with ModelFolder.open(address, revision=revision, files=needed) as folder:
            return cls.from_folder(folder)

    @classmethod
    def from_folder(cls, opened: ModelFolder) -> GPTJTokenizer:
        """The tokenizer of an open folder: see `from_pretrained`."""
        folder, files = opened.address, opened.read_tokenizer()
        special_map = _json_object(folder, files, "special_tokens_map.json")
        settings = {**special_map, **_json_object(folder, files, "tokenizer_config.json")}
        if "tokenizer.json" in files:
            try:
                tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
            except Exception as error:  # the library raises no narrower type
                raise _unreadable(folder, "tokenizer.json", error) from error
        elif {"vocab.json", "merges.txt"} <= set(files):
            vocabulary = _json_object(folder, files, "vocab.json")
            prefix_space = bool(settings.get("add_prefix_space", False))
            try:
                merges = _parse_merges(files["merges.txt"].decode())
                tokenizer = _byte_level_bpe(vocabulary, merges, prefix_space)
            except ValueError as error:
                raise _unreadable(folder, "vocab.json with merges.txt", error) from error
            added = _json_object(folder, files, "added_tokens.json")
            if not all(type(number) is int for number in added.values()):
                raise ValueError(
                    f"{storage.join(folder, 'added_tokens.json')} must map tokens to their ids"
                )
            _add_tokens(tokenizer, added, special=False)
        elif opened.is_adapter:
            base = Base.of(opened)
            return cls.from_pretrained(base.address, revision=base.revision)
        else:
            raise NoTokenizerError(
                f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt"
            )
        known = tokenizer.get_vocab(with_added_tokens=True)
        default = END_OF_TEXT if END_OF_TEXT in known else None
        for name in ("bos_token", "eos_token", "unk_token"):
            settings.setdefault(name, default)
        try:
            _make_special(tokenizer, _special_tokens(settings) & set(known))
            return cls(
                tokenizer,
                bos_token=_token_text(settings["bos_token"]),
                eos_token=_token_text(settings["eos_token"]),
                pad_token=_token_text(settings.get("pad_token")),
                model_max_length=_longest(settings.get("model_max_length")),
                padding_side=_side(settings.get("padding_side", "right")),
            )
        except ValueError as error:
            raise _unreadable(folder, "tokenizer_config.json", error) from error

    @classmethod
    def from_vocabulary(
        cls, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]
    ) -> GPTJTokenizer:
        """GPT-J's tokenizer from GPT-2's 50257 entries and merges: 143 extra tokens are added.

        Raises ValueError if they do not fit each other, or `<|endoftext|>` is not among them.
        """
        if END_OF_TEXT not in vocabulary:
            raise ValueError(f"the vocabulary of {len(vocabulary)} entries lacks {END_OF_TEXT!r}")
        tokenizer = _byte_level_bpe(vocabulary, merges)
        _add_tokens(tokenizer, {END_OF_TEXT: vocabulary[END_OF_TEXT]}, special=True)
        extra = {f"<|extratoken_{n + 1}|>": len(vocabulary) + n for n in range(EXTRA_TOKENS)}
        _add_tokens(tokenizer, extra, special=False)
        return cls(tokenizer, model_max_length=2048)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> GPTJTokenizer:
        """Learn a vocabulary of `vocab_size` entries from texts, for small models.

        256 of them are the bytes and one is `<|endoftext|>` (bos, eos and padding); the same
        texts give the same vocabulary. It is smaller if the texts have fewer pairs to merge.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be several strings, got one; remedy: [text]")
        smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 1
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size must be at least {smallest} (256 bytes and {END_OF_TEXT}), "
                f"got {vocab_size}"
            )
        tokenizer = _byte_level_bpe({}, [])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_checked_texts(texts), trainer)
        return cls(tokenizer, pad_token=END_OF_TEXT)

    def save_pretrained(self, address: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder, local or `s3://`."""
        folder = normalized(address)
        for name, content in self.files().items():
            storage.write_bytes(storage.join(folder, name), content)

    def files(self) -> dict[str, bytes]:
        """The content of the files that `from_pretrained`, ours and Hugging Face's, reads."""
        settings = {
            "tokenizer_class": "GPT2Tokenizer",
            # Hugging Face's class goes by this, and not by tokenizer.json.
            "add_prefix_space": getattr(self._tokenizer.pre_tokenizer, "add_prefix_space", False),
            "clean_up_tokenization_spaces": False,
            "padding_side": self.padding_side,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "unk_token": self.eos_token,
            "pad_token": self.pad_token,
        }
        if self.model_max_length is not None:
            settings["model_max_length"] = self.model_max_length
        return {
            "tokenizer.json": self._tokenizer.to_str(pretty=True).encode(),
            "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        }

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def vocab_size(self) -> int:
        """Entries without the added tokens, as Hugging Face counts."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=False))

    @property
    def bos_token_id(self) -> int | None:
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self._id(self.eos_token)

    @property
    def pad_token_id(self) -> int | None:
        return self._id(self.pad_token)

    @cached_property
    def unused_ids(self) -> tuple[int, ...]:
        """Ids that stand for no text (`<|extratoken_…|>`): never to be sampled."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        return tuple(
            sorted(i for token, i in vocabulary.items() if re.fullmatch(_EXTRA, token) is not None)
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
        """Token ids of a text or of several, with Hugging Face's arguments and results.

        Args:
            text, text_pair: one text or several; a pair is encoded as text, then text_pair.
            padding: to the longest of the batch (True), or to max_length.
            truncation: "only_first", "only_second" or "longest_first" (True); None means True where
                max_length is given without padding.
            max_length: in tokens; default model_max_length.
            stride: tokens that a window repeats of the one before it.
            return_overflowing_tokens: what truncation cuts off comes as further rows, and
                `overflow_to_sample_mapping` gives the text that each row is from.
            return_offsets_mapping: (start, end) of each token, in characters of its own text.
            return_sequence_ids: 0 or 1 for each token of text or text_pair, None on padding.

        Returns:
            `input_ids`, `attention_mask` and what was asked for: lists, or with return_tensors
            tensors or arrays (B, L) of int64.

        Raises:
            ValueError: with the value and the remedy.
        """
        _check_choice("padding", padding, (False, True, "longest", "max_length", "do_not_pad"))
        _check_choice("truncation", truncation, (None, False, True, *_STRATEGIES))
        _check_choice("padding_side", padding_side, (None, "left", "right"))
        _check_choice("return_tensors", return_tensors, (None, "pt", "np"))
        pads = padding not in (False, "do_not_pad")
        if truncation is None:
            truncation = max_length is not None and padding is False
        truncates = truncation not in (False, "do_not_truncate")
        strategy = truncation if isinstance(truncation, str) else "longest_first"
        firsts, seconds = _as_lists(text, text_pair)
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
                raise ValueError("truncation needs max_length: this tokenizer has no default")
            if not 0 <= stride < limit:
                raise ValueError(f"stride must be in [0, max_length={limit}), got {stride}")
            if pads and pad_to_multiple_of is not None and limit % pad_to_multiple_of:
                raise ValueError(
                    f"max_length={limit} is no multiple of pad_to_multiple_of={pad_to_multiple_of}"
                )
            if strategy == "only_second" and seconds is None:
                raise ValueError("truncation='only_second' needs text_pair; remedy: True")
        if seconds is None:
            rows = [
                [_Window(part) for part in _cut(encoding, limit, stride)]
                for encoding in self._encode_all(firsts)
            ]
        else:
            rows = [
                _truncate_pair(first, second, limit, stride, strategy)
                for first, second in zip(
                    self._encode_all(firsts), self._encode_all(seconds), strict=True
                )
            ]
        if not return_overflowing_tokens:
            rows = [windows[:1] for windows in rows]
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
            return _as_arrays(result, return_tensors)
        if isinstance(text, str) and not return_overflowing_tokens:
            return Encoded({name: values[0] for name, values in result.items()})
        return result

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return list(self._encode_all([text])[0].ids)

    def decode(self, token_ids: Ids, skip_special_tokens: bool = False) -> str:
        """The text of ids; bytes that are no whole character become U+FFFD."""
        ids = self._checked(token_ids)
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def batch_decode(
        self, sequences: Iterable[Ids], skip_special_tokens: bool = False
    ) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def convert_ids_to_tokens(self, ids: Ids) -> list[str]:
        """The vocabulary's entries, in which bytes are written as printable characters."""
        return [str(self._tokenizer.id_to_token(i)) for i in self._checked(ids)]

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> list[int]:
        """The ids of entries of the vocabulary; a single string is one entry."""
        tokens = [tokens] if isinstance(tokens, str) else tokens
        return [self._required_id(token) for token in tokens]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that an id stands for: a part of a character, perhaps."""
        token = self.convert_ids_to_tokens(token_id)[0]
        if token_id in self._added_ids:
            return token.encode()
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)

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
            for _ in _checked_texts(texts):
                pass
            raise

    def _pad(
        self, windows: list[_Window], length: int | None, multiple: int | None, side: Side
    ) -> None:
        pad_id = self.pad_token_id
        if pad_id is None:
            raise ValueError(
                "padding needs a pad token, and this tokenizer has none; remedy: "
                "tokenizer.pad_token = tokenizer.eos_token"
            )
        _check_choice("padding_side", side, ("left", "right"))
        if length is None:
            length = max((len(window.ids) for window in windows), default=0)
        if multiple is not None:
            length = -(-length // multiple) * multiple
        for window in windows:
            window.pad(length, pad_id, side)

    def _checked(self, ids: Ids) -> list[int]:
        if isinstance(ids, torch.Tensor | np.ndarray):
            ids = ids.tolist()
        try:
            items = [ids] if isinstance(ids, int | np.integer) else list(ids)
            numbers = [whole_number(item) for item in items]
        except TypeError as error:
            raise ValueError(
                f"ids must be an integer or one list of them, got {ids!r:.80}; "
                f"several lists go to batch_decode"
            ) from error
        for number in numbers:
            if number not in self._known_ids:
                raise ValueError(f"id {number} is not in the vocabulary of {len(self)} entries")
        return numbers

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._required_id(token)

    def _required_id(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"{token!r} is not in the vocabulary of {len(self)} entries")
        return int(number)


class _Window:
    """One row of the result: the lists that truncation has cut and padding will fill."""

    def __init__(self, first: Encoding, second: Encoding | None = None) -> None:
        self.ids: list[int] = list(first.ids)
        self.offsets: list[tuple[int, int]] = list(first.offsets)
        self.sequence_ids: list[int | None] = [0] * len(self.ids)
        if second is not None:
            self.ids += second.ids
            self.offsets += second.offsets
            self.sequence_ids += [1] * len(second.ids)
        self.mask = [1] * len(self.ids)

    def pad(self, length: int, pad_id: int, side: Side) -> None:
        missing = max(0, length - len(self.ids))
        self.ids = _filled(self.ids, pad_id, missing, side)
        self.offsets = _filled(self.offsets, (0, 0), missing, side)
        self.sequence_ids = _filled(self.sequence_ids, None, missing, side)
        self.mask = _filled(self.mask, 0, missing, side)


def _filled(values: list[Item], filler: Item, missing: int, side: Side) -> list[Item]:
    filling = [filler] * missing
    return values + filling if side == "right" else filling + values


def _truncate_pair(
    first: Encoding, second: Encoding, limit: int | None, stride: int, strategy: str
) -> list[_Window]:
    """The rows of a pair, in Hugging Face's order: each part of the one with each of the other."""
    sizes = len(first.ids), len(second.ids)
    if limit is None or sum(sizes) <= limit:
        return [_Window(first, second)]
    if strategy == "longest_first":
        # The longer one down to the other's length, then both alike.
        shorter = min(*sizes, limit // 2)
        rooms = (shorter, limit - shorter) if sizes[0] <= sizes[1] else (limit - shorter, shorter)
    elif strategy == "only_first":
        rooms = (limit - sizes[1], sizes[1])
    else:
        rooms = (sizes[0], limit - sizes[0])
    for size, room in zip(sizes, rooms, strict=True):
        if size > room and room <= stride:
            raise ValueError(
                f"max_length={limit} and truncation={strategy!r} leave {room} tokens for a text of "
                f"{size}; that must be more than stride={stride}; remedy: a larger max_length"
            )
    firsts = _cut(first, rooms[0], stride)
    seconds = _cut(second, rooms[1], stride)
    pairs = [(firsts[0], seconds[0])]
    pairs += [(part, other) for part in firsts[1:] for other in seconds]
    pairs += [(firsts[0], other) for other in seconds[1:]]
    return [_Window(part, other) for part, other in pairs]


def _cut(encoding: Encoding, limit: int | None, stride: int) -> list[Encoding]:
    if limit is None or len(encoding.ids) <= limit:
        return [encoding]
    encoding.truncate(limit, stride=stride)
    return [encoding, *encoding.overflowing]


def _as_lists(
    text: str | Sequence[str], text_pair: str | Sequence[str] | None
) -> tuple[list[str], list[str] | None]:
    """One text or several as a list, and their pairs as one of the same length."""
    for name, value in (("text", text), ("text_pair", text_pair)):
        if not isinstance(value, str | Sequence) and (name == "text" or value is not None):
            raise ValueError(f"{name} must be a string or a list of strings, got {value!r:.80}")
    firsts = [text] if isinstance(text, str) else list(text)
    if text_pair is None:
        return firsts, None
    if isinstance(text, str) != isinstance(text_pair, str):
        raise ValueError("text and text_pair must both be strings or both be lists of strings")
    seconds = [text_pair] if isinstance(text_pair, str) else list(text_pair)
    if len(seconds) != len(firsts):
        raise ValueError(f"{len(firsts)} texts cannot pair with {len(seconds)}")
    return firsts, seconds


def _checked_texts(texts: Iterable[str]) -> Iterator[str]:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {index} must be a string, got {type(text).__name__}")
        if (found := re.search("[\ud800-\udfff]", text)) is not None:
            raise ValueError(
                f"text {index} has half of a surrogate pair ({found.group()!r}) at character "
                f"{found.start()}, which is not Unicode text; remedy: "
                f"text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
            )
        yield text


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _as_arrays(result: Encoded, kind: str) -> Encoded:
    lengths = {len(row) for row in result["input_ids"]}
    if len(lengths) > 1:
        raise ValueError(
            f"rows of {min(lengths)} to {max(lengths)} tokens do not make a tensor; "
            f"remedy: padding=True"
        )
    size = (len(result["input_ids"]), *(lengths or {0}))
    # Shapes are given because an array of no tokens cannot tell its own.
    shapes = {"offset_mapping": (*size, 2), "overflow_to_sample_mapping": size[:1]}
    arrays = {
        name: values
        if name == "sequence_ids"
        else np.array(values, dtype=np.int64).reshape(shapes.get(name, size))
        for name, values in result.items()
    }
    if kind == "np":
        return Encoded(arrays)
    return Encoded(
        {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}
    )


def _byte_level_bpe(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], prefix_space: bool = False
) -> Tokenizer:
    try:
        model = models.BPE(vocab=dict(vocabulary), merges=list(merges))
    except Exception as error:  # the library raises no narrower type
        raise ValueError(f"vocabulary and merges do not fit each other: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = post_processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, tokens: Mapping[str, int], *, special: bool) -> None:
    """Add in the order of their ids, and make sure that those are the ids they get."""
    for token, number in sorted(tokens.items(), key=lambda each: each[1]):
        added = AddedToken(token, normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
        if tokenizer.token_to_id(token) != number:
            raise ValueError(
                f"added token {token!r} should have id {number}, but gets "
                f"{tokenizer.token_to_id(token)}; remedy: ids of added tokens follow the "
                f"vocabulary's without a gap"
            )


def _make_special(tokenizer: Tokenizer, tokens: Iterable[str]) -> None:
    """Never split these entries of the vocabulary, and leave them out where it is asked for."""
    added = tokenizer.get_added_tokens_decoder().values()
    done = {token.content for token in added if token.special}
    for token in sorted(set(tokens) - done):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])


def _special_tokens(settings: Mapping[str, Any]) -> set[str]:
    """The special tokens that a tokenizer's configuration names."""
    several = ("additional_special_tokens", "extra_special_tokens")
    values = [settings[name] for name in _SPECIAL_NAMES if name in settings]
    for name in several:
        found = settings.get(name) or []
        if not isinstance(found, list | dict):  # a newer form names them
            raise ValueError(f"{name} must be a list of tokens, got {shown(found)}")
        values += found.values() if isinstance(found, dict) else found
    return {text for value in values if (text := _token_text(value)) is not None}


def _json_object(folder: str, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """A file's JSON object; an empty one if there is no such file."""
    return parse_object(files.get(name, b"{}"), storage.join(folder, name))


def _unreadable(folder: str, name: str, error: Exception) -> ValueError:
    return ValueError(f"{storage.join(folder, name)} is not readable: {error}")


def _parse_merges(text: str) -> list[tuple[str, str]]:
    """merges.txt: a pair a line, after a first line that may give a version."""
    merges = []
    for line in text.splitlines():
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        merges.append((left, right))
    return merges


def _token_text(token: Any) -> str | None:
    """A token's text; Hugging Face writes some as objects. ValueError if it is none."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise ValueError(f"a token must be a text, got {shown(token)}")
    return text


def _longest(tokens: Any) -> int | None:
    """model_max_length, for which Hugging Face writes 1e30 where it is unknown."""
    if tokens is None:
        return None
    if type(tokens) not in (int, float) or not tokens >= 0:
        raise ValueError(f"model_max_length must be a number of tokens, got {shown(tokens)}")
    return int(tokens) if 0 < tokens < 1e9 else None


def _side(side: Any) -> Side:
    if side not in ("left", "right"):
        raise ValueError(f"padding_side must be left or right, got {shown(side)}")
    return "left" if side == "left" else "right"


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: bytes that print stand for themselves, the others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return {**table, **{chr(0x100 + index): byte for index, byte in enumerate(others)}}


_BYTE_OF_CHARACTER = _byte_of_character()
_EXTRA = r"<\|extratoken_\d+\|>"
_STRATEGIES = ("longest_first", "only_first", "only_second", "do_not_truncate")
_SPECIAL_NAMES = tuple(f"{n}_token" for n in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))

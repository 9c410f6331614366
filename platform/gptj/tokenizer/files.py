"""A tokenizer's files: tokenizer.json, or vocab.json with merges.txt, and its configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

from tokenizers import Tokenizer

from gptj import storage
from gptj.checkpoints.folder import CHAT_TEMPLATE, ModelFolder
from gptj.errors import NoTokenizerError
from gptj.serialization.json_object import parse_object
from gptj.tokenizer.bpe import END_OF_TEXT, add_tokens, byte_level_bpe, make_special
from gptj.tokenizer.inputs import Side

# A list or, in a newer format, tokens by their names.
EXTRA_SPECIAL = "extra_special_tokens"
SPECIAL_NAMES = tuple(f"{n}_token" for n in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer and its settings, as read from a folder."""

    tokenizer: Tokenizer
    special_tokens: dict[str, str]  # by name: eos_token and the like
    model_max_length: int | None
    padding_side: Side
    chat_template: str | dict[str, str] | None

    @classmethod
    def read(cls, opened: ModelFolder) -> TokenizerFiles:
        """NoTokenizerError if there is none, ValueError if a file cannot be parsed."""
        folder, files = opened.address, opened.read_tokenizer()
        settings = _settings(folder, files)
        tokenizer = _read_vocabulary(folder, files, bool(settings.get("add_prefix_space", False)))
        known = tokenizer.get_vocab(with_added_tokens=True)
        default = END_OF_TEXT if END_OF_TEXT in known else None
        for name in ("bos_token", "eos_token", "unk_token"):
            settings.setdefault(name, default)
        template = _template_file(folder, files)
        try:
            named = _named_tokens(settings)
            make_special(tokenizer, {*named.values(), *_unnamed_tokens(settings)} & set(known))
            return cls(
                tokenizer,
                special_tokens=named,
                model_max_length=_longest(settings.get("model_max_length")),
                padding_side=_side(settings.get("padding_side", "right")),
                chat_template=_chat_template(template, settings),
            )
        except ValueError as error:
            raise _unreadable(folder, "tokenizer_config.json", error) from error


@dataclass(frozen=True)
class TokenizerSettings:
    """What a folder says about a tokenizer that is elsewhere: its files without a vocabulary."""

    special_tokens: dict[str, str]  # by name
    # Tokens that the vocabulary needs, with their ids where the files have them.
    entries: dict[str, int | None]
    chat_template: str | dict[str, str] | None

    @classmethod
    def read(cls, opened: ModelFolder) -> TokenizerSettings:
        """ValueError if a file cannot be parsed."""
        folder, files = opened.address, opened.read_tokenizer()
        settings = _settings(folder, files)
        added = _json_object(folder, files, "added_tokens.json")
        try:
            added_entries = _added_entries((number, token) for token, number in added.items())
        except ValueError as error:
            raise _unreadable(folder, "added_tokens.json", error) from error
        template = _template_file(folder, files)
        try:
            named = _named_tokens(settings)
            # Nothing is padded with the pad token where the tokenizer is used.
            needed = {text for name, text in named.items() if text and name != "pad_token"}
            entries: dict[str, int | None] = dict.fromkeys(
                sorted(needed | _unnamed_tokens(settings))
            )
            entries |= added_entries | _added_entries(_decoder(settings).items())
            chat_template = _chat_template(template, settings)
        except ValueError as error:
            raise _unreadable(folder, "tokenizer_config.json", error) from error
        return cls(named, entries, chat_template)


def _decoder(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Added tokens by their ids, as texts."""
    found = settings.get("added_tokens_decoder") or {}
    if not isinstance(found, dict):
        raise ValueError(f"added_tokens_decoder must map ids to tokens, got {shown(found)}")
    return found


def _added_entries(tokens: Iterable[tuple[Any, Any]]) -> dict[str, int]:
    """Ids by token, from pairs of an id, perhaps as text, and a token."""
    entries = {}
    for number, token in tokens:
        if type(number) is not int and not (isinstance(number, str) and number.isdecimal()):
            raise ValueError(
                f"the id of {shown(token)} must be a whole number, got {shown(number)}"
            )
        if (text := _token_text(token)) is not None:
            entries[text] = int(number)
    return entries


def _settings(folder: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    special_map = _json_object(folder, files, "special_tokens_map.json")
    return {**special_map, **_json_object(folder, files, "tokenizer_config.json")}


def _read_vocabulary(folder: str, files: Mapping[str, bytes], prefix_space: bool) -> Tokenizer:
    if "tokenizer.json" in files:
        try:
            return Tokenizer.from_str(files["tokenizer.json"].decode())
        except Exception as error:  # the library raises no narrower type
            raise _unreadable(folder, "tokenizer.json", error) from error
    if not {"vocab.json", "merges.txt"} <= set(files):
        raise NoTokenizerError(
            f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt"
        )
    vocabulary = _json_object(folder, files, "vocab.json")
    try:
        merges = _parse_merges(files["merges.txt"].decode())
        tokenizer = byte_level_bpe(vocabulary, merges, prefix_space)
    except ValueError as error:
        raise _unreadable(folder, "vocab.json with merges.txt", error) from error
    added = _json_object(folder, files, "added_tokens.json")
    if not all(type(number) is int for number in added.values()):
        raise ValueError(
            f"{storage.join(folder, 'added_tokens.json')} must map tokens to their ids"
        )
    add_tokens(tokenizer, added, special=False)
    return tokenizer


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that have names in a tokenizer's configuration, by name.

    As in transformers, a model may name more than SPECIAL_NAMES, such as image_token.
    """
    values = {name: settings.get(name) for name in SPECIAL_NAMES}
    for name, value in settings.items():
        if name.endswith("_token") and isinstance(value, str | dict):
            values[name] = value
    extra = settings.get(EXTRA_SPECIAL)
    if isinstance(extra, dict):
        values |= extra
    return {
        name: text for name, value in values.items() if (text := _token_text(value)) is not None
    }


def _unnamed_tokens(settings: Mapping[str, Any]) -> set[str]:
    """The special tokens that a configuration lists without names."""
    values: list[Any] = []
    for name in ("additional_special_tokens", EXTRA_SPECIAL):
        found = settings.get(name) or []
        if not isinstance(found, list | dict):
            raise ValueError(f"{name} must be a list of tokens, got {shown(found)}")
        values += found.values() if isinstance(found, dict) else found
    return {text for value in values if (text := _token_text(value)) is not None}


def _json_object(folder: str, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """A file's JSON object; empty if there is no such file."""
    return parse_object(files.get(name, b"{}"), storage.join(folder, name))


def _unreadable(folder: str, name: str, error: Exception) -> ValueError:
    return ValueError(f"cannot read {storage.join(folder, name)}: {error}")


def _parse_merges(text: str) -> list[tuple[str, str]]:
    """Parse merges.txt: one pair per line, perhaps after a version line."""
    merges = []
    for line in text.splitlines():
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        merges.append((left, right))
    return merges


def _token_text(token: Any) -> str | None:
    """A token's text; Hugging Face writes some tokens as objects. ValueError if invalid."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise ValueError(f"a token must be a string, got {shown(token)}")
    return text


def _template_file(folder: str, files: Mapping[str, bytes]) -> str | None:
    """A chat template's own file; None if there is none."""
    if CHAT_TEMPLATE not in files:
        return None
    try:
        return files[CHAT_TEMPLATE].decode()
    except UnicodeDecodeError as error:
        raise _unreadable(folder, CHAT_TEMPLATE, error) from error


def _chat_template(file: str | None, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template from its file, else from the settings: a string, or several by name."""
    if file is not None:
        return file
    setting = settings.get("chat_template")
    if setting is None or isinstance(setting, str):
        return setting
    try:
        named = {each["name"]: each["template"] for each in setting}
    except (LookupError, TypeError) as error:
        raise ValueError(f"chat_template must be a text, got {shown(setting)}") from error
    if not all(isinstance(each, str) for pair in named.items() for each in pair):
        raise ValueError(f"chat_template must have texts, got {shown(setting)}")
    return named


def _longest(tokens: Any) -> int | None:
    """model_max_length; Hugging Face writes 1e30 if it is unknown."""
    if tokens is None:
        return None
    if type(tokens) not in (int, float) or not tokens >= 0:
        raise ValueError(f"model_max_length must be a number of tokens, got {shown(tokens)}")
    return int(tokens) if 0 < tokens < 1e9 else None


def _side(side: Any) -> Side:
    if side not in ("left", "right"):
        raise ValueError(f"padding_side must be left or right, got {shown(side)}")
    return "left" if side == "left" else "right"

"""Validation of a tokenizer's arguments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

Side = Literal["left", "right"]
Padding = Literal["longest", "max_length", "do_not_pad"]
Truncation = Literal["longest_first", "only_first", "only_second", "do_not_truncate"]

STRATEGIES = ("longest_first", "only_first", "only_second", "do_not_truncate")


def as_lists(
    text: str | Sequence[str], text_pair: str | Sequence[str] | None
) -> tuple[list[str], list[str] | None]:
    """Texts as a list, and their pairs, if any, as a list of the same length."""
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


def checked_texts(texts: Iterable[str]) -> Iterator[str]:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {index} must be a string, got {type(text).__name__}")
        if (found := re.search("[\ud800-\udfff]", text)) is not None:
            raise ValueError(
                f"text {index} has a lone surrogate ({found.group()!r}) at character "
                f"{found.start()}, which is not valid Unicode; remedy: "
                f"text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
            )
        yield text


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")

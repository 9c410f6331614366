"""Command lines of key=value words: help, and settings whose errors name the wrong keys."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from gptj.serialization.yaml_value import parse_yaml

Settings = TypeVar("Settings", bound=BaseModel)


def help_if_asked(words: Sequence[str], text: str | None) -> None:
    """Print `text` and exit if `--help` or `-h` is among the words of a key=value command line."""
    if "--help" in words or "-h" in words:
        print((text or "").strip())
        sys.exit(0)


def parsed_yaml(word: str, text: str, *, is_text: bool = False) -> Any:
    """The YAML value of `text`, from the `word` key=text; ValueError with the word if invalid.

    Args:
        is_text: a string, or a list or mapping of strings: 007 and no are not a number and a false.
    """
    try:
        return parse_yaml(text, True if is_text else None)
    except YAMLError as error:
        raise ValueError(f"{word:.200}: the value is not valid YAML: {error}") from error


def checked(cls: type[Settings], fields: Mapping[str, Any]) -> Settings:
    """The settings; ValueError naming each wrong key, its value and what is wrong with it."""
    try:
        return cls(**fields)
    except ValidationError as error:
        raise ValueError(
            "; ".join(f"{e['loc'][0]}={e['input']!r}: {e['msg']}" for e in error.errors())
        ) from error

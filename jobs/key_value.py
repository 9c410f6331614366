"""Command lines of key=value words: help, and settings whose errors name the wrong keys."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Settings = TypeVar("Settings", bound=BaseModel)


def help_if_asked(words: Sequence[str], text: str | None) -> None:
    """Print `text` and exit if `--help` or `-h` is among the words of a key=value command line."""
    if "--help" in words or "-h" in words:
        print((text or "").strip())
        sys.exit(0)


def checked(cls: type[Settings], fields: Mapping[str, Any]) -> Settings:
    """The settings; ValueError naming each wrong key, its value and what is wrong with it."""
    try:
        return cls(**fields)
    except ValidationError as error:
        raise ValueError(
            "; ".join(f"{e['loc'][0]}={e['input']!r}: {e['msg']}" for e in error.errors())
        ) from error

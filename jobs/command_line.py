"""Our command lines: help, and types of words, whose errors say what is wrong and the remedy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from gptj.storage.addresses import AddressError, local_path, normalized

Settings = TypeVar("Settings", bound=BaseModel)


def help_if_asked(words: Sequence[str], text: str | None) -> None:
    """Print `text` and end, if `--help` or `-h` is among the words of a key=value command line."""
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


def address(text: str) -> str:
    """A path, `s3://bucket/key` or, where a checkpoint is read, a hub id."""
    try:
        return normalized(text)
    except AddressError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def shard_bytes(text: str) -> int:
    """Bytes of weights in one file: 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def data_address(text: str) -> str:
    """A path or pattern, `s3://bucket/key` or `sample://NAME`."""
    try:
        return normalized(text, samples=True)
    except AddressError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def folder(text: str) -> Path:
    """A folder of this machine."""
    try:
        return local_path(text)
    except AddressError as error:
        raise argparse.ArgumentTypeError(str(error)) from error

"""Types of command-line arguments, whose errors say what is wrong; logging."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from gptj.storage.addresses import AddressError, local_path, normalized


def address(text: str) -> str:
    """A path, `s3://bucket/key` or, for reading a checkpoint, a hub id."""
    try:
        return normalized(text)
    except AddressError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive(text: str) -> int:
    """A positive whole number."""
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
    """A folder on this machine."""
    try:
        return local_path(text)
    except AddressError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def log_to_stderr(*loggers: str) -> None:
    """Log our library's and these loggers' messages, and only warnings of other libraries."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    for name in ("gptj", *loggers):
        logging.getLogger(name).setLevel(logging.INFO)

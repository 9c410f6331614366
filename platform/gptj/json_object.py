"""A small JSON file of a checkpoint: its bytes in, an object out, or an error with the file's name.

Whatever the bytes are: cut off, nested a million deep, no text at all. Memory stays bounded by the
limit of a file's size.
"""

from __future__ import annotations

import json
from typing import Any

from gptj import storage

LIMIT_BYTES = 64 * 2**20  # GPT-J's largest, tokenizer.json, has 3 MB


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted or does not fit; the message names the file and why."""


def parse_object(content: bytes, address: str) -> dict[str, Any]:
    """The object that a file holds. CheckpointError with its address if it holds none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{address} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{address} is damaged: it holds no JSON object")
    return value


def read_small(address: str) -> bytes:
    """A whole file of at most LIMIT_BYTES. CheckpointError if it is larger."""
    size = storage.size(address)
    if size > LIMIT_BYTES:
        raise CheckpointError(
            f"{address} has {size} bytes; such a file has at most {LIMIT_BYTES}: it is damaged"
        )
    return storage.read_bytes(address, 0, size)

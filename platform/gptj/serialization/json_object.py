"""JSON in and out: a checkpoint's small files read with care, and text that any reader takes.

What is read may be cut off, nested a million deep, no text at all: the error names the file, and
memory stays bounded by the limit of a file's size. What is written has no NaN and no infinity,
which Python writes and JSON does not have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from gptj.errors import CheckpointError


def parse_object(content: bytes, address: str) -> dict[str, Any]:
    """The object that a file holds. CheckpointError with its address if it holds none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{address} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{address} is damaged: it holds no JSON object")
    return value


def to_json(
    value: Any, *, indent: int | None = None, ensure_ascii: bool = True, sort_keys: bool = False
) -> str:
    """As json.dumps, with null in place of each number that is not finite."""
    dumps = partial(
        json.dumps,
        indent=indent,
        ensure_ascii=ensure_ascii,
        sort_keys=sort_keys,
        allow_nan=False,
    )
    try:
        return dumps(value)
    except ValueError:  # rare: only then is the value copied
        return dumps(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value

"""Careful parsing of a checkpoint's JSON files, and output that every JSON parser accepts.

Input may be truncated, nested a million levels deep or binary: the error names the file, and the
limit on a file's size bounds the memory. Output has no NaN or infinity, which Python writes but
JSON does not have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from gptj.errors import CheckpointError


def parse_object(content: bytes, address: str) -> dict[str, Any]:
    """Parse a file's JSON object. CheckpointError with its address if it holds none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{address} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{address} is damaged: it is not a JSON object")
    return value


def to_json(
    value: Any,
    *,
    indent: int | None = None,
    ensure_ascii: bool = True,
    sort_keys: bool = False,
    default: Callable[[Any], Any] | None = None,
) -> str:
    """Like json.dumps, with null in place of NaN and infinities."""
    dumps = partial(
        json.dumps,
        indent=indent,
        ensure_ascii=ensure_ascii,
        sort_keys=sort_keys,
        default=default,
        allow_nan=False,
    )
    try:
        return dumps(value)
    except ValueError:  # rare, so only now copy the value
        return dumps(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value

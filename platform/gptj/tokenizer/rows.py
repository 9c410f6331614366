"""Encodings in, rows of a batch out: truncated to windows, padded, as lists or tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Encoding

from gptj.tokenizer.inputs import Side

Item = TypeVar("Item")


class Encoded(dict[str, Any]):
    """What the tokenizer returns; `encoded["input_ids"]` is also `encoded.input_ids`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def to(self, device: torch.device | str) -> Encoded:
        """A copy with every tensor on `device`."""
        return Encoded(
            {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.items()}
        )


class Window:
    """One row of the result, truncated but not yet padded."""

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
        self.ids = filled(self.ids, pad_id, missing, side)
        self.offsets = filled(self.offsets, (0, 0), missing, side)
        self.sequence_ids = filled(self.sequence_ids, None, missing, side)
        self.mask = filled(self.mask, 0, missing, side)


def filled(values: list[Item], filler: Item, missing: int, side: Side) -> list[Item]:
    filling = [filler] * missing
    return values + filling if side == "right" else filling + values


def truncate_pair(
    first: Encoding, second: Encoding, limit: int | None, stride: int, strategy: str
) -> Iterator[Window]:
    """The rows of a pair in Hugging Face's order: each window of one with each of the other.

    A generator, since the combinations of two long texts could fill the memory.
    """
    sizes = len(first.ids), len(second.ids)
    if limit is None or sum(sizes) <= limit:
        yield Window(first, second)
        return
    if strategy == "longest_first":
        # Shorten the longer one to the other's length, then both equally.
        shorter = min(*sizes, limit // 2)
        rooms = (shorter, limit - shorter) if sizes[0] <= sizes[1] else (limit - shorter, shorter)
    elif strategy == "only_first":
        rooms = (limit - sizes[1], sizes[1])
    else:
        rooms = (sizes[0], limit - sizes[0])
    for size, room in zip(sizes, rooms, strict=True):
        if size > room and room <= stride:
            raise ValueError(
                f"max_length={limit} and truncation={strategy!r} leave room for {room} "
                f"tokens of a text of {size}; that must be more than "
                f"stride={stride}; remedy: a larger max_length"
            )
    firsts = cut(first, rooms[0], stride)
    seconds = cut(second, rooms[1], stride)
    yield Window(firsts[0], seconds[0])
    for part in firsts[1:]:
        for other in seconds:
            yield Window(part, other)
    for other in seconds[1:]:
        yield Window(firsts[0], other)


def cut(encoding: Encoding, limit: int | None, stride: int) -> list[Encoding]:
    if limit is None or len(encoding.ids) <= limit:
        return [encoding]
    encoding.truncate(limit, stride=stride)
    return [encoding, *encoding.overflowing]


def as_arrays(result: Encoded, kind: str) -> Encoded:
    lengths = {len(row) for row in result["input_ids"]}
    if len(lengths) > 1:
        raise ValueError(
            f"rows of {min(lengths)} to {max(lengths)} tokens do not make a tensor; "
            f"remedy: padding=True"
        )
    size = (len(result["input_ids"]), *(lengths or {0}))
    # Explicit shapes, since an empty list does not determine its own.
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

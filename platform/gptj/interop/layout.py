"""The layout of another program's weight folder, for writing one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gptj.checkpoints.weights import TensorSpec
from gptj.interop.pieces import Piece


@dataclass(frozen=True)
class Layout:
    """File names, parameter names, and the layout of a file.

    Attributes:
        classes: the heads that the format supports, by our class names.
        single: file name of unsharded weights.
        shard: file name of a shard; its fields are the shard's number and the number of shards.
        index: file name of the shards' index.
        name: Hugging Face's name of a parameter and our class -> the name in the format, and
            whether it is stored transposed.
        index_name: the name in the format and our class -> the name in an index.
        plan: a file's tensors, our class, and whether the file is the only one -> its pieces.
    """

    classes: Sequence[str]
    single: str
    shard: str
    index: str
    name: Callable[[str, str], tuple[str, bool]]
    index_name: Callable[[str, str], str]
    plan: Callable[[Sequence[TensorSpec], str, bool], list[Piece]]

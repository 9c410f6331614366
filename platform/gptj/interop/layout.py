"""What another program's folder of weights looks like, for writing one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gptj.checkpoints.weights import TensorSpec
from gptj.interop.pieces import Piece


@dataclass(frozen=True)
class Layout:
    """Names of files, of parameters, and how a file is laid out.

    Attributes:
        classes: the heads that the format has, by our classes' names.
        single: the file, if there is one.
        shard: one of several; the fields are its number and how many there are.
        index: of several.
        name: Hugging Face's name of a parameter and our class -> the name in the format, and
            whether it has the transpose.
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

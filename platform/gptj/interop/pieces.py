"""A file as a plan of bytes and the tensors between them, made before any value is read.

A file's size is thus known before writing starts, it can be streamed to S3, and memory holds one
tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from gptj.checkpoints.manifest import FolderWriter
from gptj.checkpoints.weights import TensorSpec
from gptj.interop.tensors import bytes_of


@dataclass(frozen=True)
class Piece:
    """Bytes, then a tensor or part of one (None at the end of a file)."""

    header: bytes
    spec: TensorSpec | None
    start: int  # first byte within the tensor; its parts come in order
    size: int  # bytes of the tensor


def tensors_of(files: Sequence[Sequence[Piece]]) -> list[TensorSpec]:
    """The tensors in the order `write_pieces` needs them."""
    return [p.spec for pieces in files for p in pieces if p.spec is not None and p.start == 0]


def write_pieces(
    writer: FolderWriter, name: str, pieces: Sequence[Piece], tensors: Iterator[Tensor]
) -> None:
    """Write one file, taking contiguous tensors from `tensors` one at a time."""
    with writer.open(name, sum(len(piece.header) + piece.size for piece in pieces)) as file:
        content = memoryview(b"")
        for piece in pieces:
            file.write(piece.header)
            if piece.spec is not None:
                if piece.start == 0:
                    content = memoryview(b"")  # release the previous tensor first
                    content = bytes_of(next(tensors))
                file.write(content[piece.start : piece.start + piece.size])

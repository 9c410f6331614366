"""Hugging Face's PyTorch weights: index safetensors and pickles without reading the tensors."""

from __future__ import annotations

from gptj.checkpoints.tensor_file import read_header
from gptj.interop.pickles import index_pickle
from gptj.interop.tensors import StoredTensor, tensor_in_file


def open_file(address: str) -> list[StoredTensor]:
    """A file's tensors. CheckpointError if it is damaged or could run code."""
    if address.endswith(".bin"):
        return index_pickle(address)
    return [
        tensor_in_file(each.name, each.shape, each.dtype, address, [(each.start, each.size)])
        for each in read_header(address).tensors
    ]

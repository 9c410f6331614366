"""Hugging Face's files of PyTorch weights: safetensors and pickles, found without reading them."""

from __future__ import annotations

from gptj.interop.pickles import index_pickle
from gptj.interop.tensors import StoredTensor, tensor_in_file
from gptj.weights import index_safetensors


def open_file(address: str) -> list[StoredTensor]:
    """The tensors of a file. CheckpointError if it is damaged or could run code."""
    if address.endswith(".bin"):
        return index_pickle(address)
    return [
        tensor_in_file(spec.name, spec.shape, spec.dtype, address, [(start, spec.size)])
        for spec, start in index_safetensors(address)
    ]

"""Export a model folder to Hugging Face, Flax or TensorFlow, tensor by tensor."""

from __future__ import annotations

import json
from typing import Literal

import torch

from gptj.checkpoints.manifest import FolderWriter
from gptj.checkpoints.weights import SHARD_BYTES, split_shards
from gptj.config import GPTJConfig, parse_dtype
from gptj.interop import flax, tensorflow
from gptj.interop.conversion import read_all, specs_of
from gptj.interop.importer import check_new
from gptj.interop.layout import Layout
from gptj.interop.pieces import tensors_of, write_pieces
from gptj.interop.source import Source, open_source
from gptj.interop.tensors import StoredTensor
from gptj.model import GPTJForCausalLM
from gptj.pretrained.saving import save_folder, write_small_files
from gptj.storage.addresses import normalized

ExportFormat = Literal["huggingface", "flax", "tensorflow"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = ("huggingface", "flax", "tensorflow")
LAYOUTS = {"flax": flax.LAYOUT, "tensorflow": tensorflow.LAYOUT}


def export_weights(
    source: str,
    destination: str,
    *,
    format: ExportFormat,
    dtype: str | None = None,
    revision: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> GPTJConfig:
    """Write a folder that the format's programs can load, atomically. Returns its configuration.

    Like our own model folders it has a manifest, which other programs ignore.

    Args:
        source: a model folder, local or `s3://`, or a hub id.
        destination: a new folder, local or `s3://`.
        dtype: float16, bfloat16 or float32; None: as stored; if mixed, one of them.
        revision: branch, tag or commit of a hub id.
        shard_bytes: most bytes of weights in one file.

    Raises:
        FileNotFoundError, CheckpointError: see open_source.
        ValueError: if the format has no class for the model's head, or the destination is within
            the source.
        AlreadyExistsError: if the destination is not empty.
    """
    target = parse_dtype(dtype)
    source, destination = normalized(source), normalized(destination)
    check_new(destination, source)
    with open_source(source, revision=revision) as opened:
        if format == "huggingface":
            specs = specs_of(opened.tensors, target, opened.config)
            save_folder(
                destination,
                opened.config,
                specs,
                read_all(opened.tensors, specs),
                tokenizer=opened.tokenizer,
                training=opened.training,
                shard_bytes=shard_bytes,
            )
            return opened.config
        return _export(opened, destination, LAYOUTS[format], target, shard_bytes)


def _export(
    source: Source,
    destination: str,
    layout: Layout,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> GPTJConfig:
    config, cls = source.config, (source.config.architectures or [""])[0]
    if cls not in layout.classes:
        raise ValueError(
            f"{source.address} is a {cls}; the format supports only {', '.join(layout.classes)}"
        )
    tensors = [_renamed(tensor, layout, cls) for tensor in _untied(source)]
    stored = {tensor.name: tensor for tensor in tensors}
    config.tie_word_embeddings = False  # each of these formats stores both
    specs = specs_of(tensors, dtype, config)
    shards = split_shards(specs, shard_bytes)
    names = [
        layout.single if len(shards) == 1 else layout.shard.format(number, len(shards))
        for number in range(1, len(shards) + 1)
    ]
    files = [layout.plan(shard, cls, len(shards) == 1) for shard in shards]
    ordered = tensors_of(files)
    values = read_all([stored[spec.name] for spec in ordered], ordered)
    with FolderWriter(destination) as writer:
        for name, pieces in zip(names, files, strict=True):
            write_pieces(writer, name, pieces, values)
        if len(shards) > 1:
            weight_map = {
                layout.index_name(spec.name, cls): name
                for name, shard in zip(names, shards, strict=True)
                for spec in shard
            }
            total = sum(spec.size for spec in specs)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            content = json.dumps(index, indent=2, sort_keys=True) + "\n"
            writer.write(layout.index, content.encode())
        write_small_files(writer, config, source.tokenizer, source.training)
    return config


def _untied(source: Source) -> list[StoredTensor]:
    """The tensors, with a copy of the embedding as the head's weights if the two are tied."""
    tensors = list(source.tensors)
    if source.config.tie_word_embeddings and source.config.architectures == [
        GPTJForCausalLM.__name__
    ]:
        wte = next(tensor for tensor in tensors if tensor.name == "transformer.wte.weight")
        tensors.append(wte.renamed("lm_head.weight"))
    return tensors


def _renamed(tensor: StoredTensor, layout: Layout, cls: str) -> StoredTensor:
    name, transpose = layout.name(tensor.name, cls)
    return (tensor.transposed() if transpose else tensor).renamed(name)

"""Open a model of any format: an address in, its configuration, tensors and small files out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj import storage
from gptj.checkpoints.folder import CONFIG, TRAINING, ModelFolder
from gptj.checkpoints.manifest import Manifest, read_recorded, verify
from gptj.checkpoints.weights import weight_files
from gptj.config import GPTJConfig
from gptj.errors import CheckpointError
from gptj.interop import mesh_transformer, tar_stream
from gptj.interop.fitting import fit
from gptj.interop.formats import MESH, FormatName, Place, find
from gptj.interop.tensors import StoredTensor
from gptj.layers.int4 import is_quantized
from gptj.model import GPTJForCausalLM
from gptj.storage.addresses import normalized
from gptj.storage.scratch import scratch_folder
from gptj.tokenizer import GPTJTokenizer

# mesh-transformer-jax's names for our configuration fields.
MESH_FIELDS = {
    "layers": "n_layer",
    "d_model": "n_embd",
    "n_heads": "n_head",
    "n_vocab": "vocab_size",
    "pe_rotary_dims": "rotary_dim",
    "seq": "n_positions",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A model verified to be a GPT-J; its values have not been read yet."""

    address: str
    format: FormatName
    config: GPTJConfig  # `architectures` names the class
    tensors: list[StoredTensor]  # in the model's order
    tokenizer: GPTJTokenizer | None
    training: Mapping[str, Any] | None  # training.json, if it is one of ours


@contextmanager
def open_source(
    address: str,
    *,
    format: FormatName | None = None,
    revision: str | None = None,
    config: str | None = None,
    tokenizer: str | None = None,
    scratch: str | Path | None = None,
) -> Iterator[Source]:
    """Open what an address holds, and check that it is a whole GPT-J.

    A folder with a manifest is first verified against it, and so read twice.

    Args:
        address: a folder, local or `s3://`, a hub id, or a `.tar.zst` file.
        format: None: detect it.
        config: a JSON file, of Hugging Face or mesh-transformer-jax, if the folder has none.
        tokenizer: a folder or hub id, if the source has none.
        scratch: a folder with room for an unpacked `.tar.zst`; None: the system's temporary folder.

    Raises:
        FileNotFoundError: if there is nothing at the address.
        CheckpointError: naming what is missing, damaged or inconsistent.
    """
    address = normalized(address)
    place = find(address, format, revision)
    given = None if config is None else _read_config(config)
    if tar_stream.is_stream(address):
        with scratch_folder(scratch) as folder:
            tar_stream.unpack(address, folder)
            unpacked = Place(str(folder), None, storage.list_files(str(folder)))
            if not mesh_transformer.is_checkpoint(unpacked.files):
                raise CheckpointError(f"{address} does not contain shard_0/0.npz")
            yield _source(address, unpacked, given, tokenizer)
    else:
        yield _source(address, place, given, tokenizer)


def _source(address: str, place: Place, given: GPTJConfig | None, tokenizer: str | None) -> Source:
    manifest = Manifest.read(place.address)
    if manifest is not None and place.address == address:  # not a partial download from the hub
        logger.info("verifying %s against its manifest", address)
        verify(place.address)
    names = {file.name for file in place.files}
    if place.format is None:
        layers = None if given is None else given.n_layer
        tensors = mesh_transformer.open_checkpoint(place.address, place.files, layers)
        config = given or _published_config(tensors, address)
    else:
        tensors = []
        for name in weight_files(place.address, names, manifest, place.format.kinds):
            tensors += place.format.open_file(storage.join(place.address, name))
        config = given or _folder_config(place, names)
        if place.format.name == "tensorflow":
            config.tie_word_embeddings = False  # this format never ties them
    if is_quantized(config):
        raise CheckpointError(
            f"{address} has quantized weights, which cannot be converted, merged or quantized "
            f"again; remedy: use the original model"
        )
    name = MESH if place.format is None else place.format.name
    logger.info("%s has the format %s", address, name)
    config, fitted = fit(tensors, config, address)
    if given is None and config.architectures == [GPTJForCausalLM.__name__]:
        config.add_end_tokens(ModelFolder(place.address, manifest))
    training = None
    if TRAINING in names and manifest is not None:
        training = json.loads(read_recorded(place.address, TRAINING, manifest))
    return Source(
        address, name, config, fitted, _tokenizer(place, names, tokenizer, config), training
    )


def _folder_config(place: Place, names: set[str]) -> GPTJConfig:
    if CONFIG not in names:
        raise CheckpointError(
            f"{place.address} has no {CONFIG}; remedy: give the model's configuration"
        )
    return _read_config(storage.join(place.address, CONFIG))


def _read_config(address: str) -> GPTJConfig:
    try:
        fields = json.loads(storage.read_bytes(address))
        if not isinstance(fields, dict):
            raise ValueError("it is not a JSON object")
        if "d_model" in fields:
            for name, wanted in (("pe", "rotary"), ("norm", "layernorm")):
                if fields.get(name) != wanted:
                    raise ValueError(f"a GPT-J needs {name}={wanted!r}, got {fields.get(name)!r}")
            fields = {ours: fields[name] for name, ours in MESH_FIELDS.items() if name in fields}
        return GPTJConfig.from_dict(fields)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{address}: {error}") from error


def _published_config(tensors: list[StoredTensor], address: str) -> GPTJConfig:
    """GPT-J-6B's, if the shapes match; weights do not reveal heads and rotary dimensions."""
    config = GPTJConfig()
    shape = next(t.shape for t in tensors if t.name == "transformer.wte.weight")
    layers = sum(t.name.endswith(".ln_1.weight") for t in tensors)
    if (*shape, layers) != (config.vocab_size, config.n_embd, config.n_layer):
        raise CheckpointError(
            f"{address} has {layers} layers and an embedding of shape {shape}, so it is not the "
            f"published GPT-J-6B; remedy: give its configuration, of mesh-transformer-jax or "
            f"Hugging Face"
        )
    return config


def _tokenizer(
    place: Place, names: set[str], address: str | None, config: GPTJConfig
) -> GPTJTokenizer | None:
    if address is None and "tokenizer.json" not in names and "vocab.json" not in names:
        logger.warning(
            "%s has no tokenizer, and none was given: importing without one", place.address
        )
        return None
    tokenizer = GPTJTokenizer.from_pretrained(address or place.address)
    tokenizer.check_rows(config.vocab_size, address or place.address)
    return tokenizer

"""Detect the format of an address's weights, or check the one the caller names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from gptj import storage
from gptj.checkpoints.folder import ADAPTER_CONFIG, TOKENIZER_FILES
from gptj.checkpoints.hub import locate
from gptj.checkpoints.weights import KINDS
from gptj.errors import CheckpointError
from gptj.interop import flax, mesh_transformer, tar_stream, tensorflow
from gptj.interop.huggingface import open_file as open_huggingface
from gptj.interop.tensors import StoredTensor
from gptj.storage import FileInfo
from gptj.storage.addresses import normalized

FormatName = Literal["huggingface", "mesh-transformer-jax", "flax", "tensorflow"]
MESH: FormatName = "mesh-transformer-jax"


@dataclass(frozen=True)
class Format:
    """A kind of model folder: its weight files, and the function that opens one."""

    name: FormatName
    kinds: Sequence[tuple[str, str]]  # a single file, and the index of several
    patterns: Sequence[
        Sequence[str]
    ]  # to download from the hub; the first set with weights is used
    open_file: Callable[[str], list[StoredTensor]]

    def matches(self, files: Iterable[FileInfo]) -> bool:
        looked_for = {name for kind in self.kinds for name in kind}
        return any(file.name in looked_for for file in files)


FOLDERS = (
    Format(
        "huggingface",
        KINDS,
        (("*.safetensors",), ("pytorch_model*.bin",)),
        open_huggingface,
    ),
    Format(
        "flax",
        ((flax.SINGLE_FILE, flax.INDEX_FILE),),
        (("flax_model*.msgpack",),),
        flax.open_file,
    ),
    Format(
        "tensorflow",
        ((tensorflow.SINGLE_FILE, tensorflow.INDEX_FILE),),
        (("tf_model*.h5",),),
        tensorflow.open_file,
    ),
)
FORMATS: tuple[FormatName, ...] = (*(each.name for each in FOLDERS), MESH)
_SMALL_FILES = ("*.json", *TOKENIZER_FILES)


@dataclass(frozen=True)
class Place:
    """Where weights are, and in which format (None: mesh-transformer-jax)."""

    address: str  # a folder, or one file of mesh-transformer-jax in a tar.zst
    format: Format | None
    files: Sequence[FileInfo]


def find(address: str, name: FormatName | None, revision: str | None) -> Place:
    """Find the weights at a folder, an `s3://` address, a hub id or a `.tar.zst` file.

    Raises:
        FileNotFoundError: if there is nothing.
        CheckpointError: if the files have none of the formats, or not the given one; or are an
            adapter's.
        gptj.storage.addresses.AddressError: if the address is invalid.
    """
    address = normalized(address)
    if tar_stream.is_stream(address):
        if name not in (None, MESH) or revision is not None:
            raise ValueError(
                f"{address} is a file in the format {MESH} and has no revisions; drop "
                + (f"the format {name}" if name not in (None, MESH) else f"revision {revision}")
            )
        return Place(address, None, [])
    wanted = [each for each in FOLDERS if name in (None, each.name)]
    for each in wanted:
        for patterns in each.patterns:
            folder = locate(address, revision=revision, patterns=(*_SMALL_FILES, *patterns))
            files = storage.list_files(folder)
            if each.matches(files):
                return Place(folder, each, files)
            if folder == address:  # not the hub: all files are there
                break
    if name in (None, MESH):
        folder = locate(address, revision=revision, patterns=_SMALL_FILES)
        files = storage.list_files(folder)
        if mesh_transformer.is_checkpoint(files):
            return Place(folder, None, files)
    if any(file.name == ADAPTER_CONFIG for file in files):
        raise CheckpointError(
            f"{address} is an adapter, without the weights of its base model; remedy: merge the "
            f"two first, jobs/merge_adapter.py BASE {address} DESTINATION, and use DESTINATION"
        )
    looked_for = [kind for each in wanted for names in each.kinds for kind in names]
    if name in (None, MESH):
        looked_for.append("shard_0/0.npz")
    raise CheckpointError(
        f"{address} has no weights in a format we can read: looked for {', '.join(looked_for)}"
    )

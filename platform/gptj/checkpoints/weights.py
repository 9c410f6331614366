"""Weights of a model folder: tensors into safetensors files and back, at most one copy in memory.

We write the format ourselves since a model that is spread over processes arrives parameter by
parameter, and read it ourselves since S3 has no memory map.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import pickle
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptj import storage
from gptj.checkpoints.manifest import FolderWriter, Manifest, read_verified
from gptj.checkpoints.mapping import map_stretch
from gptj.checkpoints.streaming import Part, merged, stream
from gptj.checkpoints.tensor_file import DTYPES, Header, StoredTensor, read_header
from gptj.errors import CheckpointError
from gptj.serialization.json_object import parse_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_FILE = "model-{:05}-of-{:05}.safetensors"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
KINDS = ((SINGLE_FILE, INDEX_FILE), (PICKLE_FILE, PICKLE_INDEX_FILE))
SHARD_BYTES = 5 * 10**9
RUN_BYTES = 16 * 2**20  # of small tensors that are read together
FILES_AT_ONCE = 4  # from S3: each is hashed by a thread of its own

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written: known before its values are."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def one_dtype(numbers: Mapping[torch.dtype, int], preferred: torch.dtype | None) -> torch.dtype:
    """The dtype for weights that are stored in several.

    Args:
        numbers: how many are stored in each.
        preferred: the configuration's, which wins if some are stored in it; or else the majority's.
    """
    if preferred is not None and preferred in numbers:
        return preferred
    return max(numbers, key=lambda dtype: numbers[dtype])


def write_weights(
    writer: FolderWriter,
    specs: Sequence[TensorSpec],
    tensors: Iterable[Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors, which come in the order of `specs`, one at a time, into one file or shards.

    Each is converted to its spec's dtype; a tensor that does not have its spec's shape is a bug.
    """
    shards = split_shards(specs, shard_bytes)
    source = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SHARD_FILE.format(number, len(shards))
        if len(shards) == 1:
            name = SINGLE_FILE
        write_file(writer, name, shard, source)
        weight_map |= {spec.name: name for spec in shard}
    if len(shards) > 1:
        total = sum(spec.size for spec in specs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        writer.write(INDEX_FILE, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


def write_file(
    writer: FolderWriter, name: str, specs: Sequence[TensorSpec], tensors: Iterator[Tensor]
) -> None:
    """Write one safetensors file, with the next tensors that there are; as write_weights."""
    header = _header(specs)
    with writer.open(name, len(header) + sum(spec.size for spec in specs)) as file:
        file.write(header)
        for spec in specs:
            file.write(_bytes_of(next(tensors), spec))


def split_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """The tensors in their order, in as few files of at most `shard_bytes` as that allows.

    A tensor that is larger has a file of its own.
    """
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.size > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.size
    return shards


def read_weights(
    folder: str,
    manifest: Manifest | None,
    *,
    names: Collection[str] | None = None,
    verify: bool = True,
    kinds: Sequence[tuple[str, str]] = KINDS,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model folder with its name, in the dtype that it is stored in, on the CPU.

    The order is any. Local files are mapped into memory, each tensor on its own, so that its
    memory goes with it; with a manifest all are hashed first, side by side. From S3 the bytes go
    into the tensors' own memory, several files at a time, while the last tensors are used; a
    file's hash is known, and checked, when its last tensor has been given out. Tensors may be
    views of shared memory, and may be written to.

    Args:
        names: of the folder's files; None: list them.
        verify: compare the SHA-256 of each file with the manifest; sizes always are.
        kinds: see weight_files.

    Raises:
        CheckpointError: naming the file that is missing, damaged or altered.
    """
    if names is None:
        names = {file.name for file in storage.list_files(folder)}
    files = weight_files(folder, names, manifest, kinds)
    if manifest is not None:
        for name in files:
            manifest.record(name)  # refuses what was added later
    if storage.is_s3(folder):
        yield from _read_remote(folder, files, manifest, verify)
        return
    if manifest is not None and verify:
        manifest.check_files(files)
    for name in files:
        address = storage.join(folder, name)
        yield from _read_pickle(address) if name.endswith(".bin") else _read_mapped(address)


def weight_files(
    folder: str,
    names: Collection[str],
    manifest: Manifest | None,
    kinds: Sequence[tuple[str, str]] = KINDS,
) -> list[str]:
    """The files with weights among the `names` of a folder: of the first kind that it has.

    Args:
        manifest: the folder's, which an index is compared with.
        kinds: names of a single file, and of the index of several.

    Raises:
        CheckpointError: if there are none, one is missing, or the index is damaged.
    """
    for single, index in kinds:
        if single in names:
            return [single]
        if index in names and (recorded := _recorded_shards(manifest, index)):
            return recorded
        if index in names:
            address = storage.join(folder, index)
            weight_map = parse_object(read_verified(folder, index, manifest), address).get(
                "weight_map"
            )
            if not isinstance(weight_map, dict) or not all(
                isinstance(shard, str) for shard in weight_map.values()
            ):
                raise CheckpointError(f"{address} is damaged: it has no map of weights to files")
            shards = sorted(set(weight_map.values()))
            for shard in shards:
                if shard not in names:  # which also keeps an index from naming files elsewhere
                    raise CheckpointError(f"{folder} is incomplete: {shard} is missing")
            return shards
    looked_for = ", ".join(name for kind in kinds for name in kind)
    raise CheckpointError(f"{folder} has no weights: there is none of {looked_for}")


def _recorded_shards(manifest: Manifest | None, index: str) -> list[str]:
    """The shards that we wrote, by the manifest: the index need not be read."""
    if manifest is None or index != INDEX_FILE:
        return []
    names = [n for n in manifest.files if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", n)]
    expected = [SHARD_FILE.format(number + 1, len(names)) for number in range(len(names))]
    return expected if sorted(names) == expected else []


def _read_mapped(address: str) -> Iterator[tuple[str, Tensor]]:
    tensors = read_header(address).tensors
    with open(address, "rb") as file:
        for tensor in tensors:
            yield tensor.name, tensor.view(map_stretch(file.fileno(), tensor.start, tensor.size))


def _read_remote(
    folder: str, files: Sequence[str], manifest: Manifest | None, verify: bool
) -> Iterator[tuple[str, Tensor]]:
    if pickles := [name for name in files if name.endswith(".bin")]:
        raise CheckpointError(
            f"{storage.join(folder, pickles[0])} is a pickle, which is read from local folders "
            f"only; convert it to safetensors"
        )
    headers: dict[str, Header] = {}

    def read_and_check(name: str) -> None:
        try:
            headers[name] = read_header(storage.join(folder, name))
        except storage.NotFoundError as error:
            raise CheckpointError(f"{folder} is incomplete: {name} is missing") from error
        if manifest is not None:
            manifest.check_size(name, headers[name].file_size)

    storage.for_each(read_and_check, files)  # all before gigabytes are read
    expected = manifest if verify else None
    with ThreadPoolExecutor(storage.PARALLEL) as fetchers:
        sources = [_read_one(folder, name, headers[name], expected, fetchers) for name in files]
        yield from merged(sources, min(FILES_AT_ONCE, len(files)))


def _read_one(
    folder: str, name: str, header: Header, manifest: Manifest | None, fetchers: Executor
) -> Iterator[tuple[str, Tensor]]:
    address = storage.join(folder, name)
    digest, size = hashlib.sha256(header.content), len(header.content)
    runs = _runs(header.tensors)
    buffers: deque[mmap.mmap] = deque()

    def parts() -> Iterator[Part]:
        """Cut where S3 keeps its own parts, wherever tensors begin and end."""
        part: Part = []
        position = len(header.content)
        for run in runs:
            buffers.append(_memory(run[-1].end - run[0].start))
            rest = memoryview(buffers[-1])
            while rest:
                piece = rest[: storage.PART_BYTES - position % storage.PART_BYTES]
                part.append(piece)
                rest = rest[len(piece) :]
                position += len(piece)
                if position % storage.PART_BYTES == 0:
                    yield part
                    part = []
        if part:
            yield part

    # Each file has enough asked for to keep all fetchers busy, if it waits for its first part.
    coming = stream(address, len(header.content), parts(), fetchers, storage.PARALLEL)
    for run in runs:
        start = run[0].start
        while size < run[-1].end:
            for piece in next(coming):
                size += len(piece)
                if manifest is not None:
                    digest.update(piece)
                del piece
        buffer = buffers.popleft()
        views = deque((each.name, each.view(buffer, each.start - start)) for each in run)
        del buffer  # it goes with the last of its tensors
        while views:
            yield views.popleft()
    if manifest is not None:
        manifest.check_content(name, size, digest.hexdigest())


def _memory(size: int) -> mmap.mmap:
    """Bytes that are the system's again at once when nobody uses them.

    In pages of the usual size: to find large ones in a full memory took three times as long as
    filling it.
    """
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _read_pickle(address: str) -> Iterator[tuple[str, Tensor]]:
    try:
        with open(address, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # which a memory map needs; older ones are not
        state = torch.load(address, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{address} is damaged, or holds more than tensors and could run code: refused"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(f"{address} is damaged: {error}") from error
    yield from state.items()


def _runs(tensors: list[StoredTensor]) -> list[list[StoredTensor]]:
    """Neighbours that are read together: several small tensors, or one large."""
    runs: list[list[StoredTensor]] = []
    for tensor in tensors:
        if tensor.size == 0:
            continue
        if runs and tensor.end - runs[-1][0].start <= RUN_BYTES:
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
    return runs


def _header(specs: Sequence[TensorSpec]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        fields[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.size],
        }
        offset += spec.size
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor, spec: TensorSpec) -> memoryview:
    assert tensor.shape == spec.shape, f"{spec.name}: {tuple(tensor.shape)} and not {spec.shape}"
    flat = tensor.detach().to("cpu", spec.dtype).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data

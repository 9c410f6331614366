"""A model folder's weights: write tensors to safetensors files and read them, one copy in memory.

We write the format ourselves because a sharded model arrives parameter by parameter, and read it
ourselves because S3 cannot be memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptj import storage
from gptj.checkpoints.manifest import FolderWriter, HashingFile, Manifest, read_verified
from gptj.checkpoints.mapping import map_range
from gptj.checkpoints.pickled import state_dict
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
RUN_BYTES = 16 * 2**20  # small tensors are read together up to this size
FILES_AT_ONCE = 4  # from S3; each is hashed by its own thread

PREFIX = "transformer."  # of the base model's parameters in a model with a head; may be left out
# Buffers of old checkpoints, which are constants: the causal mask and its value.
OLD_BUFFERS = (".attn.bias", ".attn.masked_bias")

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written; known before its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def one_dtype(numbers: Mapping[torch.dtype, int], preferred: torch.dtype | None) -> torch.dtype:
    """The dtype to use for weights stored in several dtypes.

    Args:
        numbers: how many numbers are stored in each dtype.
        preferred: the configuration's; wins if any weight has it, else the majority's does.
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
    """Write tensors, one at a time and in the order of `specs`, into one file or shards.

    Each is converted to its spec's dtype; a shape that differs from its spec's is a bug.
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
    """Write one safetensors file from the next `len(specs)` tensors; see write_weights."""
    header = _header(specs)
    with writer.open(name, len(header) + sum(spec.size for spec in specs)) as file:
        write_tensors(file, specs, tensors)


def write_tensors(
    file: HashingFile, specs: Sequence[TensorSpec], tensors: Iterator[Tensor]
) -> None:
    """A safetensors file's content, from the next `len(specs)` tensors."""
    file.write(_header(specs))
    for spec in specs:
        file.write(_bytes_of(next(tensors), spec))


def split_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Split the tensors, in order, into as few files of at most `shard_bytes` as possible.

    A larger tensor gets its own file.
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
    """Every tensor of a model folder with its name, in its stored dtype, on the CPU.

    In no particular order. Local files are memory-mapped tensor by tensor, so that each tensor's
    memory is freed with it; with a manifest all files are first hashed in parallel. From S3 several
    files are read concurrently, ahead of the consumer, straight into the tensors' memory; a file's
    hash is checked once its last tensor has been yielded. Tensors may be views of shared memory,
    and may be written to.

    Args:
        names: the folder's files; None: list them.
        verify: check each file's SHA-256 against the manifest; sizes are always checked.
        kinds: see weight_files.

    Raises:
        CheckpointError: naming the file that is missing, damaged or altered, or the two that have
            one tensor.
    """
    if names is None:
        names = {file.name for file in storage.list_files(folder)}
    files = weight_files(folder, names, manifest, kinds)
    if manifest is not None:
        for name in files:
            manifest.record(name)  # rejects files added later
    if storage.is_s3(folder):
        yield from _read_remote(folder, files, manifest, verify)
        return
    if manifest is not None and verify:
        manifest.check_files(files)
    once = _Once()
    for name in files:
        address = storage.join(folder, name)
        reading = _read_pickle(address) if name.endswith(".bin") else _read_mapped(address)
        for tensor, values in reading:
            once.check(tensor, address)
            yield tensor, values
            del values  # before the next one is read


def weight_files(
    folder: str,
    names: Collection[str],
    manifest: Manifest | None,
    kinds: Sequence[tuple[str, str]] = KINDS,
) -> list[str]:
    """The weight files among a folder's `names`: those of the first kind that it has.

    Args:
        manifest: the folder's; an index is checked against it.
        kinds: pairs of names: of a single file, and of an index of shards.

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
                raise CheckpointError(f"{address} is damaged: it has no weight_map")
            shards = sorted(set(weight_map.values()))
            for shard in shards:
                if shard not in names:  # this also rejects paths outside the folder
                    raise CheckpointError(f"{folder} is incomplete: {shard} is missing")
            return shards
    looked_for = ", ".join(name for kind in kinds for name in kind)
    raise CheckpointError(f"{folder} has no weights: looked for {looked_for}")


def _recorded_shards(manifest: Manifest | None, index: str) -> list[str]:
    """The shards that we wrote, from the manifest, without reading the index."""
    if manifest is None or index != INDEX_FILE:
        return []
    names = [n for n in manifest.files if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", n)]
    expected = [SHARD_FILE.format(number + 1, len(names)) for number in range(len(names))]
    return expected if sorted(names) == expected else []


class _Once:
    """Refuses tensors that several files have, or one under both of its names."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, str]] = {}  # name and file by the name without prefix

    def check(self, name: str, address: str) -> None:
        """CheckpointError if there was this tensor before; which of them counts is unknown."""
        if name.endswith(OLD_BUFFERS):
            return
        before = self._found.setdefault(name.removeprefix(PREFIX), (name, address))
        if before != (name, address):
            raise CheckpointError(
                f"{before[1]} has {before[0]}, and {address} has {name}, which is the same tensor; "
                f"remedy: delete the one that is not the model's"
            )


def _read_mapped(address: str) -> Iterator[tuple[str, Tensor]]:
    tensors = read_header(address).tensors
    with open(address, "rb") as file:
        for tensor in tensors:
            yield tensor.name, tensor.view(map_range(file.fileno(), tensor.start, tensor.size))


def _read_remote(
    folder: str, files: Sequence[str], manifest: Manifest | None, verify: bool
) -> Iterator[tuple[str, Tensor]]:
    if pickles := [name for name in files if name.endswith(".bin")]:
        raise CheckpointError(
            f"{storage.join(folder, pickles[0])} is a pickle, which can only be read from local "
            f"folders; remedy: convert it to safetensors"
        )
    headers: dict[str, Header] = {}

    def read_and_check(name: str) -> None:
        try:
            headers[name] = read_header(storage.join(folder, name))
        except storage.NotFoundError as error:
            raise CheckpointError(f"{folder} is incomplete: {name} is missing") from error
        if manifest is not None:
            manifest.check_size(name, headers[name].file_size)

    storage.for_each(read_and_check, files)  # all headers, before gigabytes are read
    once = _Once()
    for name in files:
        for tensor in headers[name].tensors:
            once.check(tensor.name, storage.join(folder, name))
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
        """Split at S3's own part boundaries, regardless of tensor boundaries."""
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

    # Each file requests enough to keep all fetchers busy if it waits for its first part.
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
        del buffer  # freed with the last of its tensors
        while views:
            yield views.popleft()
    if manifest is not None:
        manifest.check_content(name, size, digest.hexdigest())


def _memory(size: int) -> mmap.mmap:
    """Memory that returns to the system as soon as it is unused.

    Without huge pages: finding them in nearly full memory took three times as long as filling it.
    """
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _read_pickle(address: str) -> Iterator[tuple[str, Tensor]]:
    with open(address, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # mmap needs this; PyTorch < 1.6 did not zip
    load = partial(torch.load, address, map_location="cpu", weights_only=True, mmap=zipped)
    yield from state_dict(address, load).items()


def _runs(tensors: list[StoredTensor]) -> list[list[StoredTensor]]:
    """Group neighbours to read together: several small tensors, or one large one."""
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

"""Weights of a model folder: tensors into safetensors files and back, at most one copy in memory.

The format (https://github.com/huggingface/safetensors#format): 8 bytes of the header's length,
little-endian; the header, JSON of names, dtypes, shapes and offsets; then the tensors' bytes.
We write it ourselves since a model that is spread over processes arrives parameter by parameter,
and read it ourselves since S3 has no memory map.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import pickle
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptj import storage
from gptj.manifest import CheckpointError, FolderWriter, Manifest

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
KINDS = ((SINGLE_FILE, INDEX_FILE), (PICKLE_FILE, PICKLE_INDEX_FILE))
SHARD_BYTES = 5 * 10**9
READ_BYTES = 64 * 2**20  # read together, if tensors are smaller
HEADER_LIMIT = 100 * 2**20  # as the reference implementation's

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
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
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        if len(shards) == 1:
            name = SINGLE_FILE
        header = _header(shard)
        with writer.open(name, len(header) + sum(spec.size for spec in shard)) as file:
            file.write(header)
            for spec in shard:
                file.write(_bytes_of(next(source), spec))
                weight_map[spec.name] = name
    if len(shards) > 1:
        total = sum(spec.size for spec in specs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        writer.write(INDEX_FILE, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


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


def read_weights(folder: str, manifest: Manifest | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model folder with its name, in the dtype that it is stored in, on the CPU.

    Local files are mapped into memory: nothing is read until a tensor is used, unless there is a
    manifest, whose hashes are checked first. From S3 the bytes go into the tensors' own memory,
    the next ones while the last are used; there the hash is known, and checked, when a file's last
    tensor has been given out. Tensors may be views of shared memory, and may be written to.

    Raises:
        CheckpointError: naming the file that is missing, damaged or altered.
    """
    names = {file.name for file in storage.list_files(folder)}
    for name in weight_files(folder, names):
        address = storage.join(folder, name)
        if name.endswith(".bin"):
            if storage.is_s3(folder):
                raise CheckpointError(
                    f"{address} is a pickle, which is read from local folders only; "
                    f"convert it to safetensors"
                )
            if manifest is not None:
                _check_mapped(name, _map(address), manifest)
            yield from _read_pickle(address)
        elif storage.is_s3(folder):
            yield from _read_remote(address, name, manifest)
        else:
            yield from _read_mapped(address, name, manifest)


def weight_files(
    folder: str, names: set[str], kinds: Sequence[tuple[str, str]] = KINDS
) -> list[str]:
    """The files with weights among the `names` of a folder: of the first kind that it has.

    Args:
        kinds: names of a single file, and of the index of several.

    Raises:
        CheckpointError: if there are none, one is missing, or the index is damaged.
    """
    for single, index in kinds:
        if single in names:
            return [single]
        if index in names:
            content = storage.read_bytes(storage.join(folder, index))
            try:
                shards = sorted(set(json.loads(content)["weight_map"].values()))
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
                raise CheckpointError(f"{folder}/{index} is damaged: {error!r}") from error
            for shard in shards:
                if shard not in names:  # which also keeps an index from naming files elsewhere
                    raise CheckpointError(f"{folder} is incomplete: {shard} is missing")
            return shards
    looked_for = ", ".join(name for kind in kinds for name in kind)
    raise CheckpointError(f"{folder} has no weights: there is none of {looked_for}")


def index_safetensors(address: str) -> list[tuple[TensorSpec, int]]:
    """The tensors of a safetensors file, local or on S3, and where each begins, in bytes.

    Raises:
        CheckpointError: if the header is damaged, or the file is longer or shorter than it says.
    """
    total = storage.size(address)
    if total < 8:
        raise CheckpointError(f"{address} is cut off: it has fewer than 8 bytes")
    length = int.from_bytes(storage.read_bytes(address, 0, 8), "little")
    readable = length <= min(HEADER_LIMIT, total - 8)
    entries = _parse_header(storage.read_bytes(address, 8, length) if readable else b"", address)
    data = 8 + length
    _check_end(entries, data, total, address)
    return [(TensorSpec(e.name, e.shape, e.dtype), data + e.start) for e in entries]


def _read_mapped(
    address: str, name: str, manifest: Manifest | None
) -> Iterator[tuple[str, Tensor]]:
    mapped = _map(address)
    if manifest is not None:
        _check_mapped(name, mapped, manifest)
    start = int.from_bytes(mapped[:8], "little")
    entries = _parse_header(mapped[8 : 8 + start] if start <= HEADER_LIMIT else b"", address)
    data = 8 + start
    _check_end(entries, data, len(mapped), address)
    for entry in entries:
        yield entry.name, entry.view(mapped, data + entry.start)


def _map(address: str) -> mmap.mmap:
    with open(address, "rb") as file:
        if storage.size(address) < 8:
            raise CheckpointError(f"{address} is cut off: it has fewer than 8 bytes")
        # Private: who trains the model writes to memory, and never to the file.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _check_mapped(name: str, mapped: mmap.mmap, manifest: Manifest) -> None:
    manifest.check_content(name, len(mapped), hashlib.sha256(mapped).hexdigest())


def _read_remote(
    address: str, name: str, manifest: Manifest | None
) -> Iterator[tuple[str, Tensor]]:
    total = storage.size(address)
    if total < 8:
        raise CheckpointError(f"{address} is cut off: it has fewer than 8 bytes")
    prefix = storage.read_bytes(address, 0, 8)
    length = int.from_bytes(prefix, "little")
    header = (
        storage.read_bytes(address, 8, length) if length <= min(HEADER_LIMIT, total - 8) else b""
    )
    entries = _parse_header(header, address)
    data = 8 + length
    _check_end(entries, data, total, address)
    digest = hashlib.sha256(prefix + header)

    def read(run: list[_Entry]) -> bytearray:
        buffer = bytearray(run[-1].end - run[0].start)
        storage.read_into(address, data + run[0].start, memoryview(buffer))
        return buffer

    runs = _runs(entries)
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read, runs[0]) if runs else None
        for run, following in zip(runs, [*runs[1:], None], strict=True):
            assert coming is not None
            buffer = coming.result()
            coming = reader.submit(read, following) if following is not None else None
            digest.update(buffer)
            for entry in run:
                yield entry.name, entry.view(buffer, entry.start - run[0].start)
    if manifest is not None:
        manifest.check_content(name, total, digest.hexdigest())


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


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes, from the end of the header
    end: int

    def view(self, buffer: Any, offset: int) -> Tensor:
        """The tensor in a writable buffer of bytes; they share memory."""
        count = torch.Size(self.shape).numel()
        if count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(buffer, dtype=self.dtype, count=count, offset=offset)
        return flat.view(self.shape)


def _parse_header(header: bytes, address: str) -> list[_Entry]:
    """The tensors by their place in the file."""
    try:
        fields = json.loads(header)
        fields.pop("__metadata__", None)
        entries = [
            _Entry(name, DTYPES[each["dtype"]], tuple(each["shape"]), *each["data_offsets"])
            for name, each in fields.items()
        ]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{address} is no readable safetensors file: {error!r}") from error
    entries.sort(key=lambda entry: entry.start)
    end = 0
    for entry in entries:
        size = torch.Size(entry.shape).numel() * entry.dtype.itemsize
        if entry.start != end or entry.end - entry.start != size:
            raise CheckpointError(f"{address} is damaged: the place of {entry.name} is wrong")
        end = entry.end
    return entries


def _check_end(entries: list[_Entry], data: int, total: int, address: str) -> None:
    expected = data + (entries[-1].end if entries else 0)
    if total != expected:
        raise CheckpointError(
            f"{address} has {total} bytes and its header promises {expected}: it is "
            + ("cut off" if total < expected else "damaged")
        )


def _runs(entries: list[_Entry]) -> list[list[_Entry]]:
    """Neighbours that are read together: many small tensors, or one large."""
    runs: list[list[_Entry]] = []
    for entry in entries:
        if runs and entry.end - runs[-1][0].start <= READ_BYTES:
            runs[-1].append(entry)
        else:
            runs.append([entry])
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

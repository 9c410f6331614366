"""Damaged files of other programs: an error of ours that names the file, in little memory.

Every input is made from a good file by a seeded generator: bits flipped, cut off, bytes put in,
numbers in headers made huge. A reader either finds the tensors or raises; it never crashes, hangs,
or asks for more memory than the file has bytes.
"""

from __future__ import annotations

import io
import math
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import msgpack
import numpy as np
import pytest
import torch
import zstandard

from gptj.checkpoints.tensor_file import read_header
from gptj.checkpoints.weights import TensorSpec
from gptj.errors import CheckpointError
from gptj.interop import tar_stream
from gptj.interop.hdf5 import Group, index_hdf5, plan_hdf5
from gptj.interop.msgpack_file import index_msgpack, plan_msgpack
from gptj.interop.npz import index_npz, open_member
from gptj.interop.pickles import index_pickle
from gptj.interop.tensors import StoredTensor
from gptj.storage import StorageError

TENSORS = {
    "h/0/kernel": torch.arange(60.0).view(6, 10),
    "h/0/bias": torch.arange(6.0),
    "wte": torch.arange(40.0).view(20, 2).to(torch.float16),
}
SPECS = {name: TensorSpec(name, tuple(t.shape), t.dtype) for name, t in TENSORS.items()}
LARGE = [2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
PYTHON_BYTES = 4 * 2**20  # for parsing; files here have some kilobytes

Index = Callable[[str], list[StoredTensor]]


def open_npz(address: str) -> list[StoredTensor]:
    return [open_member(member) for member in index_npz(address)]


def open_safetensors(address: str) -> list[StoredTensor]:
    for each in read_header(address).tensors:
        assert each.end <= Path(address).stat().st_size
    return []


def filled(pieces: list) -> bytes:  # type: ignore[type-arg]
    content = b""
    for piece in pieces:
        content += piece.header
        if piece.spec is not None:
            content += TENSORS[piece.spec.name].numpy().tobytes()
    return content


def good_npz() -> bytes:
    content = io.BytesIO()
    np.savez(content, *(tensor.numpy() for tensor in TENSORS.values()))
    return content.getvalue()


def good_hdf5() -> bytes:
    return filled(plan_hdf5([Group("/", list(SPECS.items()), {"layer_names": list(SPECS)})]))


def good_pickle() -> bytes:
    content = io.BytesIO()
    torch.save(TENSORS, content)
    return content.getvalue()


def good_tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        member = tarfile.TarInfo("step_1/shard_0/0.npz")
        member.size = 700
        tar.addfile(member, io.BytesIO(bytes(range(250)) * 4))
    return content.getvalue()


def mutations(content: bytes, count: int, seed: int) -> list[bytes]:
    """Damaged copies: mostly near the front and the end, where headers are."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        copy = bytearray(content)
        place = int(random.integers(len(copy)))
        if number % 2:
            edge = min(len(copy), 600)
            place = int(random.integers(edge)) * (1 if number % 4 == 1 else -1) % len(copy)
        kind = random.integers(6)
        if kind == 0:
            copy = copy[:place]
        elif kind == 1:
            copy[place : place + 4] = struct.pack("<I", LARGE[random.integers(4)])
        elif kind == 2:
            copy[place : place + 8] = struct.pack(">Q", LARGE[random.integers(len(LARGE))])
        elif kind == 3:
            copy[place:place] = random.bytes(int(random.integers(1, 20)))
        else:
            for _ in range(random.integers(1, 4)):
                at = (place + int(random.integers(16))) % len(copy)
                copy[at] ^= 1 << int(random.integers(8))
        found.append(bytes(copy))
    return found


def attempt(index: Index, path: Path, content: bytes) -> str | None:
    """Open a file and read all of it; what it raised, if that is an error of ours."""
    path.write_bytes(content)
    try:
        for tensor in index(str(path)):
            assert tensor.size <= len(content), f"{tensor.name} is larger than the file"
            values = tensor.load(tensor.dtype)
            assert math.prod(values.shape) == math.prod(tensor.shape)
    except (CheckpointError, StorageError) as error:
        assert path.name in str(error), error
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "good", "count"),
    [
        (open_npz, good_npz, 400),
        (index_msgpack, lambda: filled(plan_msgpack(SPECS)), 400),
        (index_hdf5, good_hdf5, 12),  # each starts a process
        (index_pickle, good_pickle, 150),
    ],
    ids=["npz", "msgpack", "hdf5", "pickle"],
)
def test_a_damaged_file_raises_our_error(
    index: Index, good: Callable[[], bytes], count: int, tmp_path: Path
) -> None:
    content = good()
    assert attempt(index, tmp_path / "file", content) is None
    tracemalloc.start()
    try:
        errors = [attempt(index, tmp_path / "file", each) for each in mutations(content, count, 0)]
        assert tracemalloc.get_traced_memory()[1] < PYTHON_BYTES
    finally:
        tracemalloc.stop()
    assert sum(error is not None for error in errors) > count / 4


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [True, False], ids=["outside", "inside"])
def test_a_damaged_stream_raises_our_error(compressed: bool, tmp_path: Path) -> None:
    """Damage of the compressed bytes, and of what they hold."""
    path = tmp_path / "file.tar.zst"
    content = good_tar()
    errors = 0
    whole = zstandard.compress(content)
    damaged = mutations(whole if compressed else content, 200, 1)
    for number, each in enumerate(damaged):
        path.write_bytes(each if compressed else zstandard.compress(each))
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            tar_stream.unpack(str(path), folder)
        except (CheckpointError, OSError) as error:
            assert "file.tar.zst" in str(error) or "no room" in str(error), error
            errors += 1
        # Nothing is ever written anywhere else.
        assert all(p.suffix == ".npz" or p.is_dir() for p in folder.rglob("*"))
    assert errors > 50


def test_huge_claimed_sizes_are_refused_by_name(tmp_path: Path) -> None:
    """Whole and well-formed files, but for one number."""

    def array(shape: list[int], data: bytes, dtype: str = "float32") -> msgpack.ExtType:
        return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))

    refused = {
        "array": msgpack.packb({"a": array([2**40, 2**40], b"1234")}),
        "short": msgpack.packb({"a": array([2], b"1234")}),
        "dtype": msgpack.packb({"a": array([1], b"1234", "object")}),
        "value": msgpack.packb({"a": 3}),
        "list": msgpack.packb([array([1], b"1234")]),
        "key": msgpack.packb({"a/b": array([1], b"1234")}),
        "map": b"\xdf\xff\xff\xff\xff\xa1a" + msgpack.packb(array([1], b"1234")),
        "ext": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
        "more": msgpack.packb({"a": array([1], b"1234")}) + b"\x80",
        "empty": b"",
    }
    deep: object = array([1], b"1234")
    for _ in range(200):
        deep = {"a": deep}
    refused["deep"] = msgpack.packb(deep)
    pieces = {"__msgpack_chunked_array__": True, "shape": {"0": 2**50}, "chunks": {}}
    refused["pieces"] = msgpack.packb({"a": pieces})
    for name, content in refused.items():
        assert attempt(index_msgpack, tmp_path / name, content) is not None, name


def npz(name: str, header: str, data: bytes, **fields: int) -> bytes:
    content = io.BytesIO()
    text = header.encode()
    member = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data
    with zipfile.ZipFile(content, "w", **fields) as archive:  # type: ignore[arg-type]
        archive.writestr(name, member)
    return content.getvalue()


def test_arrays_that_numpy_would_not_write_are_refused(tmp_path: Path) -> None:
    plain = "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }"
    assert attempt(open_npz, tmp_path / "good", npz("arr_0.npy", plain, b"1234")) is None
    refused = {
        "shape": npz("arr_0.npy", plain.replace("(1,)", f"({10**17}, {10**17})"), b"1234"),
        "objects": npz("arr_0.npy", plain.replace("<f4", "|O"), b"1234"),
        "code": npz("arr_0.npy", plain.replace("(1,)", "__import__('os')"), b"1234"),
        "name": npz("../arr_0.npy", plain, b"1234"),
        "gap": npz("arr_1.npy", plain, b"1234"),
        "compressed": npz("arr_0.npy", plain, b"1234", compression=zipfile.ZIP_DEFLATED),
        "big-endian": npz("arr_0.npy", plain.replace("<", ">"), b"1234"),
    }
    for name, content in refused.items():
        assert attempt(open_npz, tmp_path / name, content) is not None, name
    flipped = bytearray(npz("arr_0.npy", plain, b"1234"))
    flipped[flipped.index(b"1234")] ^= 1
    assert "CRC" in (attempt(open_npz, tmp_path / "flipped", bytes(flipped)) or "")


def test_a_pickle_that_claims_more_numbers_than_it_stores_is_refused(tmp_path: Path) -> None:
    """A number that is repeated without end is small in the file, and would not be in memory."""
    content = io.BytesIO()
    torch.save({"wte": torch.zeros(1).expand(10**6, 10**6)}, content)
    error = attempt(index_pickle, tmp_path / "file", content.getvalue())
    assert error is not None
    assert "(1000000, 1000000), but 1 stored numbers" in error


@pytest.mark.parametrize(
    "tensor",
    [
        torch.complex(torch.arange(6.0), torch.arange(6.0)).conj().imag,  # a negated view
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(12.0).view(3, 4)[1:, ::2],
        torch.nn.Parameter(torch.arange(3.0)),
    ],
    ids=["negated", "transposed", "a part", "parameter"],
)
def test_views_in_pickles_are_what_pytorch_loads(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"wte": tensor}, tmp_path / "file")
    (found,) = index_pickle(str(tmp_path / "file"))
    expected = torch.load(tmp_path / "file", weights_only=True)["wte"]
    assert torch.equal(found.load(torch.float32), expected)
    assert torch.equal(found.load(torch.float16), expected.to(torch.float16))


@pytest.mark.slow
def test_hdf5_files_that_point_elsewhere_are_refused(tmp_path: Path) -> None:
    """Links, arrays in other files, and arrays that would grow when they are read."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 10)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.zeros(3)
    writers: dict[str, Callable[[h5py.File], object]] = {
        "link": lambda f: f.__setitem__("x", h5py.ExternalLink("other.h5", "/x")),
        "soft": lambda f: f.__setitem__("x", h5py.SoftLink("/y")),
        "external": lambda f: f.create_dataset("x", (15,), "f4", external=str(secret)),
        "virtual": lambda f: f.create_virtual_dataset("x", h5py.VirtualLayout((3,), "f8")),
        "compressed": lambda f: f.create_dataset("x", (10**7,), "f4", compression="gzip"),
        "unwritten": lambda f: f.create_dataset("x", (10**9,), "f4"),
        "text": lambda f: f.create_dataset("x", data=b"text"),
        "cycle": lambda f: f.create_group("g").__setitem__("g", f["g"]),
    }
    for name, writer in writers.items():
        with h5py.File(tmp_path / name, "w") as file:
            writer(file)
        content = (tmp_path / name).read_bytes()
        assert attempt(index_hdf5, tmp_path / name, content) is not None, name


def test_a_stream_with_a_duplicate_file_is_refused(tmp_path: Path) -> None:
    """Which of the two would count depends on the program that unpacks it."""
    member = good_tar()[: 512 + 1024]
    path = tmp_path / "file.tar.zst"
    path.write_bytes(zstandard.compress(member * 2 + bytes(1024)))
    with pytest.raises(CheckpointError, match=r"shard_0/0\.npz twice"):
        tar_stream.unpack(str(path), tmp_path)


def test_an_endless_stream_stops_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = tarfile.TarInfo("shard_0/0.npz")
    member.size = 2**32
    path = tmp_path / "file.tar.zst"
    path.write_bytes(zstandard.compress(member.tobuf()))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**30}))
    with pytest.raises(OSError, match=r"no room for shard_0/0\.npz of 4294967296 bytes"):
        tar_stream.unpack(str(path), tmp_path)

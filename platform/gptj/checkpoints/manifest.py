"""`manifest.json`: every file's size and SHA-256, written last into a finished folder.

An unfinished folder has no manifest; a folder whose files were truncated or altered later does not
match it. Both are rejected, with an error that names the file. Model folders and training
checkpoints use the same format.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from reprlib import repr as shown
from typing import IO, Any

from gptj import storage
from gptj.checkpoints.streaming import new_parts, stream
from gptj.errors import CheckpointError
from gptj.serialization.json_object import parse_object
from gptj.storage.addresses import normalized

MANIFEST = "manifest.json"
LIMIT_BYTES = 64 * 2**20  # largest small file; GPT-J's tokenizer.json has 3 MB
_FORMAT = 1
_CHUNK_BYTES = 2**20  # hashed at a time: fits in the CPU's cache
_AHEAD_BYTES = 32 * 2**20  # read ahead from disk while hashing
_PARTS_AHEAD = 4  # of each S3 file


@dataclass(frozen=True)
class FileRecord:
    size: int  # bytes
    sha256: str  # hexadecimal

    @classmethod
    def parse(cls, fields: Any) -> FileRecord:
        """From JSON. ValueError if it is not a valid record."""
        if not isinstance(fields, dict) or set(fields) != {"size", "sha256"}:
            raise ValueError(f"{shown(fields)} is not a size and sha256")
        size, digest = fields["size"], fields["sha256"]
        if type(size) is not int or size < 0:
            raise ValueError(f"{shown(size)} is not a valid size")
        if not isinstance(digest, str) or re.fullmatch("[0-9a-f]{64}", digest) is None:
            raise ValueError(f"{shown(digest)} is not a SHA-256")
        return cls(size, digest)


@dataclass(frozen=True)
class Manifest:
    """A folder's files, by their relative names."""

    folder: str
    files: Mapping[str, FileRecord]

    @classmethod
    def read(cls, folder: str, name: str = MANIFEST) -> Manifest | None:
        """The folder's manifest; None if there is none. CheckpointError if it is damaged."""
        address = storage.join(folder, name)
        try:
            content = read_small(address)
        except storage.NotFoundError:
            return None
        return cls.parse(content, folder, name)

    @classmethod
    def parse(cls, content: bytes, folder: str, name: str = MANIFEST) -> Manifest:
        """A folder's manifest from the file's bytes. CheckpointError if it is damaged."""
        address = storage.join(folder, name)
        fields = parse_object(content, address)
        if fields.get("format") != _FORMAT:
            raise CheckpointError(
                f"{address} has format {shown(fields.get('format'))}; this version reads {_FORMAT}"
            )
        if not isinstance(fields.get("files"), dict):
            raise CheckpointError(f"{address} is damaged: it has no list of files")
        files = {}
        for file, record in fields["files"].items():
            if not _is_within(file):  # copying the folder would write outside it
                raise CheckpointError(
                    f"{address} is damaged: {shown(file)} is not inside the folder"
                )
            try:
                files[file] = FileRecord.parse(record)
            except ValueError as error:
                raise CheckpointError(f"{address} is damaged at {shown(file)}: {error}") from error
        return cls(folder, files)

    @property
    def size(self) -> int:
        """Bytes of all files together, without the manifest."""
        return sum(record.size for record in self.files.values())

    @property
    def digest(self) -> str:
        """SHA-256 of all files' names, sizes and hashes; equal for all copies of a folder."""
        lines = [f"{name}\0{r.size}\0{r.sha256}\n" for name, r in sorted(self.files.items())]
        return hashlib.sha256("".join(lines).encode(errors="surrogatepass")).hexdigest()

    def write(self, name: str = MANIFEST) -> None:
        """Finish the folder. AlreadyExistsError if another writer already has."""
        fields = {
            "format": _FORMAT,
            "files": {name: asdict(record) for name, record in sorted(self.files.items())},
        }
        content = (json.dumps(fields, indent=2) + "\n").encode()
        storage.write_bytes(storage.join(self.folder, name), content, if_absent=True)

    def check_files(self, names: Iterable[str]) -> None:
        """Read these files and check their hashes. CheckpointError names the first bad one.

        Hashing takes one core per 1.5 GB/s; files are hashed in parallel.
        """
        storage.for_each(self._check_file, names, self._files_at_once)

    def problems(self) -> list[str]:
        """Read all files; returns one line per problem, none if the folder is good."""
        found = {file.name: file.size for file in storage.list_files(self.folder)}
        lines: dict[str, str] = {}

        def check(name: str) -> None:
            try:
                if name not in found:
                    raise CheckpointError(f"{storage.join(self.folder, name)} is missing")
                self.check_size(name, found[name])
                self._check_file(name)
            except CheckpointError as error:
                lines[name] = str(error)

        storage.for_each(check, (set(found) | set(self.files)) - {MANIFEST}, self._files_at_once)
        return [lines[name] for name in sorted(lines)]

    def check_sizes(self, found: Mapping[str, int] | None = None) -> None:
        """CheckpointError for files that are missing or truncated; reads nothing.

        Args:
            found: actual sizes by name; None: list the folder.
        """
        if found is None:
            found = {file.name: file.size for file in storage.list_files(self.folder)}
        for name in self.files:
            if name not in found:
                raise self.missing(name)
            self.check_size(name, found[name])

    def check_size(self, name: str, size: int) -> None:
        """CheckpointError if a file's size differs from the manifest's."""
        expected = self.record(name).size
        if size != expected:
            raise CheckpointError(
                f"{storage.join(self.folder, name)} has {size} bytes but should have "
                f"{expected}: it is " + ("truncated" if size < expected else "altered")
            )

    def missing(self, name: str) -> CheckpointError:
        return CheckpointError(f"{self.folder} is incomplete: {name} is missing")

    def check_content(self, name: str, size: int, sha256: str) -> None:
        """CheckpointError if a file's size or hash differs from the manifest's."""
        self.check_size(name, size)
        expected = self.record(name).sha256
        if sha256 != expected:
            raise CheckpointError(
                f"{storage.join(self.folder, name)} was altered after it was written: its SHA-256 "
                f"is {sha256}, the manifest says {expected}"
            )

    def record(self, name: str) -> FileRecord:
        if name not in self.files:
            raise CheckpointError(
                f"{storage.join(self.folder, name)} is not in the folder's manifest: it was added "
                f"after the checkpoint was written"
            )
        return self.files[name]

    @property
    def _files_at_once(self) -> int:
        """Files to hash in parallel; fewer from S3, whose parts are held in memory."""
        return 4 if storage.is_s3(self.folder) else storage.PARALLEL

    def _check_file(self, name: str) -> None:
        record = hash_file(storage.join(self.folder, name))
        self.check_content(name, record.size, record.sha256)


def verify(folder: str) -> Manifest:
    """Read every file of a finished folder and check it against the manifest.

    Raises:
        CheckpointError: with a line for each file that is missing, truncated, altered or not in
            the manifest; or if there is no manifest, because the folder was never finished or is
            not ours.
    """
    manifest = Manifest.read(folder)
    if manifest is None:
        if not storage.list_files(folder):  # raises if the bucket is missing
            raise CheckpointError(nothing_at(folder))
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it was never finished, or not written by this platform"
        )
    if problems := manifest.problems():
        raise CheckpointError("\n".join(problems))
    return manifest


def nothing_at(address: str) -> str:
    """The message for an address without files; its remedy lists the models nearby."""
    above, _, name = address.rpartition("/")
    if name == "model" and "/" in above.removeprefix("s3://"):  # a run's
        above = above.rpartition("/")[0]
    nearby = address if above in ("", "s3:/") else above
    return f"nothing is at {address}; remedy: gptj models ls {nearby}"


def read_small(address: str, limit: int = LIMIT_BYTES) -> bytes:
    """A whole file, in one request. CheckpointError if it has more bytes than the limit."""
    content, size = storage.read_start(address, limit)
    if size > limit:
        raise CheckpointError(
            f"{address} is damaged: it has {size} bytes, more than the limit of {limit}"
        )
    return content


def read_recorded(folder: str, name: str, manifest: Manifest | None) -> bytes:
    """As read_verified, for a file that may grow beyond LIMIT_BYTES: the manifest has its size."""
    if manifest is None:
        return read_verified(folder, name, None)
    recorded = manifest.record(name).size
    if recorded <= LIMIT_BYTES:
        return read_verified(folder, name, manifest)
    try:
        size = storage.size(storage.join(folder, name))
    except storage.NotFoundError as error:
        raise manifest.missing(name) from error
    manifest.check_size(name, size)
    return read_verified(folder, name, manifest, limit=recorded)


def read_verified(
    folder: str, name: str, manifest: Manifest | None, *, limit: int = LIMIT_BYTES
) -> bytes:
    """A small file's content, checked against the manifest if there is one."""
    try:
        content = read_small(storage.join(folder, name), limit)
    except storage.NotFoundError as error:
        if manifest is None:
            raise
        raise manifest.missing(name) from error
    if manifest is not None:
        manifest.check_content(name, len(content), hashlib.sha256(content).hexdigest())
    return content


class FolderWriter:
    """Writes the files of a new folder, then its manifest.

    `with FolderWriter(address) as writer: …` finishes the folder when the block succeeds; after an
    error there is no manifest, and so no checkpoint. Raises AlreadyExistsError, before writing any
    file, if the folder has a manifest: finished folders never change.

    Args:
        fence: called before each file is published, and before a request to S3 is tried again;
            raises if this process may no longer write.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, fence: Callable[[], None] = lambda: None
    ) -> None:
        self.folder = normalized(folder)
        self._fence = fence
        self._files: dict[str, FileRecord] = {}
        self._leftovers: set[str] = set()  # of a writer that died
        self._open = ExitStack()

    def __enter__(self) -> FolderWriter:
        self._check()
        self._leftovers = {file.name for file in storage.list_files(self.folder)}
        self._open.enter_context(storage.fenced(self.folder, self._fence))
        return self

    def _check(self) -> None:
        """Raise if another writer finished the folder, perhaps while this one stalled."""
        self._fence()
        if storage.exists(storage.join(self.folder, MANIFEST)):
            raise storage.AlreadyExistsError(
                f"{self.folder} already holds a finished checkpoint, which is never changed; "
                f"write to another address, or delete it first"
            )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._open:
            if kind is None:
                self._check_others()
                self._fence()
                Manifest(self.folder, self._files).write()

    def _check_others(self) -> None:
        """Raise if another writer, which took ours for dead, has replaced or deleted a file."""
        found = {file.name: file.size for file in storage.list_files(self.folder)}
        for name, record in self._files.items():
            if found.get(name) != record.size:
                raise storage.AlreadyExistsError(
                    f"another process writes to {self.folder} too, and has changed {name}: let it "
                    f"finish, or write to another address"
                )

    def _make_room(self, name: str) -> None:
        """Delete a leftover: what others write from now on stays, since files are only created."""
        self._check()
        if name in self._leftovers:
            with storage.fenced(self.folder, self._check):
                storage.delete(storage.join(self.folder, name))
            self._leftovers.remove(name)

    def write(self, name: str, content: bytes) -> None:
        self._make_room(name)
        storage.write_bytes(storage.join(self.folder, name), content, if_absent=True)
        self._files[name] = FileRecord(len(content), hashlib.sha256(content).hexdigest())

    @contextmanager
    def open(self, name: str, size: int) -> Iterator[HashingFile]:
        """A file of `size` bytes to write sequentially; hashed as it is written."""
        address = storage.join(self.folder, name)
        with storage.open_write(address, expected_size=size, if_absent=True) as file:
            hashing = HashingFile(file)
            yield hashing
            assert hashing.size == size, f"{name}: {hashing.size} bytes written of {size} planned"
            self._make_room(name)
        self._files[name] = FileRecord(hashing.size, hashing.hash.hexdigest())


class HashingFile:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self.hash.update(content)
        self.size += len(content)


def describe(folder: str, names: Iterable[str]) -> Manifest:
    """A manifest for files that other programs wrote into a local folder."""
    return Manifest(folder, {name: hash_file(storage.join(folder, name)) for name in names})


def hash_file(address: str) -> FileRecord:
    """A file's size and SHA-256; an S3 object is streamed, with a few parts in memory."""
    digest, size = hashlib.sha256(), 0
    if storage.is_s3(address):
        size = storage.size(address)
        with ThreadPoolExecutor(_PARTS_AHEAD) as fetchers:
            for part in stream(address, 0, new_parts(size), fetchers, _PARTS_AHEAD):
                digest.update(part[0])
        return FileRecord(size, digest.hexdigest())
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with storage.open_read(address) as file:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            if size % _AHEAD_BYTES == 0:
                _read_ahead(file.fileno(), size)
            digest.update(buffer[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def _read_ahead(descriptor: int, position: int) -> None:
    """Hint the kernel to read ahead while the CPU hashes; not all systems support it."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, position + _AHEAD_BYTES, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


def _is_within(name: str) -> bool:
    """Whether a relative name stays inside its folder."""
    return (
        name == posixpath.normpath(name)
        and not name.startswith(("/", ".."))
        and name != "."
        and "\0" not in name
    )

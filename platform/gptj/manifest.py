"""What a finished folder holds: every file's size and SHA-256, in `manifest.json`, written last.

A folder whose writing was cut short has no manifest; one whose files were cut off or altered
afterwards does not match it. Both are refused by name. Model folders and training checkpoints use
the same file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import IO

from gptj import storage

MANIFEST = "manifest.json"
_FORMAT = 1
_CHUNK_BYTES = 16 * 2**20


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted or does not fit; the message names the file and why."""


@dataclass(frozen=True)
class FileRecord:
    size: int  # bytes
    sha256: str  # hexadecimal


@dataclass(frozen=True)
class Manifest:
    """The files of a folder, by their names relative to it."""

    folder: str
    files: Mapping[str, FileRecord]

    @classmethod
    def read(cls, folder: str, name: str = MANIFEST) -> Manifest | None:
        """The folder's manifest; None if there is none. CheckpointError if it is damaged."""
        address = storage.join(folder, name)
        try:
            content = storage.read_bytes(address)
        except storage.NotFoundError:
            return None
        try:
            fields = json.loads(content)
            if fields["format"] != _FORMAT:
                raise CheckpointError(
                    f"{address} has format {fields['format']}; this version reads {_FORMAT}"
                )
            files = {name: FileRecord(**record) for name, record in fields["files"].items()}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{address} is damaged: {error!r}") from error
        return cls(folder, files)

    def write(self, name: str = MANIFEST) -> None:
        """Finish the folder. AlreadyExistsError if another writer has."""
        fields = {
            "format": _FORMAT,
            "files": {name: asdict(record) for name, record in sorted(self.files.items())},
        }
        content = (json.dumps(fields, indent=2) + "\n").encode()
        storage.write_bytes(storage.join(self.folder, name), content, if_absent=True)

    def check_sizes(self) -> None:
        """CheckpointError for files that are missing or cut off: one listing, no reading."""
        found = {file.name: file.size for file in storage.list_files(self.folder)}
        for name, record in self.files.items():
            if name not in found:
                raise CheckpointError(f"{self.folder} is incomplete: {name} is missing")
            self._check_size(name, found[name], record)

    def check_content(self, name: str, size: int, sha256: str) -> None:
        """CheckpointError if a file's size or hash is not what was written."""
        record = self.record(name)
        self._check_size(name, size, record)
        if sha256 != record.sha256:
            raise CheckpointError(
                f"{storage.join(self.folder, name)} was altered after it was written: its SHA-256 "
                f"is {sha256}, the manifest says {record.sha256}"
            )

    def record(self, name: str) -> FileRecord:
        if name not in self.files:
            raise CheckpointError(
                f"{storage.join(self.folder, name)} is not in the folder's manifest: it was added "
                f"after the checkpoint was written"
            )
        return self.files[name]

    def _check_size(self, name: str, size: int, record: FileRecord) -> None:
        if size != record.size:
            raise CheckpointError(
                f"{storage.join(self.folder, name)} has {size} bytes and should have "
                f"{record.size}: it is " + ("cut off" if size < record.size else "altered")
            )


def verify(folder: str) -> Manifest:
    """Read every file of a finished folder and compare it with the manifest.

    Raises CheckpointError with the name of the first file that is missing, cut off or altered, or
    if there is no manifest: then the folder was never finished, or is not one of ours.
    """
    manifest = Manifest.read(folder)
    if manifest is None:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: either its writing was cut short, or this platform did "
            f"not write it"
        )
    manifest.check_sizes()
    storage.for_each(lambda name: _verify_file(manifest, name), manifest.files)
    return manifest


def read_verified(folder: str, name: str, manifest: Manifest | None) -> bytes:
    """A small file's content, compared with the manifest where there is one."""
    content = storage.read_bytes(storage.join(folder, name))
    if manifest is not None:
        manifest.check_content(name, len(content), hashlib.sha256(content).hexdigest())
    return content


class FolderWriter:
    """Writes the files of a new folder, and its manifest at the end.

    `with FolderWriter(address) as writer: …` finishes the folder when the block ends well; after
    an error there is no manifest, and so no checkpoint. AlreadyExistsError at once if the folder
    has a manifest: finished folders never change.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder.rstrip("/")
        self._files: dict[str, FileRecord] = {}

    def __enter__(self) -> FolderWriter:
        if storage.exists(storage.join(self.folder, MANIFEST)):
            raise storage.AlreadyExistsError(
                f"{self.folder} holds a finished checkpoint already, which is never changed; "
                f"write to another address, or delete it first"
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            Manifest(self.folder, self._files).write()

    def write(self, name: str, content: bytes) -> None:
        storage.write_bytes(storage.join(self.folder, name), content)
        self._files[name] = FileRecord(len(content), hashlib.sha256(content).hexdigest())

    @contextmanager
    def open(self, name: str, size: int) -> Iterator[HashingFile]:
        """A file of `size` bytes, to write from front to back; it is hashed on the way."""
        with storage.open_write(storage.join(self.folder, name), expected_size=size) as file:
            hashing = HashingFile(file)
            yield hashing
            assert hashing.size == size, f"{name}: {hashing.size} bytes written of {size} planned"
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
    """The manifest of files that other programs have written into a local folder."""
    files = {}
    for name in names:
        size, digest = _hash_file(storage.join(folder, name))
        files[name] = FileRecord(size, digest)
    return Manifest(folder, files)


def _verify_file(manifest: Manifest, name: str) -> None:
    size, digest = _hash_file(storage.join(manifest.folder, name))
    manifest.check_content(name, size, digest)


def _hash_file(address: str) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with storage.open_read(address) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()

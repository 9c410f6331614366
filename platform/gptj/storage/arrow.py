"""A pyarrow file system for an address; Ray Train writes its own files through it.

For S3 it wraps gptj.storage.s3 rather than pyarrow's own client, which reads the bucket's region,
AWS_CA_BUNDLE, the shared configuration's endpoint_url, roles and addressing style differently, and
would fail after all our checks have passed. It holds no credentials, so it can be pickled.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow
import pyarrow.fs
from pyarrow.fs import FileInfo, FileSelector, FileType

from gptj.storage import s3
from gptj.storage.addresses import absolute, is_s3, split_s3
from gptj.storage.errors import NotFoundError
from gptj.storage.s3_client import retry_policy

BUFFER_BYTES = 4 * 2**20  # smallest read from S3


def arrow_filesystem(address: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """A pyarrow file system for an address, and the path in it."""
    if not is_s3(address):
        return pyarrow.fs.LocalFileSystem(), absolute(address)
    bucket, key = split_s3(address)
    return pyarrow.fs.PyFileSystem(S3Handler()), f"{bucket}/{key}".rstrip("/")


class S3Handler(pyarrow.fs.FileSystemHandler):  # type: ignore[misc]
    """Paths are `bucket/key`. Folders are only key prefixes and need not be created."""

    def __reduce__(self) -> tuple[Callable[[], S3Handler], tuple[()]]:
        return _arrived, ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Handler)

    def __hash__(self) -> int:
        return hash(S3Handler)

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return path.rstrip("/")

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [self._info(path) for path in paths]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        files = {file.name: file.size for file in s3.list_files(_address(selector.base_dir))}
        if not files and not selector.allow_not_found:
            raise NotFoundError(f"{_address(selector.base_dir)} does not exist")
        base = selector.base_dir.rstrip("/")
        folders = sorted({folder for name in files for folder in _folders_above(name)})
        infos = [FileInfo(f"{base}/{name}", FileType.Directory) for name in folders]
        infos += [_file(f"{base}/{name}", size) for name, size in files.items()]
        depth = base.count("/") + 1
        return [info for info in infos if selector.recursive or info.path.count("/") == depth]

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing to do."""

    def delete_dir(self, path: str) -> None:
        s3.delete_folder(_address(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        s3.delete_folder(_address(path))

    def delete_root_dir_contents(self) -> None:
        raise ValueError("refusing to empty all buckets")

    def delete_file(self, path: str) -> None:
        s3.delete(_address(path))

    def move(self, src: str, dest: str) -> None:
        s3.copy(_address(src), _address(dest))
        s3.delete(_address(src))

    def copy_file(self, src: str, dest: str) -> None:
        s3.copy(_address(src), _address(dest))

    def open_input_stream(self, path: str) -> pyarrow.PythonFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pyarrow.PythonFile:
        return pyarrow.PythonFile(s3.opened(_address(path), BUFFER_BYTES), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pyarrow.PythonFile:
        return pyarrow.PythonFile(_Output(_address(path)), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pyarrow.PythonFile:
        raise NotImplementedError(f"{_address(path)}: S3 cannot append to a file")

    def _info(self, path: str) -> FileInfo:
        address = _address(path)
        if split_s3(address)[1]:
            try:
                return _file(path, s3.size(address))
            except NotFoundError:
                pass  # it may be a folder
        return FileInfo(path, FileType.Directory if s3.is_folder(address) else FileType.NotFound)


def _arrived() -> S3Handler:
    """Unpickle in another process: the storage was checked by the first one, so be patient."""
    retry_policy().patient = True
    return S3Handler()


class _Output(io.RawIOBase):
    """A file that appears once it is closed."""

    def __init__(self, address: str) -> None:
        self._writing = s3.open_write(address, None)
        self._file = self._writing.__enter__()
        self._position = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, content: Any) -> int:
        self._position += (count := self._file.write(content))
        return count

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._writing.__exit__(None, None, None)


def _address(path: str) -> str:
    return f"s3://{path}"


def _file(path: str, size: int) -> FileInfo:
    return FileInfo(path, FileType.File, size=size)


def _folders_above(name: str) -> Iterator[str]:
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name

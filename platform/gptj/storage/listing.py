"""An entry of a folder's listing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FileInfo:
    address: str
    name: str  # relative to the listed folder, with /
    size: int  # bytes
    version: str = ""  # changes if the file is replaced: its ETag, or its inode and mtime

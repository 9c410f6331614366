"""An entry of a folder's listing, and which entries are chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class FileInfo:
    address: str
    name: str  # relative to the listed folder, with /
    size: int  # bytes
    version: str = ""  # changes if the file is replaced: its ETag, or its inode and mtime


def every(name: str) -> bool:
    """Chooses everything."""
    return True


def is_chosen(name: str, chosen: Callable[[str], bool]) -> bool:
    """Whether a file, and each folder that it is in, is chosen, as in gptj.storage.list_files."""
    ends = (index + 1 for index, character in enumerate(name) if character == "/")
    return all(chosen(name[:end]) for end in ends) and chosen(name)

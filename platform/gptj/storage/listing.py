"""A file as a folder's listing shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FileInfo:
    address: str
    name: str  # relative to the folder that was listed, with /
    size: int  # bytes

"""`gptj models`: list, show, copy and delete model folders."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj import storage
from gptj.adapters.base import Base
from gptj.adapters.stored import read_config
from gptj.checkpoints.folder import ADAPTER_CONFIG, CONFIG, TRAINING, ModelFolder
from gptj.checkpoints.manifest import (
    MANIFEST,
    FolderWriter,
    Manifest,
    hash_file,
    read_recorded,
    verify,
)
from gptj.config import GPTJConfig
from gptj.layers.int4 import is_quantized
from gptj.serialization.json_object import parse_object
from gptj.storage.addresses import name_within, normalized, split_s3
from gptj.storage.listing import FileInfo
from gptj.training.progress import HISTORY

CONFIGS = (CONFIG, ADAPTER_CONFIG)  # a model's, or an adapter's
# What a run writes before its first checkpoint, to its folder.
BEFORE_THE_FIRST_CHECKPOINT = {"attempts", "data", "lease", "tokenizer", "tracked.json"}
LEASE = re.compile(r"lease/[0-9]{8}\.json")
COPY_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Listed:
    """A model folder of a listing."""

    address: str
    files: int
    size: int  # bytes
    complete: bool  # whether it has a manifest


def folders(address: str) -> list[Listed]:
    """Model folders at and below an address, by name. NotFoundError if there are no files."""
    address = normalized(address)
    by_folder: dict[str, list[FileInfo]] = defaultdict(list)
    files = storage.list_files(address)
    if not files:
        raise storage.NotFoundError(f"nothing is at {address}")
    for file in files:
        folder, _, _ = file.name.rpartition("/")
        by_folder[folder].append(file)
    return [
        Listed(
            storage.join(address, folder) if folder else address,
            len(inside),
            sum(file.size for file in inside),
            any(file.name.rpartition("/")[2] == MANIFEST for file in inside),
        )
        for folder, inside in sorted(by_folder.items())
        if any(file.name.rpartition("/")[2] in CONFIGS for file in inside)
    ]


def describe(address: str) -> dict[str, Any]:
    """What a model folder holds and how it was trained, as far as recorded.

    FileNotFoundError or CheckpointError if it is not a model folder.
    """
    address = normalized(address)
    config = GPTJConfig.from_pretrained(address)
    manifest = Manifest.read(address)
    result: dict[str, Any] = {
        "address": address,
        **_adapter(address),
        "head": ", ".join(config.architectures or ["not recorded"]),
        "layers": config.n_layer,
        "width": config.n_embd,
        "heads": config.n_head,
        "positions": config.n_positions,
        "vocabulary": config.vocab_size,
        "weights": "int4" if is_quantized(config) else None,
        "labels": list(config.id2label.values()) if "Sequence" in str(config.architectures) else [],
        "files": len(manifest.files) if manifest else None,
        "bytes": manifest.size if manifest else None,
        "manifest": "present" if manifest else "none: not written by this platform",
    }
    if storage.exists(storage.join(address, TRAINING)):
        content = read_recorded(address, TRAINING, manifest)
        training = parse_object(content, storage.join(address, TRAINING))
        settings = training.get("settings", {})
        result |= {
            "run": settings.get("run"),
            "task": settings.get("task"),
            "data": settings.get("data"),
            "steps": training.get("steps"),
            "metrics": training.get("metrics"),
        }
    return {key: value for key, value in result.items() if value not in (None, [])}


def _adapter(address: str) -> dict[str, Any]:
    """An adapter's kind, base and shape; empty for a whole model."""
    with ModelFolder.open(address) as folder:
        if not folder.is_adapter:
            return {}
        config, _ = read_config(folder)
        return {
            "adapter": "LoRA",
            "base": Base.of(folder).address if Base.named_in(folder) else "not recorded",
            "rank": config.rank,
            "alpha": config.alpha,
            "target_modules": list(config.target_modules),
        }


def copy(source: str, destination: str) -> Manifest:
    """Copy a model folder to a new address, checking each file against the manifest.

    An interrupted copy resumes when it is run again.

    Raises:
        AlreadyExistsError: if there is a finished checkpoint at the destination, or files that the
            source does not have.
        CheckpointError: if a file of the source differs from its manifest.
        ValueError: if the source has no manifest, or one folder is inside the other.
    """
    source, destination = normalized(source), normalized(destination)
    _check_apart(source, destination)
    manifest = Manifest.read(source)
    if manifest is None:
        GPTJConfig.from_pretrained(source)  # raises if there is no model
        raise ValueError(
            f"{source} has no manifest to verify the copy against; remedy: "
            f"jobs/import_weights.py {source} {destination}"
        )
    with FolderWriter(destination) as writer:
        _check_room(destination, manifest)
        for name, record in manifest.files.items():
            with (
                storage.open_read(storage.join(source, name)) as file,
                writer.open(name, record.size) as target,
            ):
                left = record.size
                while left and (content := file.read(min(COPY_BYTES, left))):
                    target.write(content)
                    left -= len(content)
                manifest.check_content(name, record.size - left, target.hash.hexdigest())
    return verify(destination)


def _check_apart(source: str, destination: str) -> None:
    """Refuse a copy into its own source, which would no longer match its manifest, and around it.

    Raises ValueError.
    """
    for inner, outer in ((source, destination), (destination, source)):
        if name_within(inner, outer):  # "" if they are the same
            raise ValueError(f"{inner} is inside {outer}: a copy needs a folder of its own")


def _check_room(destination: str, manifest: Manifest) -> None:
    """AlreadyExistsError if there are files that an interrupted copy cannot have left.

    Reads those that it may have.
    """
    for file in storage.list_files(destination):
        record = manifest.files.get(file.name)
        if record is None or record.size != file.size or hash_file(file.address) != record:
            raise storage.AlreadyExistsError(
                f"{file.address} exists and does not belong to {manifest.folder}: nothing was "
                f"copied; remedy: a destination that is new or empty"
            )


def removable(address: str) -> list[FileInfo]:
    """The files that `remove` would delete: none behind a link to a folder.

    Raises:
        ValueError: if it is neither a model's nor a run's folder, or a link, or a whole bucket: a
            mistyped address must not delete a bucket or a home folder.
    """
    address = normalized(address)
    if storage.is_s3(address):
        if not split_s3(address)[1]:
            raise ValueError(
                f"{address} is a whole bucket: not deleted; remedy: name a folder in it, or empty "
                f"the bucket with your storage's own tools"
            )
    elif (path := Path(address)).is_symlink():
        raise ValueError(
            f"{address} is a link to {path.resolve()}: not deleted; remedy: name that, or delete "
            f"the link with rm"
        )
    elif Path.home().is_relative_to(path.resolve()):
        raise ValueError(f"{address} is, or contains, your home folder: not deleted")
    files = storage.list_files(address, follow_links=False)
    if not files:
        raise storage.NotFoundError(f"nothing is at {address}")
    if not _is_model(files) and not _is_run(files):
        raise ValueError(
            f"{address} is neither a model folder (config.json) nor a run's folder "
            f"(history.jsonl, checkpoint-…, lease): not deleted; remedy: name one of those"
        )
    return files


def models_within(files: Iterable[FileInfo]) -> list[str]:
    """The folders of models below a listed folder, by their names relative to it."""
    parts = {file.name.rpartition("/")[::2] for file in files}
    return sorted({folder for folder, name in parts if folder and name in CONFIGS})


def remove(address: str) -> None:
    """Delete a model's or a run's folder, manifest first, so that nothing loads half of it."""
    address = normalized(address)
    for file in removable(address):
        if file.name == MANIFEST or file.name.endswith(f"/{MANIFEST}"):
            storage.delete(file.address)
    storage.delete_folder(address)


def _is_model(files: Iterable[FileInfo]) -> bool:
    return any(file.name in CONFIGS for file in files)


def _is_run(files: Iterable[FileInfo]) -> bool:
    """Whether it is a run's folder, perhaps of one that failed before its first checkpoint."""
    names = [file.name for file in files]
    if any(name == HISTORY or name.startswith("checkpoint-") for name in names):
        return True
    only = {name.partition("/")[0] for name in names} <= BEFORE_THE_FIRST_CHECKPOINT
    return only and any(LEASE.fullmatch(name) for name in names)


def shown(description: dict[str, Any]) -> str:
    """Format as lines of text; what is not set is left out."""
    width = max(map(len, description))
    return "\n".join(
        f"{key if not number else '':<{width}}  {line}"
        for key, value in description.items()
        for number, line in enumerate(_lines(value))
    )


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{key}: {_inline(each)}" for key, each in value.items() if each or each == 0]
    return [_inline(value)]


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_inline(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_inline, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

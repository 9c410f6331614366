"""Weights from anywhere in, a model folder of ours out, one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from gptj import storage
from gptj.config import GPTJConfig, parse_dtype
from gptj.interop.conversion import read_all, specs_of
from gptj.interop.formats import FormatName
from gptj.interop.source import open_source
from gptj.saving import save_folder
from gptj.storage.addresses import normalized


def import_weights(
    source: str,
    destination: str,
    *,
    format: FormatName | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    config: str | None = None,
    tokenizer: str | None = None,
    scratch: str | Path | None = None,
) -> GPTJConfig:
    """Write a model folder; it is complete, or it is not there. Returns its configuration.

    See open_source for the other arguments.

    Args:
        destination: a new folder, local or `s3://`.
        dtype: float16, bfloat16 or float32; None: as stored; if that is several, one of them.

    Raises:
        FileNotFoundError, CheckpointError: as open_source does.
        AlreadyExistsError: if there is something at the destination.
    """
    target = parse_dtype(dtype)
    source, destination = normalized(source), normalized(destination)
    config = None if config is None else normalized(config)
    tokenizer = None if tokenizer is None else normalized(tokenizer)
    check_new(destination)
    with open_source(
        source,
        format=format,
        revision=revision,
        config=config,
        tokenizer=tokenizer,
        scratch=scratch,
    ) as opened:
        specs = specs_of(opened.tensors, target, opened.config)
        save_folder(
            destination,
            opened.config,
            specs,
            read_all(opened.tensors, specs),
            tokenizer=opened.tokenizer,
            training=opened.training,
        )
        return opened.config


def check_new(destination: str) -> None:
    """AlreadyExistsError if a folder has files, StorageError if nothing can be written there."""
    files = storage.list_files(destination)
    if files:
        names = sorted({PurePosixPath(file.name).parts[0] for file in files})[:5]
        raise storage.AlreadyExistsError(
            f"{destination} holds files already ({', '.join(names)}), perhaps of a run that was "
            f"cut short; write to another address, or delete it first"
        )
    storage.check_writable(destination)

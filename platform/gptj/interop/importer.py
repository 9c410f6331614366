"""Import weights of any supported format into a model folder, one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from gptj import storage
from gptj.checkpoints.folder import check_outside
from gptj.config import GPTJConfig, parse_dtype
from gptj.interop.conversion import read_all, specs_of
from gptj.interop.formats import FormatName
from gptj.interop.source import open_source
from gptj.pretrained.saving import save_folder
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
    """Write a model folder, atomically. Returns its configuration.

    See open_source for the other arguments.

    Args:
        destination: a new folder, local or `s3://`.
        dtype: float16, bfloat16 or float32; None: as stored; if mixed, one of them.

    Raises:
        FileNotFoundError, CheckpointError: see open_source.
        ValueError: if the destination is within the source or the tokenizer's folder.
        AlreadyExistsError: if the destination is not empty.
    """
    target = parse_dtype(dtype)
    source, destination = normalized(source), normalized(destination)
    config = None if config is None else normalized(config)
    tokenizer = None if tokenizer is None else normalized(tokenizer)
    check_new(destination, source, tokenizer)
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


def check_new(destination: str, *sources: str | None) -> None:
    """Check that a new folder can be made of others.

    Args:
        sources: folders, local or `s3://`, or hub ids.

    Raises:
        ValueError: if it is within one of them.
        AlreadyExistsError: if it has files.
        StorageError: if it is not writable.
    """
    check_outside(destination, *sources)
    files = storage.list_files(destination)
    if files:
        names = sorted({PurePosixPath(file.name).parts[0] for file in files})[:5]
        raise storage.AlreadyExistsError(
            f"{destination} already holds files ({', '.join(names)}), perhaps from an interrupted "
            f"run; write to another address, or delete it first"
        )
    storage.check_writable(destination)

"""Locate a model: a folder, `s3://` address or hub id in, a folder that storage can read out.

And the reverse: upload a local folder to the hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptj.environment.extras import Extra
from gptj.storage.addresses import is_s3, normalized

# Imported only when needed: its HTTP client takes a fifth of PyTorch's import time.
huggingface_hub = Extra("huggingface_hub", "the Hugging Face hub")
errors = Extra("huggingface_hub.errors", "the Hugging Face hub", "huggingface_hub")
httpx2 = Extra("httpx2", "the Hugging Face hub")

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SNAPSHOT = re.compile(r".*/snapshots/([0-9a-f]{40})")


def locate(
    address: str | os.PathLike[str],
    *,
    revision: str | None,
    patterns: Sequence[str],
    **options: Any,
) -> str:
    """The folder or `s3://` address where the files of a model or tokenizer can be read.

    Folders and `s3://` addresses are returned in canonical form (gptj.storage.addresses).

    A hub id such as `EleutherAI/gpt-j-6B` is downloaded to the hub's cache first (only files
    that match `patterns`).

    Args:
        revision: a branch, tag or commit of a hub id; not for folders or S3.
        options: for huggingface_hub's snapshot_download, such as `token`.

    Raises:
        FileNotFoundError: if it is none of the three, or not on the hub.
        ValueError: for a revision of anything but a hub id; AddressError for an invalid address.
    """
    address = normalized(address)
    if is_s3(address) or Path(address).is_dir():
        if revision is not None:
            raise ValueError(f"only hub ids have revisions, {address} is a folder: drop {revision}")
        return address
    if Path(address).is_file():
        raise FileNotFoundError(
            f"{address!r} is not an existing folder but a file; remedy: the model's folder"
        )
    if HUB_ID.fullmatch(address) is None:
        raise FileNotFoundError(
            f"{address!r} is not an existing folder, an s3:// address or a hub id (owner/name)"
        )
    try:
        return str(
            huggingface_hub.snapshot_download(
                address, revision=revision, allow_patterns=list(patterns), **options
            )
        )
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{address!r} on the hub has no revision {revision!r}") from error
    except errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"{address!r} on the hub is gated; remedy: accept its terms on its page, and set "
            f"HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{address!r} is not an existing folder or an s3:// address, and the hub has no model "
            f"of that name that this account may read; remedy: correct the name, or set HF_TOKEN "
            f"for a private one"
        ) from error
    except (
        errors.EntryNotFoundError,
        errors.FileMetadataError,
        errors.HfHubHTTPError,
        errors.HFValidationError,
    ) as error:
        raise FileNotFoundError(
            f"{address!r} is not an existing folder or an s3:// address, and could not be "
            f"downloaded as a hub id: {error}"
        ) from error


def commit_of(folder: str) -> str | None:
    """The commit whose files `locate` has downloaded to a folder; None if that is unknown."""
    found = _SNAPSHOT.fullmatch(Path(folder).as_posix())
    return None if found is None else found[1]


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Commit a local folder's files to a hub repository; returns the commit's URL.

    Creates the repository and the branch if they do not exist.

    Raises:
        ConnectionError: if the hub cannot be reached.
        huggingface_hub.errors.HfHubHTTPError: if the hub refuses.
    """
    hub = huggingface_hub.HfApi(token=token)
    try:
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    except httpx2.TransportError as error:
        raise ConnectionError(
            f"the hub at {hub.endpoint} cannot be reached: {error}; remedy: check the network and "
            "HF_ENDPOINT, and push again"
        ) from error
    return str(commit.commit_url)

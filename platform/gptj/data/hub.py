"""Data sets on the Hugging Face hub: `hf://datasets/OWNER/NAME[@REVISION][/PATH]` in, files out.

PATH is a file, a folder or a pattern. A listing pins each file to a commit, so that every process
reads the same version; files are downloaded to each machine's hub cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from gptj import storage
from gptj.data.formats import format_of
from gptj.data.rows import DataError
from gptj.environment.extras import Extra
from gptj.storage.addresses import HUB_DATA, split_hub_data

# Only its errors are used: without it, everything but the hub works.
httpx2 = Extra("httpx2", "reading data sets from the Hugging Face hub")

_SPLITS = {"train": ("train", "training"), "other": ("test", "validation", "valid", "dev", "eval")}
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_pinned_file(address: str) -> bool:
    """Whether it is a file at a commit, as listings give it."""
    _, revision, path = split_hub_data(address)
    return bool(path) and _COMMIT.fullmatch(revision or "") is not None and "*" not in path


def list_files(address: str) -> list[storage.FileInfo]:
    """All files in an address's folder (a file's or pattern's parent), sorted by name.

    Names are relative to the repository.

    Raises:
        DataError: if the data set does not exist, or this account has no access.
        UnreachableError: if the hub does not answer.
    """
    repository, revision, path = split_hub_data(address)
    folder = path
    if "*" in path or format_of(path) is not None:
        folder = path.partition("*")[0].rpartition("/")[0]
    hub = HfApi()
    with _explaining(address):
        commit = hub.dataset_info(repository, revision=revision).sha
        tree = list(
            hub.list_repo_tree(
                repository, folder or None, recursive=True, revision=commit, repo_type="dataset"
            )
        )
    return sorted(
        (
            storage.FileInfo(
                f"{HUB_DATA}{repository}@{commit}/{each.path}", each.path, each.size, each.blob_id
            )
            for each in tree
            if isinstance(each, RepoFile)
        ),
        key=lambda file: file.name,
    )


def check_one_split(address: str, names: list[str]) -> None:
    """DataError if there are files of both a training and a test set, as is usual on the hub."""
    found = {
        split: next((name for name in names if _words(name) & set(words)), None)
        for split, words in _SPLITS.items()
    }
    if found["train"] is not None and found["other"] is not None:
        base = address.rstrip("/")
        pattern = re.sub(r"\d[\d-]*(?:of[\d-]*)?", "*", found["train"].rpartition("/")[2])
        folder = found["train"].rpartition("/")[0]
        raise DataError(
            f"{address} has a training set ({found['train']}) and others ({found['other']}): "
            f"choose one, as in {base}/{folder + '/' if folder else ''}{pattern}"
        )


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


@contextmanager
def _explaining(address: str) -> Iterator[None]:
    try:
        yield
    except RevisionNotFoundError as error:
        raise DataError(f"{address}: the data set has no such revision") from error
    except GatedRepoError as error:
        raise DataError(
            f"{address} is gated; remedy: accept its terms on its page, and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{address}: the hub has no data set of that name that this account may read; remedy: "
            f"correct the name, or set HF_TOKEN for a private one"
        ) from error
    except LocalEntryNotFoundError as error:  # offline, and not in the cache
        raise storage.UnreachableError(f"{address} could not be downloaded: {error}") from error
    except EntryNotFoundError as error:
        raise DataError(f"{address}: the data set has no such file or folder") from error
    except HFValidationError as error:
        raise DataError(f"{address}: {error}") from error
    except (httpx2.HTTPError, ConnectionError) as error:
        raise storage.UnreachableError(
            f"{address}: the Hugging Face hub does not answer ({error}); remedy: check the "
            f"network, HF_ENDPOINT and HF_HUB_OFFLINE, or copy the files to a folder or s3://bucket/key"
        ) from error


def download(address: str) -> str:
    """Download a file; returns its local path. Raises like list_files."""
    repository, revision, path = split_hub_data(address)
    with _explaining(address):
        return hf_hub_download(repository, path, repo_type="dataset", revision=revision)

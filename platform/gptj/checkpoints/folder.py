"""A model folder, opened once: its manifest, small files and weights, wherever they are stored.

`config.json`, `model.safetensors` or shards with an index, the tokenizer's files, `training.json`
and, written last, `manifest.json` (see gptj.checkpoints.manifest). Folders from Hugging Face have
no manifest and no `training.json`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

from torch import Tensor

from gptj import storage
from gptj.checkpoints.cache import CheckpointCache, Lease
from gptj.checkpoints.hub import commit_of, locate
from gptj.checkpoints.manifest import (
    MANIFEST,
    Manifest,
    nothing_at,
    read_recorded,
    read_small,
    read_verified,
)
from gptj.checkpoints.weights import KINDS, read_weights, weight_files
from gptj.errors import CheckpointError
from gptj.serialization.json_object import parse_object
from gptj.storage.addresses import name_within, normalized

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"  # of transformers
TRAINING = "training.json"
# An adapter's files (gptj.adapters): PEFT's settings, and its base model.
ADAPTER_CONFIG = "adapter_config.json"
BASE = "base.json"
ADAPTER_FILES = (ADAPTER_CONFIG, BASE, "adapter_model*")
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    CHAT_TEMPLATE,
)

# What is downloaded for a hub id: small files; weights as safetensors or, failing that, pickles.
SMALL_FILES = (CONFIG, GENERATION_CONFIG, TRAINING, MANIFEST, *TOKENIZER_FILES, *ADAPTER_FILES)
WEIGHTS = (
    ("*.json", "merges.txt", CHAT_TEMPLATE, "*.safetensors"),
    ("*.json", CHAT_TEMPLATE, "adapter_model*.bin"),
    ("*.json", CHAT_TEMPLATE, "pytorch_model*.bin"),
)
# What tells a replaced model, where no manifest does; `*` also stands for one folder, such as
# sentence-transformers' 1_Pooling.
IDENTIFYING = ("*.json", "merges.txt", "*.jinja", "*.safetensors", "*.bin")


class ModelFolder:
    """A folder, an `s3://` address or a hub id, open for reading.

        with ModelFolder.open(address, weights=True) as folder:
            tokenizer = GPTJTokenizer.from_folder(folder)
            model = GPTJForCausalLM.from_folder(folder)

    Files that the manifest names are checked against it as they are read. A model that maps the
    files may outlive the block: see `lease_for`.
    """

    def __init__(
        self,
        address: str,
        manifest: Manifest | None,
        *,
        from_hub: bool = False,
        verify: bool = True,
    ) -> None:
        self.address = address  # local or s3://; for a hub id, its download folder
        self.manifest = manifest
        self._lease: Lease | None = None
        self._from_hub = from_hub
        self.verify = verify
        self._config: bytes | None = None  # the content of config.json, once it has been read

    @classmethod
    def open(
        cls,
        address: str | os.PathLike[str],
        *,
        revision: str | None = None,
        weights: bool = False,
        files: Sequence[str] = SMALL_FILES,
        verify: bool = True,
        hub: Mapping[str, Any] | None = None,
        before_weights: Callable[[ModelFolder], None] | None = None,
    ) -> ModelFolder:
        """Locate the folder and read its manifest.

        Args:
            revision: a branch, tag or commit of a hub id.
            weights: whether the weights will be read; if so, they are downloaded from the hub, or
                fetched into this node's S3 cache, if it has one.
            files: patterns of the other files to download from the hub.
            hub: huggingface_hub's arguments for a hub id, such as `token`.
            verify: check the weights' SHA-256 against the manifest. Small files are always checked.
            before_weights: called with the folder before weights are fetched or used; may raise.

        Raises:
            FileNotFoundError: if there is nothing at the address.
            CheckpointError: if the manifest is damaged, or a file it names is missing or truncated.
        """
        address = normalized(address)
        small = [(*files, MANIFEST)]
        first = WEIGHTS if weights and before_weights is None else small
        folder = _locate(address, revision, first, hub or {})
        from_hub = folder != address
        manifest = Manifest.read(folder)
        opened = cls(folder, manifest, from_hub=from_hub, verify=verify)
        if not weights:
            return opened
        checks = [] if before_weights is None else [before_weights]

        def check() -> None:  # once: before a fetch or, with a cached copy, after the lease
            while checks:
                checks.pop()(opened)

        in_s3 = storage.is_s3(folder)
        cache = CheckpointCache.from_environment() if manifest is not None and in_s3 else None
        if cache is not None:
            assert manifest is not None
            opened._lease = cache.lease(folder, manifest, verify=verify, before_fetch=check)
        try:
            check()
        except BaseException:
            opened.close()
            raise
        if from_hub and before_weights is not None:
            # Of the same commit: a branch may have moved.
            opened.address = _locate(address, opened.commit or revision, WEIGHTS, hub or {})
        # In S3, sizes are checked as the files are read: a listing would cost a request. A hub
        # download has only the files that were needed.
        if manifest is not None and not in_s3 and not from_hub:
            manifest.check_sizes()
        return opened

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the copy in the node's cache, unless a model uses it."""
        if self._lease is not None:
            self._lease.close()

    def lease_for(self, user: object) -> None:
        """Keep the files until `user`, which maps them, is garbage-collected."""
        if self._lease is not None:
            self._lease.share_with(user)

    def __contains__(self, name: str) -> bool:
        """Whether the folder has a file, by its manifest or, without one, its listing."""
        return (self.manifest is not None and name in self.manifest.files) or name in self._listed

    @property
    def commit(self) -> str | None:
        """Of a hub id, the commit that its revision stands for."""
        return commit_of(self.address) if self._from_hub else None

    @property
    def identity(self) -> str:
        """A digest that differs once the model, adapter or tokenizer is another; reads no weights.

        Of the manifest; of what it does not have, of a hub id's commit, or of the files' names,
        sizes and versions, which also differ for a copy.
        """
        recorded = {} if self.manifest is None else self.manifest.files
        if self.manifest is not None and ("tokenizer.json" in recorded or "vocab.json" in recorded):
            return self.manifest.digest
        parts: list[Any] = [] if self.manifest is None else [self.manifest.digest]
        if self.commit is not None:
            parts.append(self.commit)
        else:
            parts += [
                (file.name, file.size, file.version)
                for file in storage.list_files(self.address, _identifies)
                if file.name not in recorded and file.name != MANIFEST
            ]
        return hashlib.sha256(repr(parts).encode(errors="surrogatepass")).hexdigest()

    @property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter rather than a model."""
        return ADAPTER_CONFIG in (self._listed if self.manifest is None else self.manifest.files)

    def read(self, name: str) -> bytes:
        """A small file's content. CheckpointError if it does not match the manifest.

        A file that is not in the manifest was added later, and is rejected.
        """
        if name == CONFIG:
            if self._config is None:
                self._config = self._read(name)
            return self._config
        return self._read(name)

    def _read(self, name: str) -> bytes:
        if self.manifest is None:
            return read_small(storage.join(self.address, name))
        self.manifest.record(name)
        manifest = Manifest(self._copy, self.manifest.files)
        if name == TRAINING:  # of earlier versions, with the whole history
            return read_recorded(self._copy, name, manifest)
        return read_verified(self._copy, name, manifest)

    def read_tokenizer(self) -> dict[str, bytes]:
        """The tokenizer's files that exist, by name.

        They need not be in the manifest: Hugging Face users often save a tokenizer into a finished
        model's folder.
        """
        recorded = {} if self.manifest is None else self.manifest.files
        if "tokenizer.json" not in recorded and "vocab.json" not in recorded:
            names = [name for name in TOKENIZER_FILES if name in self._listed or name in recorded]
        else:
            names = [name for name in TOKENIZER_FILES if name in recorded]
        if "tokenizer.json" in names:  # contains everything
            names = [n for n in names if n not in ("vocab.json", "merges.txt", "added_tokens.json")]
        return {
            name: self.read(name)
            if name in recorded
            else read_small(storage.join(self.address, name))
            for name in names
        }

    def read_object(self, name: str) -> dict[str, Any]:
        """A small file, parsed as a JSON object."""
        return parse_object(self.read(name), storage.join(self.address, name))

    def read_config(self) -> dict[str, Any]:
        """The fields of config.json. FileNotFoundError if there is none."""
        try:
            if self.manifest is not None and CONFIG not in self.manifest.files:
                raise storage.NotFoundError(f"{self.address} has no {CONFIG}")
            return self.read_object(CONFIG)
        except storage.NotFoundError as error:
            if not storage.list_files(self.address):  # raises if the bucket is missing
                raise storage.NotFoundError(nothing_at(self.address)) from error
            raise storage.NotFoundError(
                f"{self.address} is not a model folder: it has no {CONFIG} (or was never finished)"
            ) from error

    def read_training_data(self) -> dict[str, Any]:
        """How training read its data, from `training.json`; empty if unknown."""
        if TRAINING not in self:
            return {}
        return training_data(self.read(TRAINING), storage.join(self.address, TRAINING))

    def read_trained_labels(self) -> dict[str, Any]:
        """How training's data wrote a classifier's labels (LabelSet.record); empty if unknown."""
        if TRAINING not in self:
            return {}
        return trained_labels(self.read(TRAINING), storage.join(self.address, TRAINING))

    def read_weights(
        self, kinds: Sequence[tuple[str, str]] = KINDS
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, on the CPU: see gptj.checkpoints.weights.read_weights."""
        if self.manifest is None:
            return read_weights(self.address, None, kinds=kinds)
        manifest = Manifest(self._copy, self.manifest.files)
        # The cache has already checked its copy.
        verify = self.verify and self._lease is None
        # The manifest has the names: saves listing S3.
        names = manifest.files if storage.is_s3(self._copy) else None
        return read_weights(self._copy, manifest, names=names, verify=verify, kinds=kinds)

    def check_complete(self) -> None:
        """Check that all files exist at their full size, without reading the weights.

        For an adapter, only its own files (see gptj.adapters.base.check_base). Without a manifest
        only names can be checked, and for a hub id nothing.

        Raises:
            CheckpointError: if a file is missing or truncated.
        """
        if self._from_hub:
            return
        if self.manifest is not None:
            self.manifest.check_sizes(self._listed)
        if self.is_adapter:
            return
        weight_files(self.address, set(self._listed), self.manifest)

    @property
    def _copy(self) -> str:
        """Where the manifest's files are read from."""
        return self.address if self._lease is None else self._lease.folder

    @cached_property
    def _listed(self) -> dict[str, int]:
        """Sizes by name."""
        return {file.name: file.size for file in storage.list_files(self.address)}


def check_outside(destination: str, *models: str | None) -> None:
    """ValueError if a folder to be written is, or is within, one of these models' or adapters'.

    Their manifests would not have its files.

    Args:
        models: folders, local or `s3://`, or hub ids.
    """
    for model in models:
        if model is None or not (storage.is_s3(model) or Path(model).exists()):
            continue  # a hub id, or what is missing
        if name_within(destination, model) is not None:
            raise ValueError(
                f"{destination} is within {model}, which would no longer match its manifest; "
                f"remedy: a folder elsewhere"
            )


def training_data(content: bytes, address: str) -> dict[str, Any]:
    """How training read its data, from a `training.json`; empty if unknown.

    Raises CheckpointError if the file is damaged.
    """
    fields: Any = parse_object(content, address)
    for name in ("settings", "data"):
        fields = fields.get(name, {})
        if not isinstance(fields, dict):
            raise CheckpointError(f"{address} is damaged: its {name} must be an object")
    return cast(dict[str, Any], fields)


def trained_labels(content: bytes, address: str) -> dict[str, Any]:
    """How training's data wrote a classifier's labels, from a `training.json`; empty if unknown.

    Raises CheckpointError if the file is damaged.
    """
    found: Any = parse_object(content, address).get("labels") or {}
    written = found.get("written") if isinstance(found, dict) else None
    if found and not (
        isinstance(written, dict) and all(type(number) is int for number in written.values())
    ):
        raise CheckpointError(f"{address} is damaged: its labels must have an index for each text")
    return cast(dict[str, Any], found)


def _locate(
    address: str,
    revision: str | None,
    choices: Sequence[Sequence[str]],
    hub: Mapping[str, Any],
) -> str:
    """Locate a folder; for a hub id, download the first of `choices` that it has."""
    for patterns in choices:
        folder = locate(address, revision=revision, patterns=patterns, **hub)
        if folder == address or len(choices) == 1:
            break
        if _any_matches((file.name for file in storage.list_files(folder)), patterns[-1]):
            break
    return folder


def _any_matches(names: Collection[str] | Iterator[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _identifies(name: str) -> bool:
    """Whether a file, or a folder's files (with `/` at the end), tell a replaced model."""
    if name.endswith("/"):
        return name.count("/") == 1
    return any(fnmatchcase(name, pattern) for pattern in IDENTIFYING)

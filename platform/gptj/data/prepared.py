"""Prepared data: a folder of token ids, tokenized once, in; documents out.

`shard-PPPPP-CCCCC.parquet`, in the order of their source rows, have one document per row:
`input_ids` (list of int32) and, where not all of them are learned, `learned` (list of bool).
`index.json` says what the shards hold and how they were made. The tokenizer's files lie beside
them, and the manifest is written last.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gptj import storage
from gptj.checkpoints.manifest import MANIFEST, Manifest, read_verified, verify
from gptj.data.documents import Document, Documents
from gptj.data.rows import DataError
from gptj.errors import CheckpointError
from gptj.extras import Extra
from gptj.serialization.json_object import parse_object
from gptj.storage.addresses import SAMPLE
from gptj.tokenizer import GPTJTokenizer

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet
else:
    pyarrow = Extra("pyarrow", "reading Parquet files")

INDEX = "index.json"


@dataclass(frozen=True)
class Shard:
    """What one file holds; a chunk of nothing but bad rows has no file."""

    name: str
    rows: int
    tokens: int
    learned: int  # tokens that the loss may count
    size: int = 0  # bytes
    sha256: str = ""  # of the file
    source: str = ""  # SHA-256 of the rows that it was made from
    skipped: int = 0  # rows that were bad
    bad: tuple[str, ...] = ()  # the first of them, and what is wrong with each


@dataclass(frozen=True)
class Index:
    """What a folder of prepared data holds, and how it was made."""

    settings: Mapping[str, Any]  # address, columns, files, …: equal ones make equal shards
    tokenizer: str  # `tokenizer_digest`
    rows: int
    tokens: int
    learned: int
    skipped: int
    shards: Sequence[Shard]
    bad: Sequence[str] = field(default=())  # the first rows that were skipped, and why

    def to_fields(self) -> dict[str, Any]:
        return asdict(self)


class Prepared:
    """A finished folder of prepared data."""

    def __init__(self, address: str, manifest: Manifest) -> None:
        self.address = address
        self._manifest = manifest
        content = read_verified(address, INDEX, manifest)
        fields = dict(parse_object(content, storage.join(address, INDEX)))
        try:
            shards = [Shard(**{**each, "bad": tuple(each["bad"])}) for each in fields["shards"]]
            self.index = Index(**{**fields, "shards": shards})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{address} is damaged: {INDEX} lacks {error}") from error

    @classmethod
    def at(cls, address: str) -> Prepared | None:
        """The folder at an address, if it holds prepared data.

        DataError if its preparation is not finished.
        """
        if address.startswith(SAMPLE) or "*" in address:
            return None
        if not storage.exists(storage.join(address, INDEX)):
            manifest = None  # whatever another program calls so
        else:
            manifest = Manifest.read(address)
        if manifest is None and storage.exists(storage.join(address, UNFINISHED, PLAN)):
            raise DataError(
                f"{address} is not finished: it has no {MANIFEST}; remedy: submit "
                f"jobs/prepare_data.py again, which continues where it stopped"
            )
        if manifest is None or INDEX not in manifest.files:
            return None
        return cls(address, manifest)

    @property
    def digest(self) -> str:
        """SHA-256 of all that a training reads here: the shards in their order."""
        shards = "".join(f"{shard.name} {shard.sha256}\n" for shard in self.index.shards)
        return hashlib.sha256(shards.encode()).hexdigest()

    def check_tokenizer(self, tokenizer: GPTJTokenizer) -> None:
        """DataError if the ids are another tokenizer's."""
        found = tokenizer_digest(tokenizer)
        if found != self.index.tokenizer:
            raise DataError(
                f"{self.address} was prepared with another tokenizer (sha256 "
                f"{self.index.tokenizer[:16]}…) than the run's ({found[:16]}…): prepare the data "
                f"with the model's, or begin with tokenizer.address={self.address}"
            )
        template = self.index.settings.get("template")
        if template and template != template_digest(tokenizer):
            raise DataError(
                f"the chats of {self.address} were prepared with another chat template than the "
                f"run's: prepare them with the model's, or give the run theirs by "
                f"tokenizer.chat_template="
            )

    def windows(self) -> Iterator[Documents]:
        """The documents of one shard after the other. CheckpointError for a damaged one."""
        for shard in self.index.shards:
            if shard.rows:
                yield self._read(shard.name)

    def verify(self) -> None:
        """CheckpointError if a file is missing or altered; reads all of them."""
        verify(self.address)

    def _read(self, name: str) -> Documents:
        content = storage.read_bytes(storage.join(self.address, name))
        self._manifest.check_content(name, len(content), hashlib.sha256(content).hexdigest())
        table = pyarrow.parquet.read_table(io.BytesIO(content))
        lists = table.column("input_ids").combine_chunks()
        ends = lists.offsets.to_numpy().astype(np.int64)
        learned = None
        if "learned" in table.column_names:
            flags = table.column("learned").combine_chunks()
            learned = flags.flatten().to_numpy(zero_copy_only=False)
        return Documents(lists.flatten().to_numpy(), ends - ends[0], learned)


UNFINISHED = "unfinished"  # below the folder: what it is to become, and the shards that are done
PLAN = "plan.json"


def tokenizer_digest(tokenizer: GPTJTokenizer) -> str:
    """SHA-256 of what turns text into ids; padding does not count."""
    digest = hashlib.sha256(tokenizer.files()["tokenizer.json"])
    digest.update(f"eos {tokenizer.eos_token_id}".encode())
    return digest.hexdigest()


def template_digest(tokenizer: GPTJTokenizer) -> str:
    """SHA-256 of its chat template."""
    return hashlib.sha256((tokenizer.default_chat_template or "").encode()).hexdigest()


def to_parquet(documents: Sequence[Document]) -> bytes:
    """A shard's file; equal documents give equal bytes."""
    joined = Documents.of(documents)
    ends = pyarrow.array(joined.ends, pyarrow.int32())
    columns = {"input_ids": pyarrow.ListArray.from_arrays(ends, pyarrow.array(joined.ids))}
    if joined.learned is not None:
        columns["learned"] = pyarrow.ListArray.from_arrays(ends, pyarrow.array(joined.learned))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, compression="zstd")
    return buffer.getvalue()

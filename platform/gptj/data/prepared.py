"""Prepared data: a folder of tokenized rows in, one table per shard out.

`shard-PPPPP-CCCCC.parquet`, in the order of their source rows, have one example per row
(gptj.data.shards). `index.json` describes the shards and how they were made. The folder also has
the tokenizer's files; the manifest is written last.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from gptj import storage
from gptj.checkpoints.manifest import MANIFEST, Manifest, read_verified, verify
from gptj.data.formats import is_typed
from gptj.data.labels import LabelNames
from gptj.data.rows import DataError, Row, refuse_row
from gptj.data.shards import TaskName, from_parquet
from gptj.data.unfinished import INDEX, PLAN, UNFINISHED
from gptj.errors import CheckpointError
from gptj.serialization.json_object import parse_object
from gptj.storage.addresses import HUB_DATA, SAMPLE, split_hub_data
from gptj.tokenizer import GPTJTokenizer

if TYPE_CHECKING:
    import pyarrow

MAX_NAMED = 100  # most bad rows named in an index or a log

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """A shard's contents; a chunk with only bad rows has no file."""

    name: str
    rows: int
    tokens: int
    learned: int  # tokens that the loss may count
    size: int = 0  # bytes
    sha256: str = ""  # of the file
    source: str = ""  # SHA-256 of its source rows, with their locations
    content: str = ""  # SHA-256 of what training reads, without locations
    skipped: int = 0  # bad rows
    bad: tuple[str, ...] = ()  # errors of the first bad rows


@dataclass(frozen=True)
class Index:
    """The contents of a folder of prepared data, and how it was made."""

    settings: Mapping[str, Any]  # address, columns, files, …; equal settings make equal shards
    tokenizer: str  # `tokenizer_digest`
    rows: int
    tokens: int
    learned: int
    skipped: int
    shards: Sequence[Shard]
    bad: Sequence[str] = field(default=())  # errors of the first skipped rows

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
        if address.startswith((SAMPLE, HUB_DATA)) or "*" in address:
            return None
        if not storage.exists(storage.join(address, INDEX)):
            manifest = None
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
    def task(self) -> TaskName:
        """The task it was prepared for."""
        task: TaskName = self.index.settings.get("task", "causal-lm")  # unset by older versions
        return task

    @property
    def source(self) -> str:
        """The address of the raw data."""
        return str(self.index.settings.get("address", self.address))

    @property
    def commit(self) -> str | None:
        """The commit of the hub's data set that it was made from, if it was."""
        parts = self.index.settings.get("parts") or [[""]]
        file = parts[0][0]
        return split_hub_data(file)[1] if file.startswith(HUB_DATA) else None

    @property
    def label_names(self) -> LabelNames | None:
        """The names its labels were checked against, if any."""
        names: LabelNames | None = self.index.settings.get("label_names")
        return names

    @property
    def problem_type(self) -> str | None:
        """The kind its labels were checked as, if any."""
        found: str | None = self.index.settings.get("problem_type")
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of everything that training reads: the shards in order."""
        shards = "".join(f"{s.name} {s.content or s.sha256}\n" for s in self.index.shards)
        return hashlib.sha256(shards.encode()).hexdigest()

    def check(self, task: TaskName, tokenizer: GPTJTokenizer) -> None:
        """DataError if it was prepared for another task or tokenizer."""
        if self.task != task:
            raise DataError(f"{self.address} is prepared for task={self.task}, not {task}")
        found = tokenizer_digest(tokenizer)
        if found != self.index.tokenizer:
            raise DataError(
                f"{self.address} was prepared with another tokenizer (sha256 "
                f"{self.index.tokenizer[:16]}…) than the run's ({found[:16]}…): prepare the data "
                f"with the model's, or set tokenizer.address={self.address}"
            )
        template = self.index.settings.get("template")
        if template and template != template_digest(tokenizer):
            raise DataError(
                f"the chats of {self.address} were prepared with another chat template than the "
                f"run's: prepare them with the model's, or set the run's tokenizer.chat_template="
            )

    def tables(self) -> Iterator[PreparedTable]:
        """The shards, one by one. CheckpointError for a damaged one."""
        for shard in self.index.shards:
            if shard.rows:
                yield PreparedTable(self._read(shard.name), shard.name, self.index.settings)

    @contextmanager
    def skipping(self) -> Iterator[Callable[[DataError], None]]:
        """A handler for the errors of unusable rows, following the data's `bad_rows` setting.

        It raises them, or skips the rows and logs them when the block ends.
        """
        if self.index.settings.get("bad_rows") != "skip":
            yield refuse_row
            return
        count = 0
        named: list[str] = []

        def skip(error: DataError) -> None:
            nonlocal count
            count += 1
            if len(named) < MAX_NAMED:
                named.append(str(error))

        yield skip
        if count:
            logger.warning("skipped %d bad rows, such as %s", count, named[0])

    def verify(self) -> None:
        """CheckpointError if a file is missing or altered; reads all of them."""
        verify(self.address)

    def _read(self, name: str) -> pyarrow.Table:
        content = storage.read_bytes(storage.join(self.address, name))
        self._manifest.check_content(name, len(content), hashlib.sha256(content).hexdigest())
        return from_parquet(content)


@dataclass(frozen=True)
class PreparedTable:
    """A shard and the origin of its rows."""

    columns: pyarrow.Table
    name: str
    settings: Mapping[str, Any]  # the plan's

    def row(self, number: int, **values: Any) -> Row:
        """A row with the given values and its original location, for naming it in an error."""
        file, place = (self.columns.column(name)[number].as_py() for name in ("file", "row"))
        address = self.settings["parts"][int(self.name.split("-")[1])][file]
        return Row(values, address, place, self.settings["names"], is_typed(address))


def tokenizer_digest(tokenizer: GPTJTokenizer) -> str:
    """SHA-256 of the text-to-ids mapping; independent of padding."""
    digest = hashlib.sha256(tokenizer.files()["tokenizer.json"])
    digest.update(f"eos {tokenizer.eos_token_id}".encode())
    return digest.hexdigest()


def template_digest(tokenizer: GPTJTokenizer) -> str:
    """SHA-256 of its chat template, and of what only the template uses."""
    template = tokenizer.default_chat_template or ""
    digest = hashlib.sha256(template.encode())
    for name, token in sorted(tokenizer.other_tokens.items()):
        if name in template:
            digest.update(f"{name} {token}".encode())
    return digest.hexdigest()

"""Raw rows in, a folder of prepared data (gptj.data.prepared) out, in steps that run in parallel.

A plan groups files into parts; each part is read in chunks of rows, and each chunk becomes a shard.
A shard's content follows from the files and the plan alone, whoever writes it. Its record is
written after it, so a preparation that was interrupted skips what is done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from gptj import storage
from gptj.checkpoints.manifest import MANIFEST, FileRecord, Manifest
from gptj.data.documents import ROW_KINDS, read_documents
from gptj.data.prepared import (
    INDEX,
    PLAN,
    UNFINISHED,
    Index,
    Prepared,
    Shard,
    template_digest,
    to_parquet,
    tokenizer_digest,
)
from gptj.data.rows import DataError, NoRowsError, Row, refuse_row
from gptj.data.sources import data_files, find_columns, read_rows
from gptj.serialization.json_object import parse_object
from gptj.storage.addresses import SAMPLE
from gptj.tokenizer import GPTJTokenizer

PART_BYTES = 64 * 2**20  # of small files that are read together
CHUNK_CHARACTERS = 16 * 2**20  # of the rows of a shard: about four million tokens
MOST_NAMED = 100  # bad rows that the index names

BadRows = Literal["refuse", "skip"]


@dataclass(frozen=True)
class Plan:
    """All that the shards depend on."""

    address: str
    parts: tuple[tuple[str, ...], ...]  # addresses of files
    sizes: tuple[int, ...]  # of all files in their order, bytes
    columns: tuple[str, ...]  # ours, of the kind of rows
    names: Mapping[str, str]  # our name of a column: the files'
    delimiter: str | None
    bad_rows: BadRows
    tokenizer: str  # tokenizer_digest
    template: str  # template_digest, if the rows are chats
    chunk_characters: int

    @classmethod
    def of(
        cls,
        address: str,
        tokenizer: GPTJTokenizer,
        *,
        names: Mapping[str, str],
        delimiter: str | None = None,
        bad_rows: BadRows = "refuse",
        chunk_characters: int = CHUNK_CHARACTERS,
    ) -> Plan:
        """DataError, StorageError: if the address has nothing that can be read."""
        columns = find_columns(
            address, tuple(ROW_KINDS), names, delimiter=delimiter, skip_bad=bad_rows == "skip"
        )
        files = data_files(address)
        sizes = tuple(0 if file.startswith(SAMPLE) else storage.size(file) for file in files)
        parts: list[list[str]] = []
        room = -1  # of the last part
        for file, size in zip(files, sizes, strict=True):
            if size > room:
                parts.append([])
                room = PART_BYTES
            parts[-1].append(file)
            room -= size
        return cls(
            address,
            tuple(map(tuple, parts)),
            sizes,
            columns,
            dict(names),
            delimiter,
            bad_rows,
            tokenizer_digest(tokenizer),
            template_digest(tokenizer) if columns == ("messages",) else "",
            chunk_characters,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a part, and what was wrong with those left out."""

    part: int
    number: int  # in the part
    rows: list[Row]
    bad: list[str]

    @property
    def name(self) -> str:
        return f"shard-{self.part:05}-{self.number:05}"

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps([row.source, row.number, row.values], default=str).encode())
        digest.update(json.dumps(self.bad).encode())
        return digest.hexdigest()


@lru_cache(maxsize=1)
def tokenizer_at(
    address: str, revision: str | None = None, chat_template: str | None = None
) -> GPTJTokenizer:
    """Loaded once per process; with the given source as its chat template, if there is one."""
    tokenizer = GPTJTokenizer.from_pretrained(address, revision=revision)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def begin(plan: Plan, folder: str) -> Index | None:
    """Mark a new folder as this plan's, or return its index if it is finished already.

    Raises:
        DataError: if the folder belongs to another plan, or has other files.
    """
    finished = None
    if storage.exists(storage.join(folder, MANIFEST)):
        finished = Prepared.at(folder)
    if finished is not None:
        _check_same(finished.index.settings, plan, folder)
        storage.delete_folder(storage.join(folder, UNFINISHED))  # left by a kill just after that
        return finished.index
    address = storage.join(folder, UNFINISHED, PLAN)
    if not storage.exists(address):
        if files := storage.list_files(folder):
            raise DataError(f"{folder} has other files, such as {files[0].name}: choose a new one")
        storage.write_bytes(address, plan.to_json().encode())
    _check_same(parse_object(storage.read_bytes(address), address), plan, folder)
    return None


def _check_same(before: Mapping[str, Any], plan: Plan, folder: str) -> None:
    now = json.loads(plan.to_json())
    if different := [key for key in now if before.get(key) != now[key]]:
        raise DataError(
            f"{folder} was begun with other {', '.join(different)}: choose another folder, or "
            f"delete this one"
        )


def chunks(plan: Plan, part: int) -> Iterator[Chunk]:
    """A part's rows, one chunk in memory at a time. DataError for a bad row, unless skipped."""
    number = size = 0
    rows: list[Row] = []
    bad: list[str] = []
    on_bad = refuse_row if plan.bad_rows == "refuse" else lambda error: bad.append(str(error))
    for file in plan.parts[part]:
        try:
            for row in read_rows(
                file, plan.columns, plan.names, delimiter=plan.delimiter, on_bad=on_bad
            ):
                rows.append(row)
                size += sum(map(_length, row.values.values()))
                if size >= plan.chunk_characters:
                    yield Chunk(part, number, rows, bad[:])
                    number, size, rows = number + 1, 0, []
                    bad.clear()
        except NoRowsError:
            continue  # an empty file among others
    if rows or bad:
        yield Chunk(part, number, rows, bad[:])


def _length(value: Any) -> int:
    """In characters; of anything but text as JSON. Whether it must be text is checked later."""
    return len(value) if isinstance(value, str) else len(json.dumps(value, default=str))


def write_shard(plan: Plan, folder: str, chunk: Chunk, tokenizer: GPTJTokenizer) -> Shard:
    """Tokenize a chunk and write its shard, unless that is done already."""
    record = storage.join(folder, UNFINISHED, f"{chunk.name}.json")
    digest = chunk.digest
    try:
        fields = parse_object(storage.read_bytes(record), record)
        shard = Shard(**{**fields, "bad": tuple(fields["bad"])})
        if shard.source == digest:
            return shard
    except storage.NotFoundError:
        pass
    bad = list(chunk.bad)
    on_bad = refuse_row if plan.bad_rows == "refuse" else lambda error: bad.append(str(error))
    documents = list(read_documents(chunk.rows, tokenizer, on_bad))
    name, content = f"{chunk.name}.parquet", b""
    if documents:
        content = to_parquet(documents)
        storage.write_bytes(storage.join(folder, name), content)
    tokens = sum(len(each.ids) for each in documents)
    shard = Shard(
        name,
        len(documents),
        tokens,
        sum(len(d.ids) if d.learned is None else int(d.learned.sum()) for d in documents),
        len(content),
        hashlib.sha256(content).hexdigest(),
        digest,
        len(bad),
        tuple(bad[:MOST_NAMED]),
    )
    storage.write_bytes(record, json.dumps(asdict(shard)).encode())
    return shard


def finish(plan: Plan, folder: str, shards: Iterable[Shard], tokenizer: GPTJTokenizer) -> Index:
    """Write the index and, last, the manifest. DataError if no row is left."""
    ordered = sorted(shards, key=lambda shard: shard.name)
    index = Index(
        settings=json.loads(plan.to_json()),
        tokenizer=plan.tokenizer,
        rows=sum(shard.rows for shard in ordered),
        tokens=sum(shard.tokens for shard in ordered),
        learned=sum(shard.learned for shard in ordered),
        skipped=sum(shard.skipped for shard in ordered),
        shards=ordered,
        bad=[each for shard in ordered for each in shard.bad][:MOST_NAMED],
    )
    if not index.rows:
        raise DataError(f"{plan.address} has no good row of {index.skipped}: {index.bad[:1]}")
    files = {each.name: FileRecord(each.size, each.sha256) for each in ordered if each.rows}
    content = (json.dumps(index.to_fields(), indent=1) + "\n").encode()
    for name, each in {INDEX: content, **tokenizer.files()}.items():
        storage.write_bytes(storage.join(folder, name), each)
        files[name] = FileRecord(len(each), hashlib.sha256(each).hexdigest())
    Manifest(folder, files).write()
    storage.delete_folder(storage.join(folder, UNFINISHED))
    return index

"""Raw rows in, a folder of prepared data (gptj.data.prepared) out, in parallel steps.

A plan groups files into parts; each part is read in chunks of rows, and each chunk becomes a shard.
A shard's content depends only on the files and the plan, not on the process that writes it. Its
record is written after it, so an interrupted preparation skips finished shards.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from gptj import storage
from gptj.checkpoints.manifest import MANIFEST, FileRecord, Manifest
from gptj.data.labels import LabelNames
from gptj.data.prepared import (
    MAX_NAMED,
    Index,
    Prepared,
    Shard,
    template_digest,
    tokenizer_digest,
)
from gptj.data.rows import DataError, NoRowsError, Row
from gptj.data.shards import SHARD_KINDS, Source, TaskName, to_parquet
from gptj.data.sources import data_files, find_columns, in_parts, read_rows
from gptj.data.split import Split, split_rows
from gptj.data.unfinished import (
    INDEX,
    PLAN,
    UNFINISHED,
    check_same_plan,
    claim,
    delete_records,
    length,
    other_rows,
    read_record,
    write_record,
)
from gptj.storage.addresses import HUB_DATA
from gptj.tokenizer import GPTJTokenizer

CHUNK_CHARACTERS = 16 * 2**20  # per shard: about four million tokens

# Names like all that is written, besides the tokenizer's.
FILES = ("shard-00000-00000.parquet", INDEX, MANIFEST, f"{UNFINISHED}/{PLAN}")

_COMMIT = re.compile(rf"(?<=^{HUB_DATA})([^@]+)@[0-9a-f]{{40}}/")

BadRows = Literal["refuse", "skip"]


@dataclass(frozen=True)
class Plan:
    """Everything that the shards depend on."""

    address: str
    parts: tuple[tuple[str, ...], ...]  # addresses of files
    sizes: tuple[int, ...]  # of all files in their order, bytes
    columns: tuple[str, ...]  # ours, of the kind of rows
    names: Mapping[str, str]  # our name of a column -> the files'
    delimiter: str | None
    bad_rows: BadRows
    tokenizer: str  # tokenizer_digest
    template: str  # template_digest, if the rows are chats
    chunk_characters: int
    task: TaskName = "causal-lm"
    label_names: LabelNames | None = None  # of all labels; None: not restricted
    split: Split | None = None  # the part of the rows to read; None: all
    stamps: tuple[str, ...] = ()  # versions of all files in their order
    problem_type: str | None = None  # of a classifier's labels; None: not yet known

    @classmethod
    def of(
        cls,
        address: str,
        tokenizer: GPTJTokenizer | None,
        *,
        names: Mapping[str, str],
        delimiter: str | None = None,
        bad_rows: BadRows = "refuse",
        chunk_characters: int = CHUNK_CHARACTERS,
        task: TaskName = "causal-lm",
        label_names: LabelNames | None = None,
        split: Split | None = None,
        problem_type: str | None = None,
    ) -> Plan:
        """The plan for the files at an address.

        Args:
            tokenizer: None for a plan that is not used for tokenizing.

        Raises:
            DataError, StorageError: if the address has no readable files.
        """
        kinds = SHARD_KINDS[task].row_kinds
        skip = bad_rows == "skip"
        files = data_files(address)
        columns = find_columns(address, kinds, names, delimiter=delimiter, skip_bad=skip)
        return cls(
            address,
            in_parts(files),
            tuple(file.size for file in files),
            columns,
            dict(names),
            delimiter,
            bad_rows,
            tokenizer_digest(tokenizer) if tokenizer else "",
            template_digest(tokenizer) if tokenizer and columns == ("messages",) else "",
            chunk_characters,
            task,
            label_names,
            split,
            tuple(file.version for file in files),
            problem_type,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a part, and errors of skipped ones."""

    part: int
    number: int  # in the part
    rows: list[Row]
    skipped: int  # bad rows among them
    bad: tuple[str, ...]  # errors of the first bad rows

    @property
    def name(self) -> str:
        return f"shard-{self.part:05}-{self.number:05}"

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps([row.source, row.number, row.values], default=str).encode())
        digest.update(json.dumps([self.skipped, *self.bad]).encode())
        return digest.hexdigest()


@lru_cache(maxsize=1)
def tokenizer_at(
    address: str, revision: str | None = None, chat_template: str | None = None
) -> GPTJTokenizer:
    """The tokenizer, loaded once per process, with the given chat template, if any."""
    tokenizer = GPTJTokenizer.from_pretrained(address, revision=revision)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def begin(plan: Plan, folder: str) -> Index | None:
    """Claim a new folder for this plan, or return its index if it is already finished.

    Raises:
        DataError: if the folder belongs to another plan, or has other files.
    """
    finished = None
    if storage.exists(storage.join(folder, MANIFEST)):
        finished = Prepared.at(folder)
    if finished is not None:
        check_same_plan(folder, differences(finished.index.settings, plan))
        if not is_current(plan, finished.index):
            raise other_rows(folder, plan.address)
        delete_records(folder)  # left if killed after finishing
        return finished.index
    check_same_plan(folder, differences(claim(folder, plan.to_json()), plan))
    return None


def differences(before: Mapping[str, Any], plan: Plan) -> list[str]:
    """Fields in which a plan differs from an earlier preparation's, other than stamps.

    Commits of a hub data set are ignored, since the files may be the same.
    """
    missing = {"task": "causal-lm", "label_names": None, "split": None}  # in older plans
    now = json.loads(plan.to_json())
    # Older plans have no problem_type, and shards that training has checked since.
    earlier = {"problem_type": now["problem_type"], **missing, **before}
    for each in (now, earlier):
        parts = each.get("parts", ())
        each["parts"] = [[_COMMIT.sub(r"\1/", file) for file in part] for part in parts]
    return [key for key in now if key != "stamps" and earlier.get(key) != now[key]]


def is_current(plan: Plan, index: Index) -> bool:
    """Whether an index was made from this plan and the files' current rows.

    Files are read only if their stamps differ, as after copying them.
    """
    if differences(index.settings, plan):
        return False
    if list(plan.stamps) == index.settings.get("stamps"):
        return True
    made = {shard.name: shard.source for shard in index.shards}
    found = {
        f"{chunk.name}.parquet": chunk.digest
        for part in range(len(plan.parts))
        for chunk in chunks(plan, part)
    }
    return found == made


def part_rows(plan: Plan, part: int, on_bad: Callable[[DataError], None]) -> Iterator[Row]:
    """A part's rows, or the plan's split of them; none if its files are empty."""
    rows = _rows(plan, part, on_bad)
    return rows if plan.split is None else split_rows(rows, plan.split, part)


def _rows(plan: Plan, part: int, on_bad: Callable[[DataError], None]) -> Iterator[Row]:
    for file in plan.parts[part]:
        try:
            yield from read_rows(
                file, plan.columns, plan.names, delimiter=plan.delimiter, on_bad=on_bad
            )
        except NoRowsError:
            continue  # an empty file among others


class _BadRows:
    """Handles bad rows: raises, or counts them and keeps the first errors."""

    def __init__(self, plan: Plan) -> None:
        self._refuse = plan.bad_rows == "refuse"
        self.count = 0
        self.named: list[str] = []

    def __call__(self, error: DataError) -> None:
        if self._refuse:
            raise error
        self.count += 1
        if len(self.named) < MAX_NAMED:
            self.named.append(str(error))

    def clear(self) -> None:
        self.count = 0
        self.named.clear()


def chunks(plan: Plan, part: int) -> Iterator[Chunk]:
    """A part's rows, one chunk in memory at a time. DataError for a bad row, unless skipped."""
    number = size = 0
    rows: list[Row] = []
    bad = _BadRows(plan)
    for row in part_rows(plan, part, bad):
        rows.append(row)
        size += sum(map(length, row.values.values()))
        if size >= plan.chunk_characters:
            yield Chunk(part, number, rows, bad.count, tuple(bad.named))
            number, size, rows = number + 1, 0, []
            bad.clear()
    if rows or bad.count:
        yield Chunk(part, number, rows, bad.count, tuple(bad.named))


def write_shard(plan: Plan, folder: str, chunk: Chunk, tokenizer: GPTJTokenizer) -> Shard:
    """Tokenize a chunk and write its shard, unless already done."""
    digest = chunk.digest
    if (fields := read_record(folder, chunk.name)) is not None:
        shard = Shard(**{**fields, "bad": tuple(fields["bad"])})
        if shard.source == digest:
            return shard
    bad = _BadRows(plan)
    source = Source(plan.parts[chunk.part], plan.label_names, plan.problem_type)
    encoded = SHARD_KINDS[plan.task].encode(chunk.rows, tokenizer, source, bad)
    name, content = f"{chunk.name}.parquet", b""
    if encoded.rows:
        content = to_parquet(encoded)
        storage.write_bytes(storage.join(folder, name), content)
    shard = Shard(
        name,
        encoded.rows,
        encoded.tokens,
        encoded.learned,
        len(content),
        hashlib.sha256(content).hexdigest(),
        digest,
        encoded.digest,
        chunk.skipped + bad.count,
        (*chunk.bad, *bad.named)[:MAX_NAMED],
    )
    write_record(folder, chunk.name, asdict(shard))
    return shard


def prepare(plan: Plan, folder: str, tokenizer: GPTJTokenizer) -> Index:
    """Prepare everything in this process, holding one chunk in memory.

    Raises:
        DataError: for a bad row, unless skipped; if no rows are left; or as in begin.
        StorageError: if the files cannot be read or the folder cannot be written.
    """
    if (done := begin(plan, folder)) is not None:
        return done
    parts = range(len(plan.parts))
    found = (
        write_shard(plan, folder, chunk, tokenizer)
        for part in parts
        for chunk in chunks(plan, part)
    )
    return finish(plan, folder, found, tokenizer)


def finish(plan: Plan, folder: str, shards: Iterable[Shard], tokenizer: GPTJTokenizer) -> Index:
    """Write the index and, last, the manifest. DataError if no rows are left."""
    ordered = sorted(shards, key=lambda shard: [int(n) for n in re.findall(r"\d+", shard.name)])
    index = Index(
        settings=json.loads(plan.to_json()),
        tokenizer=plan.tokenizer,
        rows=sum(shard.rows for shard in ordered),
        tokens=sum(shard.tokens for shard in ordered),
        learned=sum(shard.learned for shard in ordered),
        skipped=sum(shard.skipped for shard in ordered),
        shards=ordered,
        bad=[each for shard in ordered for each in shard.bad][:MAX_NAMED],
    )
    if not index.rows and index.skipped:
        raise DataError(f"all {index.skipped} rows of {plan.address} are bad: {index.bad[:1]}")
    if not index.rows and plan.split is not None:
        raise plan.split.leaves_nothing(plan.address)
    if not index.rows:
        raise NoRowsError(f"{plan.address} has no rows")
    files = {each.name: FileRecord(each.size, each.sha256) for each in ordered if each.rows}
    content = (json.dumps(index.to_fields(), indent=1) + "\n").encode()
    for name, each in {INDEX: content, **tokenizer.files()}.items():
        storage.write_bytes(storage.join(folder, name), each)
        files[name] = FileRecord(len(each), hashlib.sha256(each).hexdigest())
    Manifest(folder, files).write()
    delete_records(folder)
    return index

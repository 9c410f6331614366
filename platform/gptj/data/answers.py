"""A data set's rows in, a folder of JSON lines with one answer per row out, in parallel steps.

A plan groups files into parts, and each part is read in chunks of rows. Each chunk's answers go to
`output-PPPPP-CCCCC.jsonl`, in row order; rows without an answer go to `errors-PPPPP-CCCCC.jsonl`,
with the reason. A chunk's record is written after both, so that an interrupted run skips finished
chunks. `index.json` and a manifest come last.

Whoever writes to the folder holds its lease (`lease_of`), which ends with the unfinished files.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gptj import storage
from gptj.checkpoints.manifest import MANIFEST, FileRecord, Manifest
from gptj.data.rows import DataError, NoRowsError, Row
from gptj.data.sources import data_files, in_parts, read_rows
from gptj.data.unfinished import (
    INDEX,
    PLAN,
    UNFINISHED,
    begun_plan,
    check_same_plan,
    check_unused,
    claim,
    delete_records,
    length,
    other_rows,
    read_record,
    write_record,
)
from gptj.serialization.json_object import parse_object, to_json
from gptj.storage.addresses import SAMPLE
from gptj.storage.lease import TERM_SECONDS, Claim, Lease

CHUNK_ROWS = 256
CHUNK_CHARACTERS = 4 * 2**20  # chunks of long rows have fewer than CHUNK_ROWS
LEASE = f"{UNFINISHED}/lease"
OUTPUT, ERRORS = "output", "errors"
FILES = (  # names like all that is written
    *(f"{kind}{part}.jsonl" for part in ("", "-00000-00000") for kind in (OUTPUT, ERRORS)),
    *(INDEX, MANIFEST, f"{UNFINISHED}/{PLAN}"),
)


@dataclass(frozen=True)
class Plan:
    """Everything that the answers depend on."""

    address: str
    parts: tuple[tuple[str, ...], ...]  # addresses of files
    sizes: tuple[int, ...]  # of all files in their order, bytes
    columns: tuple[str, ...]  # ours
    names: Mapping[str, str]  # our name of a column -> the files'
    delimiter: str | None
    chunk_rows: int
    settings: Mapping[str, Any]  # the model and what it is asked, as plain values
    whole: bool = False  # one file of outputs and one of errors, instead of one for each chunk
    stamps: tuple[str, ...] = ()  # versions of all files in their order
    optional: tuple[str, ...] = ()  # columns, ours, that rows may have

    @classmethod
    def of(
        cls,
        address: str,
        columns: Sequence[str],
        names: Mapping[str, str],
        delimiter: str | None,
        *,
        chunk_rows: int = CHUNK_ROWS,
        settings: Mapping[str, Any],
        whole: bool = False,
        optional: Sequence[str] = (),
    ) -> Plan:
        """DataError, StorageError: if the address has no readable files."""
        files = data_files(address)
        return cls(
            address,
            in_parts(files),
            tuple(file.size for file in files),
            tuple(columns),
            dict(names),
            delimiter,
            chunk_rows,
            settings,
            whole,
            tuple(file.version for file in files),
            tuple(optional),
        )

    @property
    def folder(self) -> str:
        """The deepest folder with all files, to name them relative to it; empty for a sample."""
        files = [file for part in self.parts for file in part]
        if files[0].startswith(SAMPLE):
            return ""
        scheme = files[0][: files[0].find("://") + 3] if "://" in files[0] else ""
        names = [posixpath.dirname(file.removeprefix(scheme)) for file in files]
        return scheme + posixpath.commonpath(names)  # of which // would become /

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True, default=str)


@dataclass(frozen=True)
class Entry:
    """A row of a chunk, or why it cannot be read."""

    file: str  # its name below the plan's folder
    number: int | None  # as Row.number; None: unknown
    row: Row | None
    problem: str = ""  # if row is None
    values: Mapping[str, Any] = field(default_factory=dict)  # that a bad row has, by our names

    @property
    def key(self) -> dict[str, Any]:
        return {"file": self.file, "row": self.number}


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a part."""

    part: int
    number: int  # in the part
    entries: list[Entry]

    @property
    def name(self) -> str:
        return f"{self.part:05}-{self.number:05}"

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for each in self.entries:
            values = (each.values or None) if each.row is None else each.row.values
            content = json.dumps([each.file, each.number, values, each.problem], default=str)
            digest.update(content.encode(errors="surrogatepass"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Record:
    """The outcome of a finished chunk."""

    name: str
    rows: int
    failed: int  # rows in the file of errors
    source: str  # Chunk.digest
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # as FileRecord, by name

    @classmethod
    def find(cls, folder: str, chunk: Chunk) -> Record | None:
        """The record of a chunk, if it is finished."""
        if (fields := read_record(folder, chunk.name)) is None:
            return None
        record = cls(**fields)
        return record if record.source == chunk.digest else None


@dataclass(frozen=True)
class Index:
    """A finished folder's contents, and how it was made."""

    settings: Mapping[str, Any]  # the plan's
    rows: int
    failed: int
    source: str = ""  # digest of all chunks' digests; empty in older folders


def check(plan: Plan, folder: str) -> Index | None:
    """A finished folder's index; None if it is new, or this plan's and unfinished. Only reads.

    Raises:
        DataError: if the folder belongs to another plan, or has other files.
    """
    if Manifest.read(folder) is not None:
        address = storage.join(folder, INDEX)
        index = Index(**parse_object(storage.read_bytes(address), address))
        _check_same(index.settings, plan, folder)
        _check_current(index, plan, folder)
        return index
    if (begun := begun_plan(folder)) is not None:
        _check_same(begun, plan, folder)
    else:
        check_unused(folder)
    return None


def begin(plan: Plan, folder: str, lease: Lease | None = None) -> Index | None:
    """Claim a new folder for this plan, or return its index if it is already finished.

    Raises what `check` does.

    Args:
        lease: the folder's, if this process holds it; released if it is finished.
    """
    if (index := check(plan, folder)) is not None:
        clear(folder, lease)  # left if killed after finishing
        return index
    _check_same(claim(folder, plan.to_json()), plan, folder)
    return None


def lease_of(folder: str, *, term: float = TERM_SECONDS) -> Lease:
    """The lease of a folder of answers. Raises what Lease does."""
    return Lease(storage.join(folder, LEASE), term=term)


def clear(folder: str, lease: Lease | None = None) -> None:
    """Release a finished folder's lease, and delete it with all other unfinished files."""
    if lease is not None:
        lease.release()  # first: a renewal would write it again
    delete_records(folder)


def _check_same(before: Mapping[str, Any], plan: Plan, folder: str) -> None:
    now = json.loads(plan.to_json())
    before = {"optional": [], **before}  # which earlier plans lack
    # Copied files have other stamps but the same rows; chunks' digests detect real changes.
    if different := [key for key in now if key != "stamps" and before.get(key) != now[key]]:
        inner = before.get("settings"), now["settings"]
        if different == ["settings"] and isinstance(inner[0], dict):
            names = inner[0].keys() | inner[1].keys()
            different = sorted(n for n in names if inner[0].get(n) != inner[1].get(n))
    check_same_plan(folder, different)


def _check_current(index: Index, plan: Plan, folder: str) -> None:
    """DataError if the files' rows have changed since they were answered.

    Files are read only if their stamps differ.
    """
    if not index.source or list(plan.stamps) == index.settings.get("stamps"):
        return
    found = (
        (each.name, each.digest) for part in range(len(plan.parts)) for each in chunks(plan, part)
    )
    if _source(found) != index.source:
        raise other_rows(folder, plan.address)


def _source(digests: Iterable[tuple[str, str]]) -> str:
    """Digest of chunks' names and digests, in order."""
    content = "".join(f"{name} {digest}\n" for name, digest in digests)
    return hashlib.sha256(content.encode()).hexdigest()


def chunks(plan: Plan, part: int) -> Iterator[Chunk]:
    """A part's rows, good and bad, one chunk in memory at a time. DataError for a bad file."""
    folder = plan.folder
    number = size = 0
    entries: list[Entry] = []
    for file in plan.parts[part]:
        for entry in _entries(plan, file, file[len(folder) :].lstrip("/")):
            entries.append(entry)
            if entry.row is not None:
                size += sum(map(length, entry.row.values.values()))
            if len(entries) >= plan.chunk_rows or size >= CHUNK_CHARACTERS:
                yield Chunk(part, number, entries)
                number, size, entries = number + 1, 0, []
    if entries:
        yield Chunk(part, number, entries)


def _entries(plan: Plan, file: str, name: str) -> Iterator[Entry]:
    bad: list[Entry] = []  # since the last good row

    def on_bad(error: DataError) -> None:
        bad.append(Entry(name, error.number, None, str(error), error.values))

    try:
        for row in read_rows(
            file,
            plan.columns,
            plan.names,
            optional=plan.optional,
            delimiter=plan.delimiter,
            on_bad=on_bad,
        ):
            yield from bad
            bad.clear()
            yield Entry(name, row.number, row)
    except NoRowsError:  # a file that is empty or has only bad rows
        pass
    yield from bad


def write(
    plan: Plan,
    folder: str,
    chunk: Chunk,
    outputs: Sequence[Mapping[str, Any]],
    errors: Sequence[Mapping[str, Any]],
    claim: Claim | None = None,
) -> Record:
    """Write a chunk's lines, then its record.

    Args:
        claim: of the lease under which this process writes; LeaseLostError once it is lost.
    """
    assert len(outputs) + len(errors) == len(chunk.entries)
    files: dict[str, dict[str, Any]] = {}
    for kind, lines in ((OUTPUT, outputs), (ERRORS, errors)):
        name = f"{kind}-{chunk.name}.jsonl"
        if plan.whole:
            name = f"{UNFINISHED}/{name}"
        address = storage.join(folder, name)
        if claim is not None:
            claim.check()
        if not lines:
            storage.delete(address)  # left by an interrupted run
            continue
        content = "".join(to_json(line, ensure_ascii=False, default=str) + "\n" for line in lines)
        # Lone surrogates in a bad row cannot be encoded as UTF-8.
        encoded = content.encode("utf-8", "backslashreplace")
        storage.write_bytes(address, encoded)
        files[name] = asdict(FileRecord(len(encoded), hashlib.sha256(encoded).hexdigest()))
    record = Record(chunk.name, len(chunk.entries), len(errors), chunk.digest, files)
    if claim is not None:
        claim.check()
    write_record(folder, chunk.name, asdict(record))
    return record


def finish(plan: Plan, folder: str, records: Iterable[Record], lease: Lease | None = None) -> Index:
    """Write the index and, last, the manifest.

    Args:
        lease: the folder's, if this process holds it; released at the end.

    Raises:
        NoRowsError: if there were no rows.
        LeaseLostError: if another process has taken over.
    """
    ordered = sorted(records, key=lambda record: [int(n) for n in record.name.split("-")])
    assert len({record.name for record in ordered}) == len(ordered)
    index = Index(
        json.loads(plan.to_json()),
        sum(record.rows for record in ordered),
        sum(record.failed for record in ordered),
        _source((record.name, record.source) for record in ordered),
    )
    if not index.rows:
        raise NoRowsError(f"{plan.address} has no rows")
    files = {
        name: FileRecord(**fields) for record in ordered for name, fields in record.files.items()
    }
    if lease is not None:
        lease.claim.check()
    if plan.whole:
        files = {
            f"{kind}.jsonl": _joined(
                storage.join(folder, f"{kind}.jsonl"),
                [storage.join(folder, name) for name in files if f"/{kind}-" in name],
            )
            for kind in (OUTPUT, ERRORS)
        }
    for file in storage.list_files(folder, follow_links=False):
        # Left by chunks from before the data changed.
        if file.name.startswith((f"{OUTPUT}-", f"{ERRORS}-")) and file.name not in files:
            storage.delete(file.address)
    content = (json.dumps(asdict(index), indent=1) + "\n").encode()
    storage.write_bytes(storage.join(folder, INDEX), content)
    files[INDEX] = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    if lease is not None:
        lease.claim.check()
    Manifest(folder, files).write()
    clear(folder, lease)
    return index


def _joined(address: str, parts: Sequence[str]) -> FileRecord:
    """Concatenate the parts into one file."""
    digest, size = hashlib.sha256(), 0
    with storage.open_write(address) as file:
        for part in parts:
            content = storage.read_bytes(part)
            file.write(content)
            digest.update(content)
            size += len(content)
    return FileRecord(size, digest.hexdigest())

#!/usr/bin/env python
"""Answer every row of a data set with a checkpoint, in parallel.

    ray job submit -- jobs/batch_inference.py CHECKPOINT INPUT OUTPUT [key=value …]

CHECKPOINT is a folder, s3://… or a hub id. INPUT is Parquet, JSON, CSV or text (also .gz, .zst): a
file, folder or pattern, local or s3://…, or sample://NAME. The model's head determines the columns:
`text`, `prompt` or `messages` (language models); `text`, perhaps `text_pair` (classifiers);
`question` and `context`; `text` (embeddings). OUTPUT, a new folder that all nodes can reach, gets
JSON lines in the rows' order, `output-*.jsonl`: each row's `file`, `row` (from 1) and answer.
Rows that cannot be answered are in `errors-*.jsonl`, with the reason. `index.json` counts both;
the manifest comes last. The same command, submitted again, continues where it stopped.

INPUT may also be OpenAI's batch file (`custom_id`, `method`, `url`, `body`; /v1/completions,
/v1/chat/completions or /v1/embeddings): OUTPUT then gets its result files, `output.jsonl` and
`errors.jsonl`.
Keys, with their defaults:

    service=…               embeddings, for a model with any head; default: by the head, or in batch
                            files by the first url
    parameters.NAME=…       of each request, as over HTTP: parameters.max_tokens=64,
                            parameters.temperature=0, parameters.top_k=1
    args.NAME=…             of the model, as in serve.yaml: args.dtype=bfloat16,
                            args.max_num_seqs=128, args.quantization=int8, args.pooling=mean
    columns.NAME=…          our column's name in the data, such as columns.text=review
    keep=[…]                columns to copy to the answers, such as keep=[id]
    delimiter=…             of CSV; default: the one in the header
    workers=…               concurrent models; default: as many as GPUs, or 1
    device=auto             cpu or gpu; auto: GPUs if the cluster has any
    cpus=1                  CPUs per worker
    chunk_rows=256          rows that are read, answered and written together
"""

from __future__ import annotations

import sys

from gptj_jobs.key_value import help_if_asked

if __name__ == "__main__":
    help_if_asked(sys.argv[1:], __doc__)  # before the imports, which take seconds

import asyncio
import hashlib
import logging
import pickle
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from deployments.device import replica_device
from deployments.generation import Arguments as GenerationArguments
from deployments.in_process import (
    ARGUMENTS,
    EMBEDDINGS,
    HEADS,
    InProcessService,
    ServiceName,
    as_json,
)
from deployments.loading import Arguments, check
from gptj import storage
from gptj.adapters.base import Base
from gptj.chat import read_template
from gptj.checkpoints.folder import ADAPTER_CONFIG, ModelFolder, check_outside
from gptj.config import GPTJConfig
from gptj.data.answers import (
    CHUNK_ROWS,
    FILES,
    Chunk,
    Entry,
    Index,
    Plan,
    Record,
    begin,
    chunks,
    clear,
    finish,
    lease_of,
)
from gptj.data.answers import check as check_folder
from gptj.data.answers import write as write_chunk
from gptj.data.rows import DataError, MissingColumnError, Row, shown
from gptj.data.sources import check_apart, find_columns, read_rows
from gptj.environment.extras import MissingPackageError, missing
from gptj.serving.adapters import address_below
from gptj.serving.errors import APIError, ModelError, OverloadedError, UnavailableError
from gptj.storage.addresses import absolute, normalized
from gptj.storage.lease import TERM_SECONDS, Claim, Lease, LeaseHeldError, LeaseLostError
from gptj.training.sections import Delimiter, is_text
from gptj.workers.errors import QueueFullError
from gptj_jobs.key_value import checked, parsed_yaml
from gptj_jobs.row_requests import (
    BATCH,
    FIELDS,
    KINDS,
    METHOD,
    check_parameters,
    fields_of,
    request_of,
    service_of,
)

try:
    import ray
    import ray.data
    from ray.exceptions import RayError

    from gptj_jobs.holding import hold
    from gptj_jobs.ray_errors import reason
except ModuleNotFoundError as error:
    raise missing(error, "jobs/batch_inference.py", extra="train") from error

PROGRESS_SECONDS = 10
CHUNKS_AT_ONCE = 4  # per worker: the next ones start before the last rows of one are answered
AHEAD = 4  # rows in progress or queued, for each row of a step
MAX_RETRIES = 5  # of a chunk whose worker died: its rows may be the reason
MAX_QUEUED = 2**20  # outputs; the number of concurrent rows bounds them
RETRY_SECONDS = 0.05
UNAVAILABLE_SECONDS = 600.0  # of retrying a row: the storage of its adapter may be down
UNAVAILABLE_PAUSE_SECONDS = 1.0
STALLED_SECONDS = 600.0

logger = logging.getLogger("batch_inference")

Positive = Annotated[int, Field(ge=1)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: Annotated[str, AfterValidator(normalized)]
    input: Annotated[str, AfterValidator(partial(normalized, samples=True))]
    output: Annotated[str, AfterValidator(normalized)]
    service: Literal["embeddings"] | None = None
    parameters: dict[str, Any] = {}
    args: dict[str, Any] = {}
    columns: dict[str, str] = {}
    keep: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    delimiter: Delimiter | None = None
    workers: Positive | None = None
    device: Literal["auto", "cpu", "gpu"] = "auto"
    cpus: Annotated[float, Field(gt=0)] = 1
    chunk_rows: Positive = CHUNK_ROWS


SECTIONS = ("columns", "parameters", "args")
TEXT_ARGUMENTS = {  # of any service: they stay as they are written
    name
    for arguments in ARGUMENTS.values()
    for name, field in arguments.model_fields.items()
    if is_text(field.annotation)
}
PLACES = ("checkpoint", "input", "output")


def main(words: Sequence[str] | None = None) -> None:
    """Run this process's command line, or `words`."""
    words = sys.argv[1:] if words is None else words
    help_if_asked(words, __doc__)
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stdout, format="%(asctime)s %(message)s", force=True
    )
    logger.setLevel(logging.INFO)
    try:
        settings = read_settings(words)
        index = answer_all(settings)
    except (ValueError, OSError, LeaseLostError) as error:  # users' errors need no traceback
        sys.exit(f"error: {error}")
    except RayError as error:
        sys.exit(
            f"error: workers died {1 + MAX_RETRIES} times on the same rows, or Ray failed: "
            f"{reason(error).rstrip('.')}. Finished answers are kept: rerun the command to resume"
        )
    answered = index.rows - index.failed
    logger.info("%d rows: %d answers, %d errors", index.rows, answered, index.failed)


def read_settings(words: Sequence[str]) -> Settings:
    """Parse the command line; ValueError with the key, its value and the remedy."""
    places, rest = words[: len(PLACES)], words[len(PLACES) :]
    if len(places) < len(PLACES) or any("=" not in word for word in rest):
        raise ValueError(f"usage:\n{__doc__}")
    fields: dict[str, Any] = {
        **dict(zip(PLACES, places, strict=True)),
        **{section: {} for section in SECTIONS},
    }
    for word in rest:
        key, _, text = word.partition("=")
        section, _, name = key.removeprefix("data.").partition(".")
        if section == "columns" and name:
            fields[section][name] = text
        elif section in SECTIONS and name:
            stays = section == "args" and name in TEXT_ARGUMENTS
            fields[section][name] = parsed_yaml(word, text, is_text=stays)
        elif not name and section in Settings.model_fields.keys() - {*PLACES, *SECTIONS}:
            stays = section == "keep"
            is_yaml = section != "delimiter"
            fields[section] = parsed_yaml(word, text, is_text=stays) if is_yaml else text
        else:
            raise ValueError(f"{word}: unknown key\n{__doc__}")
    return checked(Settings, fields)


@dataclass(frozen=True)
class Task:
    """What the workers need to know."""

    service: ServiceName
    arguments: Arguments
    parameters: Mapping[str, Any]
    keep: tuple[str, ...]
    is_batch: bool  # the input is OpenAI's batch file


def answer_all(settings: Settings) -> Index:
    """Answer the rows that are left. ValueError, OSError: for invalid settings or files."""
    folder = absolute(settings.output)
    task, plan = planned(settings)
    storage.check_writable(folder)
    if task.is_batch:
        check_custom_ids(plan)
    if (done := check_folder(plan, folder)) is not None:
        clear(folder)  # left if killed after finishing
        return _already(folder, done)
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)
    holder = hold(folder, _in_use(folder), "OUTPUT")
    on_gpu, workers = _workers(settings)
    with holding(folder) as lease:
        if (done := begin(plan, folder, lease)) is not None:  # meanwhile, by the last holder
            return _already(folder, done)
        logger.info(
            "%s of %s: %d files of %.1f MB, %d workers on %s",
            task.service,
            plan.address,
            len(plan.sizes),
            sum(plan.sizes) / 1e6,
            workers,
            "GPUs" if on_gpu else "CPUs",
        )
        records = list(_records(plan, folder, task, settings, on_gpu, workers, lease.claim))
        index = finish(plan, folder, records, lease)
    del holder  # until here, this reference held the folder
    return index


def _already(folder: str, index: Index) -> Index:
    logger.info("%s is already complete", folder)
    return index


@contextmanager
def holding(folder: str, *, term: float = TERM_SECONDS) -> Iterator[Lease]:
    """Hold the lease of a folder of answers in the block. ValueError if another process does.

    Args:
        term: seconds without a sign of life after which a holder on another machine is taken for
            dead.
    """
    try:
        lease = lease_of(folder, term=term)
    except LeaseHeldError as error:
        raise ValueError(
            f"{_in_use(folder)}: {error}. Wait for it to end, stop it, or choose another OUTPUT"
        ) from error
    with lease, storage.fenced(folder, lease.claim.check):
        yield lease


def _in_use(folder: str) -> str:
    return f"another job is writing its answers to {folder}"


def planned(settings: Settings) -> tuple[Task, Plan]:
    """The task and plan, after all checks that need neither a cluster nor weights."""
    address = absolute(settings.input, samples=True)
    check_apart(address, settings.output, FILES)
    checkpoint = settings.checkpoint
    if Path(checkpoint).exists():  # otherwise it may be a hub id
        checkpoint = absolute(checkpoint)
    check_outside(settings.output, checkpoint)
    revision = settings.args.get("revision")
    with ModelFolder.open(checkpoint, revision=revision) as model:
        service = settings.service or service_of(GPTJConfig.from_folder(model), checkpoint)
        digests = {"digest": _identity(model)}
    # From the first readable row; unreadable ones become errors of their own.
    columns = find_columns(
        address,
        [(*kind, *settings.keep) for kind in (*KINDS[service], BATCH)],
        {ours: theirs for ours, theirs in settings.columns.items() if ours != METHOD},
        delimiter=settings.delimiter,
        skip_bad=True,
    )
    first = _first_row(settings, address, columns)
    is_batch = set(BATCH) <= set(columns)
    if is_batch and settings.service is None and first.value("url") == EMBEDDINGS:
        service = "embeddings"
    if is_batch and (settings.parameters or settings.keep):
        raise ValueError(
            f"parameters and keep are for rows, but {address} is a batch file, whose requests have "
            f"their own bodies: leave them out"
        )
    if taken := FIELDS.intersection(settings.keep):
        raise ValueError(f"keep={min(taken)}: answers have this field; rename the column")
    args = {"max_queued": MAX_QUEUED, **settings.args, "checkpoint": checkpoint}
    try:
        arguments = ARGUMENTS[service](**args)
    except ValidationError as error:
        raise ValueError(
            "; ".join(f"args.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        ) from error
    check(HEADS[service], arguments)
    if not is_batch:
        check_parameters(service, columns, settings.parameters)
    if isinstance(arguments, GenerationArguments):
        names = _asked_models(settings, address, columns, arguments, is_batch)
        digests |= _further_digests(arguments, names)
    task = Task(service, arguments, settings.parameters, settings.keep, is_batch)
    plan = Plan.of(
        address,
        columns,
        settings.columns,
        settings.delimiter,
        chunk_rows=settings.chunk_rows,
        settings={
            "checkpoint": checkpoint,
            **digests,
            "service": service,
            "args": settings.args,
            "parameters": settings.parameters,
        },
        whole=is_batch,
        optional=(METHOD,) if is_batch else (),
    )
    return task, plan


def _identity(model: ModelFolder) -> str:
    """A model's; with its base's, if it is an adapter, which is merged into it."""
    if not model.is_adapter:
        return model.identity
    with Base.of(model).open(model.address, files=()) as folder:
        return f"{model.identity} {folder.identity}"


def _asked_models(
    settings: Settings,
    address: str,
    columns: Sequence[str],
    arguments: GenerationArguments,
    is_batch: bool,
) -> set[str]:
    """What requests have as their `model`, if there is a folder in which it names an adapter."""
    if arguments.adapter_root is None:
        return set()
    if not is_batch:
        return {name for name in (settings.parameters.get("model"),) if isinstance(name, str)}
    rows = read_rows(
        address, columns, settings.columns, delimiter=settings.delimiter, on_bad=lambda _: None
    )
    bodies = (row.values.get("body") for row in rows)
    names = (body.get("model") for body in bodies if isinstance(body, dict))
    return {name for name in names if isinstance(name, str)}


def _further_digests(arguments: GenerationArguments, names: Collection[str]) -> dict[str, Any]:
    """Of what answers depend on besides the checkpoint; only what there is.

    Args:
        names: of adapters below the root, perhaps, which are loaded when they are first asked for.
    """
    found: dict[str, Any] = {}
    addresses: dict[str, str] = {}
    if arguments.adapter_root is not None:
        below = {name: address_below(arguments.adapter_root, name) for name in sorted(names)}
        addresses = {name: address for name, address in below.items() if address is not None}
    adapters: dict[str, str] = {}
    for name, address in {**addresses, **arguments.adapters}.items():
        named = name in arguments.adapters
        if not named and not storage.exists(storage.join(address, ADAPTER_CONFIG)):
            continue  # the base's own name, or nothing's, which the rows' errors say
        with ModelFolder.open(address) as folder:
            adapters[name] = folder.identity
    if adapters:
        found["adapter_digests"] = adapters
    if arguments.chat_template is not None:
        template = read_template(arguments.chat_template)
        found["template_digest"] = hashlib.sha256(template.encode()).hexdigest()
    return found


def _first_row(settings: Settings, address: str, columns: Sequence[str]) -> Row:
    """The first readable row. MissingColumnError for an earlier one that lacks a column."""

    def on_bad(error: DataError) -> None:
        if isinstance(error, MissingColumnError):
            raise error

    return next(
        read_rows(address, columns, settings.columns, delimiter=settings.delimiter, on_bad=on_bad)
    )


def check_custom_ids(plan: Plan) -> None:
    """DataError if two requests have the same id, since their answers could not be told apart."""
    seen: set[str] = set()
    for part in range(len(plan.parts)):
        for chunk in chunks(plan, part):
            for entry in chunk.entries:
                values = entry.values if entry.row is None else entry.row.values
                value = values.get("custom_id")
                if not isinstance(value, str):
                    continue
                if value in seen:
                    name = plan.names.get("custom_id", "custom_id")
                    file = entry.file if entry.row is None else entry.row.source
                    raise DataError(
                        f"{file}, row {entry.number}, column {name!r}: duplicate: {shown(value)}"
                    )
                seen.add(value)


def _workers(settings: Settings) -> tuple[bool, int]:
    """Whether they are on GPUs, and how many. ValueError if the cluster has no room for them."""
    cluster = ray.cluster_resources()
    gpus, cpus = int(cluster.get("GPU", 0)), cluster.get("CPU", 0)
    if settings.device == "gpu" and not gpus:
        raise ValueError("device=gpu, but the cluster has no GPU: leave it out to use CPUs")
    on_gpu = gpus > 0 and settings.device != "cpu"
    workers = settings.workers or (gpus if on_gpu else 1)
    if on_gpu and workers > gpus:
        raise ValueError(f"workers={workers} need as many GPUs, but the cluster has {gpus}")
    # Half a CPU more for the reading task.
    if workers * settings.cpus + 0.5 > cpus:
        raise ValueError(
            f"workers={workers} of cpus={settings.cpus:g} and a reader of 0.5 need "
            f"{workers * settings.cpus + 0.5:g} CPUs, but the cluster has {cpus:g}: lower them"
        )
    return on_gpu, workers


def _records(
    plan: Plan,
    folder: str,
    task: Task,
    settings: Settings,
    on_gpu: bool,
    workers: int,
    claim: Claim,
) -> Iterator[Record]:
    """Records of chunks as they are written, in any order."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # byte: one chunk per block, to spread them over workers
    shared = ray.put(plan)
    parts = ray.data.from_items(
        [{"part": part} for part in range(len(plan.parts))], override_num_blocks=len(plan.parts)
    )
    read = parts.map_batches(partial(_read, plan=shared, folder=folder), batch_size=1, num_cpus=0.5)
    written = read.map_batches(
        Worker,
        fn_constructor_args=(task, shared, folder, claim),
        batch_size=1,
        num_cpus=settings.cpus,
        num_gpus=1 if on_gpu else 0,
        max_task_retries=MAX_RETRIES,
        compute=ray.data.ActorPoolStrategy(
            size=workers, max_concurrent_calls_per_actor=CHUNKS_AT_ONCE
        ),
    )
    started = last = time.monotonic()
    rows = failed = 0
    for row in written.iter_rows():
        record = pickle.loads(row["chunk"])  # pickled by our own tasks
        if isinstance(record, str):
            raise DataError(record)
        rows, failed = rows + record.rows, failed + record.failed
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            logger.info("%d rows, %d errors, %.0f s", rows, failed, last - started)
        yield record


# Data and storage errors are passed on as messages, in place of a chunk or record: Ray Data would
# wrap them in its own traceback, without the error's type.


def _read(batch: dict[str, Any], plan: Any, folder: str) -> Iterator[dict[str, Any]]:
    """A part's chunks, the records of those already answered, or an error message."""
    try:
        found: Plan = ray.get(plan)
        storage.be_patient((found.address, folder))  # the driver has already reached S3
        for part in batch["part"]:
            for chunk in chunks(found, int(part)):
                yield _pickled([Record.find(folder, chunk) or chunk])
    except (ValueError, OSError) as error:
        yield _pickled([str(error)])


class Worker:
    """An actor with the model: chunks in, records of the written answers out.

    Args:
        claim: of the folder's lease; once it is lost, nothing is written.
    """

    def __init__(self, task: Task, plan: Any, folder: str, claim: Claim | None = None) -> None:
        self._answerer: Answerer | str
        self._fenced = ExitStack()  # for as long as this process lives
        try:
            storage.be_patient((task.arguments.checkpoint, folder))
            if claim is not None:
                self._fenced.enter_context(storage.fenced(folder, claim.check))
            service = InProcessService.load(task.service, task.arguments, replica_device())
            self._answerer = Answerer(service, task, ray.get(plan), folder, claim)
        except (ValueError, OSError, RuntimeError, MissingPackageError) as error:
            # RuntimeError: the device lacks something, such as fp8 or memory.
            self._answerer = f"the model cannot be loaded: {error}"
            if isinstance(error, FileNotFoundError) and "://" not in task.arguments.checkpoint:
                self._answerer += "; remedy: s3://…, or a folder that all nodes can reach"

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return _pickled([await self._done(pickle.loads(each)) for each in batch["chunk"]])

    async def _done(self, item: Chunk | Record | str) -> Record | str:
        if not isinstance(item, Chunk):
            return item
        if isinstance(self._answerer, str):
            return self._answerer
        try:
            return await self._answerer.answer(item)
        except (ValueError, OSError, RuntimeError, LeaseLostError) as error:
            return str(error)


class Answerer:
    """Answers chunks with a service, and writes the answers."""

    def __init__(
        self,
        service: InProcessService,
        task: Task,
        plan: Plan,
        folder: str,
        claim: Claim | None = None,
    ) -> None:
        self._claim = claim
        self._service = service
        self._task = task
        self._plan = plan
        self._folder = folder
        # FIFO: a chunk's rows before those of the next.
        self._room = asyncio.Semaphore(AHEAD * service.rows_at_once)

    async def answer(self, chunk: Chunk) -> Record:
        """Raises DataError, StorageError or LeaseLostError.

        Raises RuntimeError if the model has stopped working.
        """
        one = self._request if self._task.is_batch else self._row
        found = await asyncio.gather(
            *(one(chunk, place, entry) for place, entry in enumerate(chunk.entries))
        )
        outputs = [line for is_good, line in found if is_good]
        errors = [line for is_good, line in found if not is_good]
        return await asyncio.to_thread(
            write_chunk, self._plan, self._folder, chunk, outputs, errors, self._claim
        )

    async def _row(self, chunk: Chunk, place: int, entry: Entry) -> tuple[bool, dict[str, Any]]:
        """Whether a row was answered, and its output line."""
        if entry.row is None:
            return False, {**entry.key, "error": {"message": entry.problem}}
        kept = {name: entry.row.values[name] for name in self._task.keep}
        line = {**entry.key, **kept}
        try:
            route, body = request_of(self._task.service, entry.row, self._task.parameters)
            reply = await self._reply(route, body)
            return True, {**line, **fields_of(route, reply)}
        except DataError as error:
            return False, {**line, "error": {"message": str(error)}}
        except APIError as error:
            return False, {**line, **error.body()}

    async def _request(self, chunk: Chunk, place: int, entry: Entry) -> tuple[bool, dict[str, Any]]:
        """As `_row`, for a request of OpenAI's batch file."""
        number = f"{chunk.name}-{place}".replace("-", "_")
        values = entry.values if entry.row is None else entry.row.values
        line = {"id": f"batch_req_{number}", "custom_id": values.get("custom_id")}
        if entry.row is None:
            return False, {**line, "response": None, "error": _no_request(entry.problem)}
        try:
            entry.row.text("custom_id")
            url = entry.row.text("url")
            if (method := entry.row.values.get(METHOD) or "POST") != "POST":
                raise entry.row.error(METHOD, f"must be POST, got {shown(method)}")
        except DataError as error:
            return False, {**line, "response": None, "error": _no_request(str(error))}
        response = {"status_code": 200, "request_id": f"req_{number}"}
        try:
            body = as_json(await self._reply(url, entry.row.value("body")))
        except APIError as error:
            response |= {"status_code": error.status, "body": error.body()}
            return False, {**line, "response": response, "error": None}
        return True, {**line, "response": {**response, "body": body}, "error": None}

    async def _reply(self, route: str, body: Any) -> Any:
        """Raises APIError, and RuntimeError if the model has stopped working."""
        async with self._room:
            deadline = time.monotonic() + UNAVAILABLE_SECONDS
            while True:
                try:
                    return await self._service.answer(route, body)
                except (QueueFullError, OverloadedError):
                    await asyncio.sleep(RETRY_SECONDS)
                except UnavailableError as error:  # no row's fault
                    if not self._service.alive(STALLED_SECONDS):
                        raise RuntimeError(f"the model has stopped working: {error}") from error
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"after {UNAVAILABLE_SECONDS:g} s: {error}") from error
                    await asyncio.sleep(UNAVAILABLE_PAUSE_SECONDS)
                except ModelError as error:
                    if self._service.alive(STALLED_SECONDS):
                        raise
                    # Not the fault of the rows that follow.
                    raise RuntimeError(f"the model has stopped working: {error}") from error


def _no_request(problem: str) -> Mapping[str, str]:
    return {"code": "invalid_request", "message": problem}


def _pickled(values: Sequence[Any]) -> dict[str, Any]:
    return {"chunk": np.array([pickle.dumps(value) for value in values], dtype=object)}


if __name__ == "__main__":
    main()

"""`gptj train`: submit jobs/finetune.py to the cluster for a data file and settings."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import yaml
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from gptj import storage
from gptj.data.labels import LabelSet
from gptj.data.questions import read_answers
from gptj.data.rows import DataError, MissingColumnError, refuse_row
from gptj.data.shards import check_labelled
from gptj.data.sources import find_columns, listed, read_rows
from gptj.serialization.yaml_value import parse_yaml
from gptj.storage.addresses import absolute
from gptj.training.dataset import allowed_labels, checkpoint_labels
from gptj.training.settings import Settings, read_data_options, read_settings
from gptj.training.tasks import TASKS, TaskName
from gptj_cli.cluster import is_here
from gptj_jobs.holding import holding_jobs

# Most columns first: question-answering data may also have a text or label.
BY_COLUMNS: tuple[TaskName, ...] = ("question-answering", "classification", "causal-lm")
RUN_FOLDER = "gptj_run_folder"  # in a job's metadata
FIRST_ROWS = 1000  # to check before a job starts
ENDINGS = re.compile(r"(\.(parquet|jsonl|json|csv|tsv|txt|gz|zst))+$", re.IGNORECASE)


def words_of_run(
    words: Sequence[str],
    *,
    data: str | None,
    evaluation: str | None,
    task: TaskName | None,
    model: str | None,
    run: str | None,
    storage_address: str,
) -> list[str]:
    """`[SETTINGS.yaml] [key=value …]` for jobs/finetune.py, from the words and options.

    Paths become absolute, since a job runs in another folder. If not given, the task is inferred
    from the data's columns and the run's name from the data's.

    Raises:
        SettingsError: for invalid settings.
        DataError, StorageError: if the data cannot be read, or its columns do not fit the task, or
            any task if none is given.
    """
    said = list(words)
    if said and "=" not in said[0]:
        said[0] = absolute(said[0])
    for key, value in (
        ("data.train", data),
        ("data.evaluation", evaluation),
        ("task", task),
        ("model.checkpoint", model),
        ("run", run),
    ):
        if value is not None:
            said.append(_word(key, value))
    given = given_keys(said)
    if "storage" not in given:
        said.append(_word("storage", storage_address))
    if data is not None and "task" not in given:
        said.append(f"task={task_of(data, said)}")
    if data is not None and "run" not in given:
        said.append(f"run={run_of(data)}")
    settings = read_settings(said).resolved()
    # Before a job starts; the cluster checks what only it can read.
    if task is not None and data is not None and Path(data).is_file():
        skip_bad = settings.data.bad_rows == "skip"
        check_columns(data, task, settings.data.columns, settings.data.delimiter, skip_bad)
    for address in (settings.data.train, settings.data.evaluation):
        inferred = data is not None and "task" not in given and address == settings.data.train
        if inferred or (address and Path(address).is_file()):
            check_first_rows(address, settings)
    return _resolved(said, settings)


def given_keys(words: Sequence[str]) -> set[str]:
    """Dotted keys of the settings on a command line and in its file."""
    fields: set[str] = {word.partition("=")[0] for word in words if "=" in word}
    if words and "=" not in words[0]:
        fields |= _file_keys(words[0])
    return fields


def task_of(address: str, words: Sequence[str]) -> TaskName:
    """The task that matches the data's columns, as mapped by `data.columns.…`.

    Raises:
        DataError: listing the columns, if none does.
        SettingsError: like read_data_options.
    """
    options = read_data_options(words)
    columns, delimiter, skip_bad = options.columns, options.delimiter, options.bad_rows == "skip"
    possible = [task for task in BY_COLUMNS if columns.keys() <= set(TASKS[task].columns)]
    if not possible:
        known = sorted({name for task in TASKS.values() for name in task.columns})
        raise DataError(
            f"data.columns: no task has all of {', '.join(sorted(columns))}; there are "
            f"{', '.join(known)}"
        )
    missing: DataError | None = None
    for task in possible:
        try:
            kind = check_columns(address, task, columns, delimiter, skip_bad)
        except DataError as error:
            missing = missing or error
        else:
            if kind == ("text",) and isinstance(missing, MissingColumnError) and missing.there[1:]:
                print(
                    "No label column is given, so this trains a language model; the columns are "
                    f"{', '.join(map(repr, missing.there)):.400}. For a classifier: "
                    "data.columns.label=NAME",
                    file=sys.stderr,
                )
            return task
    assert missing is not None  # each task was tried
    if columns or not isinstance(missing, MissingColumnError):  # a bad option, or a bad file
        raise missing
    tasks = "; ".join(
        f"{task}: {' or '.join(', '.join(kind) for kind in TASKS[task].row_kinds)}"
        for task in reversed(BY_COLUMNS)
    )
    raise DataError(
        f"{address}: no task takes the columns {listed(missing)} ({tasks}); remedy: map them, as "
        "in data.columns.text=NAME data.columns.label=NAME; quote names that have spaces"
    )


def check_columns(
    address: str,
    task: TaskName,
    columns: Mapping[str, str],
    delimiter: str | None,
    skip_bad: bool = False,
) -> tuple[str, ...]:
    """The columns of the data's first row, by our names.

    DataError, which lists them, if they do not fit the task.

    Args:
        skip_bad: look at the first readable row.
    """

    def skip(error: DataError) -> None:
        if isinstance(error, MissingColumnError):
            raise error

    kinds = TASKS[task].row_kinds
    kind = find_columns(address, kinds, columns, delimiter=delimiter, skip_bad=skip_bad)
    on_bad = skip if skip_bad else refuse_row
    next(read_rows(address, kind, columns, delimiter=delimiter, on_bad=on_bad))
    return kind


def check_first_rows(address: str, settings: Settings) -> None:
    """DataError if one of the first rows has a label or answer that the job would refuse.

    SettingsError if the labels' names contradict the checkpoint's.
    """
    data, kinds = settings.data, settings.task_definition.row_kinds
    if data.bad_rows == "skip" or settings.task == "causal-lm":
        return
    is_classifier = settings.task == "classification"
    trained = _trained_labels(settings) if is_classifier else None
    names, problem_type = allowed_labels(settings, trained)
    columns = find_columns(address, kinds, data.columns, delimiter=data.delimiter)
    rows = read_rows(address, columns, data.columns, delimiter=data.delimiter)
    for row in islice(rows, FIRST_ROWS):
        if is_classifier:
            check_labelled(row, names, problem_type)
        else:
            read_answers(row)


def _trained_labels(settings: Settings) -> LabelSet | None:
    """As checkpoint_labels, as far as this machine can read the checkpoint."""
    checkpoint = settings.model.checkpoint
    # A hub id is left to the cluster.
    if checkpoint and (storage.is_s3(checkpoint) or Path(checkpoint).is_dir()):
        with suppress(storage.AccessDeniedError, storage.UnreachableError):  # from here
            return checkpoint_labels(settings)
    return None


def run_of(address: str) -> str:
    """A run's name from its data: reviews for /somewhere/reviews.csv.gz."""
    name = ENDINGS.sub("", address.rstrip("/").rpartition("/")[2])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")
    return name or "finetune"


def submit(address: str, words: Sequence[str], folder: str) -> tuple[JobSubmissionClient, str]:
    """Submit the job; returns the client and the job's id.

    ValueError if another job on the cluster is training the run, however it was started.

    Args:
        folder: the run's.
    """
    client = JobSubmissionClient(address)
    check_not_running(client.list_jobs(), folder, holding_jobs(address, folder))
    # On this machine our own interpreter, regardless of PATH; elsewhere the image's.
    python = sys.executable if is_here(address) else "python"
    entrypoint = shlex.join([python, "-m", "jobs.finetune", *words])
    return client, client.submit_job(entrypoint=entrypoint, metadata={RUN_FOLDER: folder})


def check_not_running(
    jobs: Iterable[JobDetails], folder: str, holding: Collection[str] = ()
) -> None:
    """ValueError, naming the job, if one of them trains the run in `folder`.

    Args:
        holding: Ray's ids of jobs that train it, besides those that `gptj train` submitted.
    """
    for job in jobs:
        same = (job.metadata or {}).get(RUN_FOLDER) == folder or job.job_id in holding
        if not same or job.status.is_terminal():
            continue
        if job.submission_id is not None:
            raise ValueError(
                f"job {job.submission_id} is already training this run, {folder}; remedy: another "
                f"--run NAME, or follow it: ray job logs --follow {job.submission_id}; or stop it: "
                f"ray job stop {job.submission_id}"
            )
        driver = job.driver_info
        where = "" if driver is None else f" {driver.pid} on {driver.node_ip_address}"
        raise ValueError(
            f"the process{where}, job {job.job_id}, is already training this run, {folder}; "
            f"remedy: another --run NAME, or stop that process"
        )


def follow(client: JobSubmissionClient, job: str) -> bool:
    """Print the job's log until it ends; returns whether it succeeded."""
    # At INFO it reports "WebSocket closed".
    logging.getLogger(JobSubmissionClient.__module__).setLevel(logging.WARNING)

    async def lines() -> None:
        async for part in client.tail_job_logs(job):
            print(part, end="", flush=True)

    asyncio.run(lines())
    return bool(client.get_job_status(job) == JobStatus.SUCCEEDED)


def _file_keys(address: str) -> set[str]:
    fields = parse_yaml(storage.read_bytes(address))
    return set(fields) if isinstance(fields, dict) else set()


def _resolved(words: list[str], settings: Settings) -> list[str]:
    """The words, with paths as resolved by the settings."""
    values = {
        "storage": settings.storage,
        "data.train": settings.data.train,
        "data.evaluation": settings.data.evaluation,
        "model.checkpoint": settings.model.checkpoint,
        "tokenizer.address": settings.tokenizer.address,
        "tokenizer.chat_template": settings.tokenizer.chat_template,
        "tracking.mlflow": settings.tracking.mlflow,
    }
    given = [word.partition("=")[0] for word in words]
    kept = [word for word, key in zip(words, given, strict=True) if key not in values]
    return [*kept, *(_word(key, value) for key, value in values.items() if value)]


def _word(key: str, text: str) -> str:
    """`key=text`, quoted if YAML would read it differently (`a #1.csv` ends at the #)."""
    try:
        plain = parse_yaml(text) == text
    except yaml.YAMLError:  # such as *.csv
        plain = False
    return f"{key}={text}" if plain else f"{key}={json.dumps(text, ensure_ascii=False)}"

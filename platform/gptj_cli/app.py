"""The program `gptj`: its commands, their arguments and output.

The commands' work is in other modules, imported on first use so that help is instant.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import errno
import json
import logging
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from gptj.environment.extras import Extra, MissingPackageError, missing

try:
    import typer
except ModuleNotFoundError as error:
    raise missing(error, "the program gptj") from error

if TYPE_CHECKING:
    import yaml
    from rich import console as rich_console
    from rich import live as rich_live

    from gptj import storage as stored
    from gptj.checkpoints import manifest as manifests
    from gptj.serialization import json_object
    from gptj.storage import addresses as spellings
    from gptj.storage import errors as storage_errors
    from gptj.training import progress
    from gptj.training import settings as training_settings
    from gptj_cli import cluster, local, predicting, scores, serving, status_table, training
    from gptj_cli import models as folders
    from gptj_cli import status as watching
    from gptj_jobs import command_line
    from jobs import evaluate as evaluation_job
else:
    NEEDS = "the program gptj"
    yaml = Extra("yaml", NEEDS, "pyyaml")
    rich_console, rich_live = Extra("rich.console", NEEDS), Extra("rich.live", NEEDS)
    stored = Extra("gptj.storage", NEEDS)
    manifests = Extra("gptj.checkpoints.manifest", NEEDS)
    json_object = Extra("gptj.serialization.json_object", NEEDS)
    spellings = Extra("gptj.storage.addresses", NEEDS)
    storage_errors = Extra("gptj.storage.errors", NEEDS)
    progress = Extra("gptj.training.progress", NEEDS)
    training_settings = Extra("gptj.training.settings", NEEDS)
    cluster, local = Extra("gptj_cli.cluster", NEEDS), Extra("gptj_cli.local", NEEDS)
    predicting, scores = Extra("gptj_cli.predicting", NEEDS), Extra("gptj_cli.scores", NEEDS)
    serving, training = Extra("gptj_cli.serving", NEEDS), Extra("gptj_cli.training", NEEDS)
    folders = Extra("gptj_cli.models", NEEDS)
    status_table = Extra("gptj_cli.status_table", NEEDS)
    watching = Extra("gptj_cli.status", NEEDS)
    command_line = Extra("gptj_jobs.command_line", NEEDS)
    evaluation_job = Extra("jobs.evaluate", NEEDS)

FOLDER = Path(".gptj")
OUTPUTS = "outputs"
# For commands that take key=value: an unknown option arrives as one of their words, and is refused
# with that form as the remedy.
WITH_SETTINGS = {"ignore_unknown_options": True}
REFRESH_SECONDS = 2.0  # of `gptj status`

app = typer.Typer(
    help="Fine-tune and serve GPT-J. Each command has --help.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
models = typer.Typer(
    help="Model folders, local or s3://…", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(models, name="models")


class Task(StrEnum):
    CAUSAL_LM = "causal-lm"
    CLASSIFICATION = "classification"
    QUESTION_ANSWERING = "question-answering"


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class DType(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


Folder = Annotated[
    Path, typer.Option("--folder", help="The folder for data, logs and exports of `gptj up`.")
]
Address = Annotated[
    str, typer.Argument(metavar="ADDRESS", help="A model folder, local or s3://…, or a hub id.")
]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="SETTINGS", help="[SETTINGS.yaml] [key=value …]", show_default=False),
]


def main(words: Sequence[str] | None = None) -> None:
    """Run a command; errors that a user can fix print one line, without a traceback."""
    try:
        app(args=words)
    except (ValueError, OSError, RuntimeError, MissingPackageError) as error:
        remedy = _of_this_terminal(error)
        sys.exit(f"error: {str(error).rstrip('.') if remedy else error}{remedy}")
    except Exception as error:
        if (message := _of_ray(error)) is None:
            raise
        sys.exit(f"error: {message}{_of_cluster()}")


def _of_this_terminal(error: Exception) -> str:
    """The remedy if S3's credentials are missing, or no cluster is at the variables' address."""
    if (
        isinstance(error, storage_errors.AccessDeniedError)
        and "AWS_ACCESS_KEY_ID" not in os.environ
    ):
        return _sourcing()
    if isinstance(error, ConnectionError) and str(error).startswith("Failed to connect to Ray"):
        return _of_cluster()
    return ""


def _of_ray(error: Exception) -> str | None:
    """The message of Ray's errors that the terminal's variables cause; None for all others.

    Ray's types are known by name, since importing it takes a second.
    """
    if not type(error).__module__.startswith("ray."):
        return None
    first = str(error.args[0] if error.args else error).partition(". ")[0]
    match type(error).__name__:
        case "AuthenticationError":
            return f"Ray's token is missing or wrong: {first}"
        case "ServerUnavailable":
            return f"the Ray cluster does not answer: {first}"
    return None


def _of_cluster() -> str:
    """The remedy for variables of another cluster, or of one that has ended."""
    exports = FOLDER / local.EXPORTS
    if exports.exists():
        return f"; remedy: source {exports}, after gptj up if that cluster has ended"
    names = [name for name in cluster.VARIABLES if name in os.environ]
    return (
        f"; remedy: correct {', '.join(names)}, RAY_AUTH_MODE and RAY_AUTH_TOKEN in this terminal, "
        f"or start a cluster here with gptj up, and source its exports"
    )


def _sourcing() -> str:
    """The remedy for a terminal without the exports of `gptj up`, if there are any."""
    exports = FOLDER / local.EXPORTS
    return f"; for the storage of gptj up: source {exports}" if exports.exists() else ""


def _refuse_options(
    words: Sequence[str],
    context: typer.Context,
    meant: Callable[[str], list[str]] | None = None,
) -> None:
    """ValueError if a word is an option that the command does not have.

    Args:
        meant: the known settings that a name may stand for.
    """
    for place, word in enumerate(words):
        if not word.startswith("-") or word == "-":
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if not equals:
            following = "".join(words[place + 1 : place + 2])
            value = following if following[:1] not in ("", "-") else "…"
        options = [option for each in context.command.params for option in each.opts]
        if near := difflib.get_close_matches(word, options, n=1, cutoff=0.75):
            raise ValueError(f"no such option: {word}; did you mean {near[0]}?")
        key = name.replace("-", "_")
        settings = (meant(key) if meant is not None else []) or [key]
        raise ValueError(f"no such option: {word}; settings are key=value: {settings[0]}={value}")


def _check_order(context: typer.Context, model: str, data: str) -> None:
    """ValueError if the model is a file, which would be looked for on the hub."""
    if Path(model).is_file():
        raise ValueError(
            f"{model} is a file, but the model comes first; remedy: {context.command_path} {data} "
            f"{model}"
        )


@app.command()
def up(
    folder: Folder = FOLDER,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="Logical CPUs of the Ray node; default: 4 or more.")
    ] = None,
) -> None:
    """Start S3 and Ray on this machine; they run until `gptj down`.

    Both listen on loopback only and ask for credentials, which `FOLDER/env` exports.
    """
    started = local.up(folder, cpus or local.default_cpus())
    found = local.read(folder)
    if found is None:
        raise RuntimeError(f"S3 and Ray ended right after they started; see {folder / local.LOG}")
    exports = folder / local.EXPORTS
    print(exports.read_text() if started else "Already running.")
    print(f"S3         {found['s3']}, files in {folder / 's3'}")
    print(f"Ray        {found['dashboard']} (the dashboard asks for RAY_AUTH_TOKEN)")
    print(f"Logs       {folder / local.LOG}, {folder / 'ray.log'}, {folder / 's3' / 'weed.log'}")
    print(f"Use it     source {exports}      (in each terminal)")
    print("End it     gptj down" + ("" if folder == FOLDER else f" --folder {folder}"))


@app.command()
def down(folder: Folder = FOLDER) -> None:
    """Stop what `gptj up` started, and nothing else. Data are kept."""
    if local.down(folder):
        print(f"Stopped S3 and Ray; data and logs are kept in {folder}.")
    else:
        print(f"Nothing is running for {folder}.")


@app.command(context_settings=WITH_SETTINGS)
def train(
    context: typer.Context,
    words: Words = None,
    data: Annotated[
        str | None,
        typer.Option(help="A file, folder or pattern, local or s3://…; default: the settings'."),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(help="Evaluation data; or hold some out with data.evaluation_split=0.1."),
    ] = None,
    task: Annotated[
        Task | None, typer.Option(help="Default: inferred from the data's columns.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A checkpoint to start from; default: a new, small model.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="The run's name; default: from the data's.")
    ] = None,
    storage: Annotated[
        str,
        typer.Option(envvar="GPTJ_STORAGE", help="A folder or s3://…; results go to STORAGE/RUN."),
    ] = OUTPUTS,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the job's log.")] = False,
    folder: Folder = FOLDER,
) -> None:
    """Fine-tune on the cluster: submits jobs/finetune.py and follows its log.

    \b
    gptj train --data reviews.csv
    gptj train --data reviews.csv --run second epochs=3 optimizer.learning_rate=1e-4
    gptj train jobs/settings/sst2.yaml --data train.jsonl --evaluation dev.jsonl

    Settings are those of jobs/finetune.py, whose --help says where they are listed. Rerunning the
    command resumes from the last checkpoint. Ctrl-C stops following, not the job.
    """
    _refuse_options(words or [], context, training_settings.closest)
    said = training.words_of_run(
        words or [],
        data=data,
        evaluation=evaluation,
        task=task.value if task is not None else None,
        model=model,
        run=run,
        storage_address=storage,
    )
    settings = training_settings.read_settings(said)
    address = cluster.dashboard_address(folder)
    client, job = training.submit(address, said, settings.folder)
    print(f"{settings.task} on {settings.train_data}: run {settings.run}, job {job}", flush=True)
    how = f"Follow it: ray job logs --follow {job}\nStop it:   ray job stop {job}"
    if detach:
        print(f"{how}\nCurves:    gptj curves {settings.folder}")
        return
    try:
        good = training.follow(client, job)
    except KeyboardInterrupt:
        print(f"\nThe job keeps running.\n{how}", flush=True)
        raise typer.Exit(130) from None
    if not good:
        info = client.get_job_info(job)
        sys.exit(f"error: job {job} ended: {str(info.status.value).lower()}")
    print(f"\nPredict:   gptj predict {settings.model_folder} FILE")
    print(f"Serve:     gptj serve {settings.model_folder}")
    print(f"Curves:    gptj curves {settings.folder}")


@app.command(context_settings=WITH_SETTINGS)
def evaluate(
    context: typer.Context,
    address: Address,
    data: Annotated[str, typer.Argument(metavar="DATA", help="As for jobs/evaluate.py.")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="SETTINGS", help="key=value …")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object; the default without a terminal.")
    ] = False,
) -> None:
    """Evaluate a checkpoint on data, on this machine without a cluster: jobs/evaluate.py."""
    _refuse_options([address, data, *(words or [])], context)
    _check_order(context, address, data)
    command_line.log_to_stderr("evaluate")
    result = evaluation_job.measure(evaluation_job.read_settings([address, data, *(words or [])]))
    console = rich_console.Console()
    if as_json or not console.is_terminal:
        print(json.dumps(result, allow_nan=False))
    else:
        console.print(scores.rendered(result))


@app.command()
def serve(
    addresses: Annotated[
        list[str], typer.Argument(metavar="ADDRESS…", help="Model folders or hub ids.")
    ],
    name: Annotated[
        list[str] | None, typer.Option(help="The models' names for clients, one each, in order.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    host: Annotated[
        str, typer.Option(help="0.0.0.0 to serve the network: set GPTJ_API_KEYS before `up`.")
    ] = "127.0.0.1",
    device: Annotated[Device, typer.Option(help="auto: a GPU if the cluster has one.")] = (
        Device.AUTO
    ),
    dtype: Annotated[
        DType,
        typer.Option(help="auto: float16 on a GPU; on a CPU bfloat16 if supported, else float32."),
    ] = DType.AUTO,
    min_replicas: Annotated[int, typer.Option(min=1, help="Minimum for each model.")] = 1,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="For /v1/chat/completions, instead of the model's own: alpaca, dolly, gpt-jt, "
            "pygmalion, or a Jinja file."
        ),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Also serve a model's embeddings, at /v1/embeddings."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--print", help="Print the configuration, for `serve run`, and exit.")
    ] = False,
    folder: Folder = FOLDER,
) -> None:
    """Serve exactly these checkpoints over HTTP; each one's head selects its service.

    Returns once all of them answer. The same command with another checkpoint, or with other files
    at its address, replaces the served one without downtime. `serve shutdown -y` or `gptj down`
    stops it.
    """
    found = serving.services(addresses, name or [], embeddings)
    dashboard = None if show and device != Device.AUTO else cluster.dashboard_address(folder)
    gpus = dashboard is not None and device != Device.CPU and serving.has_gpus(dashboard)
    if device == Device.CUDA and dashboard is not None and not gpus:
        raise ValueError("--device cuda: the cluster has no GPU; leave it out to serve on CPUs")
    options = serving.Options(
        port, host, gpus or device == Device.CUDA, dtype.value, min_replicas, chat_template
    )
    config = serving.configuration(found, options)
    if show:
        print(yaml.safe_dump(config, sort_keys=False), end="")
        return
    assert dashboard is not None
    for service in found:
        print(f"starting {service.kind}: {service.name} from {service.checkpoint}", flush=True)
    gone = serving.deploy(dashboard, config)
    base = f"http://{host if host != '0.0.0.0' else '127.0.0.1'}:{port}"
    for application in config["applications"]:
        serving.wait_until_healthy(f"{base}{application['route_prefix'].rstrip('/')}/health")
    for each in gone:
        print(f"no longer served: {each}")
    for service, application in zip(found, config["applications"], strict=True):
        print(f"\n{serving.curl(base, application, pairs=service.pairs)}")
        for what, page in serving.pages(base, application).items():
            print(f"{what:<11} {page}")
    if unguarded := serving.open_to_all(host, base, config):
        print(
            f"\nwarning: everyone who can reach port {port} of this machine can use "
            f"{', '.join(unguarded)}; remedy: leave out --host {host}, or require keys: gptj down, "
            f"export GPTJ_API_KEYS=…, gptj up",
            file=sys.stderr,
        )


@app.command()
def status(
    once: Annotated[
        bool, typer.Option("--once", help="Print it once, as plain text, and exit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it once, as JSON.")] = False,
    seconds: Annotated[
        float,
        typer.Option(
            min=0,
            help="How long --once and --json measure rates; 0: no rates, and percentiles since "
            "the start. Ray reports every 10 seconds.",
        ),
    ] = 10,
    prometheus: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A Prometheus that scrapes the cluster, if its nodes cannot be reached from here.",
        ),
    ] = None,
    folder: Folder = FOLDER,
) -> None:
    """Show what is served: checkpoints, replicas, requests, tokens per second, latencies.

    The table is refreshed until Ctrl-C.
    """
    dashboard = cluster.dashboard_address(folder)
    watcher = watching.Watcher(dashboard, prometheus)
    found = watcher.read()
    if not found.applications:
        raise ValueError(f"{dashboard} serves nothing; remedy: gptj serve ADDRESS")
    console = rich_console.Console()
    if once or as_json or not console.is_terminal:
        if seconds:
            time.sleep(seconds)
            found = watcher.read()
        if as_json:
            print(json.dumps(asdict(found)))
        else:
            # A pipe has no width, and rich would wrap at 80 characters.
            plain = rich_console.Console(
                color_system=None, width=console.width if console.is_terminal else 200
            )
            plain.print(status_table.rendered(found))
        return
    with (
        rich_live.Live(status_table.rendered(found), console=console, screen=True) as live,
        contextlib.suppress(KeyboardInterrupt),
    ):
        while True:
            time.sleep(REFRESH_SECONDS)
            try:
                found = watcher.read()
            except OSError as error:  # it may come back: the last table stays
                found.problems = [str(error)]
            live.update(status_table.rendered(found))


@app.command(context_settings=WITH_SETTINGS)
def predict(
    context: typer.Context,
    address: Address,
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="Rows: Parquet, JSON, CSV or text; local or s3://…"),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="SETTINGS", help="data.columns.OURS=NAME … or data.delimiter=…"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Output file, replaced at the end; default: standard output."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows computed together.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens (language models).")] = 32,
    temperature: Annotated[float, typer.Option(min=0, help="For language models; 0: greedy.")] = 0,
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = Device.AUTO,
    dtype: Annotated[DType, typer.Option(help="As for gptj serve.")] = DType.AUTO,
) -> None:
    """Run a checkpoint on each row of a file, on this machine without a cluster.

    Classifiers and language models read the column text, question answering reads question and
    context. Results are JSON lines in row order; a row that cannot be answered gets an error there,
    and the exit status is 1.
    """
    _refuse_options([address, file, *(words or [])], context)
    _check_order(context, address, file)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    columns, delimiter = _reading(words or [])
    options = predicting.Options(
        batch_size=batch_size,
        columns=columns,
        delimiter=delimiter,
        max_tokens=max_tokens,
        temperature=temperature,
        device=None if device == Device.AUTO else device.value,
        dtype=dtype.value,
    )

    async def write(target: Any) -> tuple[int, int]:
        rows = failed = 0
        async for result in predicting.predict(address, file, options):
            print(json_object.to_json(result, ensure_ascii=False), file=target, flush=True)
            rows, failed = rows + 1, failed + ("error" in result)
        return rows, failed

    if output is not None:
        predicting.check_output(output, file)
    with _results(output) as target:
        rows, failed = asyncio.run(write(target))
    if failed:
        sys.exit(f"error: {failed} of {rows} rows failed: see error in their lines")


@contextlib.contextmanager
def _results(output: Path | None) -> Iterator[TextIO]:
    """Where results go. A file that is there already stays as it is until all of them are.

    If the block fails, those so far are kept beside it.
    """
    if output is None:
        yield sys.stdout
    elif output.exists() and not output.is_file():  # a pipe or device
        with output.open("w", encoding="utf-8") as target:
            yield target
    else:
        path = output.resolve()  # a link stays
        # A name of its own: it replaces neither another run's results nor an earlier failure's.
        unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        try:
            with unfinished.open("x", encoding="utf-8") as target:
                if path.exists():
                    unfinished.chmod(stat.S_IMODE(path.stat().st_mode))
                yield target
            _put(unfinished, path)
        except BaseException:
            if unfinished.exists() and unfinished.stat().st_size:
                print(f"{unfinished} has the results so far", file=sys.stderr)
            else:
                unfinished.unlink(missing_ok=True)
            raise


def _put(source: Path, path: Path) -> None:
    """Move a file to a path; copy it if the path cannot be replaced.

    As a mounted file, or another user's in a sticky folder.
    """
    try:
        source.replace(path)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EPERM, errno.EACCES):
            raise
        shutil.copyfile(source, path)
        source.unlink()


@app.command()
def curves(
    address: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder: STORAGE/RUN.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="Default: ./curves/RUN.")
    ] = None,
) -> None:
    """Fetch a run's curves, even while it runs: loss.png, history.jsonl, TensorBoard's files."""
    target = folder or Path("curves") / address.rstrip("/").rpartition("/")[2]
    if not (files := stored.list_files(address)):
        raise stored.NotFoundError(f"nothing is at {address}: name a run's folder, STORAGE/RUN")
    names = [file.name for file in files]
    curve, history, tensorboard = progress.CURVE, progress.HISTORY, progress.TENSORBOARD
    wanted = [n for n in names if n in (curve, history) or n.startswith(f"{tensorboard}/")]
    if not wanted:
        raise ValueError(
            f"{address} has no curves yet: they are written with a run's first checkpoint"
        )
    stored.download_folder(address, target, wanted)
    print(f"{target / curve}\n{target / history}\ntensorboard --logdir {target / tensorboard}")


@app.command()
@models.command()
def verify(address: Address) -> None:
    """Read a model folder and check each file against its manifest."""
    address = spellings.normalized(address)
    manifest = manifests.verify(address)
    print(f"{address}: good: {len(manifest.files)} files, {_bytes(manifest.size)}")


@models.command("ls")
def list_models(
    address: Annotated[
        str,
        typer.Argument(metavar="[ADDRESS]", envvar="GPTJ_STORAGE", help="A folder or s3://…"),
    ] = OUTPUTS,
) -> None:
    """List the model folders at and below an address."""
    try:
        found = folders.folders(address)
    except stored.NotFoundError as error:
        unset = address == OUTPUTS and "GPTJ_STORAGE" not in os.environ
        raise ValueError(f"{error}{_sourcing() if unset else ''}") from error
    if not found:
        print(f"no models are at or below {address}")
    for folder in found:
        mark = "" if folder.complete else "  (no manifest: unfinished, or not from this platform)"
        print(f"{_bytes(folder.size):>10}  {folder.address}{mark}")


@models.command("show")
def show_model(
    address: Address,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what a model is and how it was trained."""
    found = folders.describe(address)
    print(json.dumps(found, ensure_ascii=False) if as_json else folders.shown(found))


@models.command("cp")
def copy_model(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A model folder.")],
    destination: Annotated[str, typer.Argument(metavar="DESTINATION", help="A new folder.")],
) -> None:
    """Copy a model folder, local or s3://…, and verify the copy."""
    manifest = folders.copy(source, destination)
    print(f"{manifest.folder}: good: {len(manifest.files)} files, {_bytes(manifest.size)}")


@models.command("rm")
def remove_model(
    address: Annotated[
        str,
        typer.Argument(
            metavar="ADDRESS", help="A model folder, or a run's folder with everything in it."
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a model folder, or a run's folder with its checkpoints."""
    files = folders.removable(address)
    size = _bytes(sum(file.size for file in files))
    if within := folders.models_within(files):
        print(f"{address} contains these models too:", *within, sep="\n  ", flush=True)
    if not yes:
        typer.confirm(f"Delete {address} ({len(files)} files, {size})?", abort=True)
    folders.remove(address)
    print(f"deleted {address}: {len(files)} files, {size}")


def _reading(words: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """Parse `data.columns.OURS=NAME` and `data.delimiter=…`; `data.` may be left out."""
    columns: dict[str, str] = {}
    delimiter = None
    for word in words:
        key, equals, text = word.removeprefix("data.").partition("=")
        if equals and key.startswith("columns."):
            columns[key.removeprefix("columns.")] = text
        elif equals and key == "delimiter":
            delimiter = "\t" if text == "\\t" else text
        else:
            raise ValueError(f"{word!r} is neither data.columns.OURS=NAME nor data.delimiter=…")
    return columns, delimiter


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"

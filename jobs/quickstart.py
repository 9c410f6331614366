"""The whole platform on one machine: train three small models, serve and query each one.

    python -m jobs.quickstart [--keep-serving]

Starts an S3 server and a Ray cluster on loopback, submits `jobs/finetune.py` three times (text
generation, classification, question answering; models of a few hundred thousand parameters, data
that needs no download), serves the three checkpoints from S3 with `serve run`, sends each service
one request and prints the replies. Everything it started ends with it, even on Ctrl-C; logs and
the S3 server's files stay in `.quickstart/`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from gptj import storage
from gptj.checkpoints.manifest import verify
from gptj_local.exports import export_lines, shield, write_exports
from gptj_local.processes import running, tail
from gptj_local.ray import LocalRay
from gptj_local.s3 import LocalS3

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".quickstart"
SERVE_CONFIG = ROOT / "k8s" / "base" / "serve.yaml"
BUCKET = "gptj"

# Two training workers, and later three replicas, mostly wait for each other, so the cluster may
# promise more CPUs than a small machine has.
LOGICAL_CPUS = max(4, os.cpu_count() or 1)
SERVING_SECONDS = 240


@dataclass(frozen=True)
class Demonstration:
    """One head: the settings file that trains it, and a request that shows what it learned."""

    name: str
    settings: str
    route: str
    body: dict[str, Any]

    @property
    def model(self) -> str:
        return f"s3://{BUCKET}/{self.name}/model"


DEMONSTRATIONS = (
    Demonstration(
        "quickstart-generation",
        "jobs/settings/quickstart-generation.yaml",
        "/v1/completions",
        {"prompt": "The function returns", "max_tokens": 24, "temperature": 0},
    ),
    Demonstration(
        "quickstart-classification",
        "jobs/settings/quickstart-classification.yaml",
        "/classification",
        {"inputs": "The scenery is wonderful, and I was moved by the ending ."},
    ),
    Demonstration(
        "quickstart-question-answering",
        "jobs/settings/quickstart-question-answering.yaml",
        "/question-answering",
        {
            "inputs": {
                "question": "When was Karin born?",
                "context": "Karin Frost works as a painter. Karin Frost was born in 1951. "
                "Karin keeps a brown horse at home.",
            }
        },
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, serve and query three small models.")
    parser.add_argument(
        "--keep-serving", action="store_true", help="leave the services up until Ctrl-C"
    )
    arguments = parser.parse_args()
    # A plain `kill` ends the program like Ctrl-C: everything it started is stopped.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        run(keep_serving=arguments.keep_serving)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; everything it started has ended.")


def run(*, keep_serving: bool) -> None:
    """See the module's docstring. Raises RuntimeError with the end of the log if a part fails."""
    started = time.monotonic()
    address = _serving_address()
    shutil.rmtree(FOLDER, ignore_errors=True)
    with ExitStack() as stack:
        _say("starting an S3 server")
        shield(os.environ)
        s3 = stack.enter_context(LocalS3.start(FOLDER / "s3", bucket=BUCKET))
        os.environ.update(s3.environment())
        _say(f"starting a Ray cluster (S3 is at {s3.endpoint})")
        node = stack.enter_context(LocalRay.start(FOLDER, cpus=LOGICAL_CPUS))
        environment = {**os.environ, **node.environment()}
        exports = {**s3.environment(), **node.environment()}
        write_exports(FOLDER / "env", exports)
        for demonstration in DEMONSTRATIONS:
            train(demonstration, environment)
        _say(f"starting the services: serve run {SERVE_CONFIG.relative_to(ROOT)}")
        log = FOLDER / "serve.log"
        command = [_program("serve"), "run", str(SERVE_CONFIG)]
        services = stack.enter_context(running(command, environment=environment, log=log))
        for demonstration in DEMONSTRATIONS:
            _wait_until_healthy(f"{address}{_health(demonstration)}", services, log)
        replies = [ask(address, demonstration) for demonstration in DEMONSTRATIONS]
        for demonstration, reply in zip(DEMONSTRATIONS, replies, strict=True):
            _show(address, demonstration, reply)
        _show_checkpoints()
        print(f"\nDone in {time.monotonic() - started:.0f} s.", flush=True)
        if keep_serving:
            print(f"\n{export_lines(exports)}")
            print(f"Another terminal uses this cluster after: source {FOLDER / 'env'}")
            print(f"Serving at {address} until Ctrl-C.", flush=True)
            services.wait()
            raise RuntimeError(f"the services exited; the end of {log}:\n{tail(log)}")


def train(demonstration: Demonstration, environment: dict[str, str]) -> None:
    """Run `ray job submit jobs/finetune.py` and print its log."""
    command = [
        _program("ray"),
        "job",
        "submit",
        "--",
        "jobs/finetune.py",
        demonstration.settings,
        f"run={demonstration.name}",
        f"storage=s3://{BUCKET}",
    ]
    _say(f"training: {' '.join(['ray', *command[1:]])}")
    # A session of its own: on Ctrl-C the cluster ends the job, and we end the cluster.
    job = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = job.wait()
    finally:
        job.kill()
    if status != 0:
        raise RuntimeError(f"the job {demonstration.name} failed; its log is above")


def ask(address: str, demonstration: Demonstration) -> Any:
    """One POST; the reply's JSON."""
    request = urllib.request.Request(
        address + demonstration.route,
        data=json.dumps(demonstration.body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def _serving_address() -> str:
    """Where serve.yaml listens; RuntimeError if the port is taken."""
    options = yaml.safe_load(SERVE_CONFIG.read_text())["http_options"]
    with socket.socket() as probe:
        # As the server does: a port with only lingering (TIME_WAIT) connections counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options["host"], options["port"]))
        except OSError as error:
            raise RuntimeError(
                f"port {options['port']} on {options['host']} is not free ({error.strerror}); "
                f"stop the program that listens there, or change http_options in {SERVE_CONFIG}"
            ) from error
    return f"http://{options['host']}:{options['port']}"


def _health(demonstration: Demonstration) -> str:
    """The health URL: generation's is at the root, the others' at their route."""
    return "/health" if demonstration.route.startswith("/v1/") else f"{demonstration.route}/health"


def _wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SERVING_SECONDS
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            if process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            raise RuntimeError(
                f"{address} does not answer ({error}); the end of {log}:\n{tail(log)}"
            ) from error


def _show(address: str, demonstration: Demonstration, reply: Any) -> None:
    body = json.dumps(demonstration.body, ensure_ascii=False)
    print(f"\ncurl {address}{demonstration.route} -H 'Content-Type: application/json' -d '{body}'")
    print(json.dumps(reply, ensure_ascii=False, indent=2), flush=True)


def _show_checkpoints() -> None:
    print("\nThe checkpoints, each verified against its manifest:")
    for demonstration in DEMONSTRATIONS:
        verify(demonstration.model)
        files = storage.list_files(demonstration.model)
        size = sum(file.size for file in files)
        print(f"  {demonstration.model}  ({len(files)} files, {size / 1e6:.1f} MB)", flush=True)


def _program(name: str) -> str:
    """A program of our environment, regardless of PATH."""
    return str(Path(sys.executable).parent / name)


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # Only once: a second signal must not interrupt the clean-up.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()

"""A new user's first hour: the README's path from a CSV file to a service, command by command."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import readme
from serving_models import make_models

from gptj.data import samples
from gptj_local.processes import descendants, free_ports

pytestmark = pytest.mark.slow

ENVIRONMENT = Path(sys.executable).parents[1]
# A new terminal's variables: nothing of another cluster.
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "GPTJ_"))}


class Terminal:
    """Runs commands as one shell session would, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sourced: list[str] = []

    def run(self, command: str, status: int = 0) -> str:
        """What it prints, both streams together."""
        if command.startswith("source "):
            self.sourced.append(command)
        script = "\n".join([*self.sourced, command])
        result = subprocess.run(
            ["bash", "-e", "-c", script],
            cwd=self.folder,
            env=CLEAN,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert result.returncode == status, f"$ {command}\n{result.stdout[-6000:]}"
        return result.stdout

    def start(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-e", "-c", "\n".join([*self.sourced, f"exec {command}"])],
            cwd=self.folder,
            env=CLEAN,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """One in a folder as a clone is after `make environment`, with somebody's data in it."""
    (tmp_path / ".venv").symlink_to(ENVIRONMENT)
    train, held_out = list(samples.reviews(False)), list(samples.reviews(True))
    for name, rows in (
        ("reviews", train[:1000]),
        ("held_out", held_out[:50]),
        ("more", train[:160]),
    ):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file, delimiter=";")
            writer.writerow(["text", "label"])
            writer.writerows([row["text"], row["label"]] for row in rows)
    terminal = Terminal(tmp_path)
    try:
        yield terminal
    finally:
        if terminal.sourced:
            subprocess.run([ENVIRONMENT / "bin" / "gptj", "down"], cwd=tmp_path, timeout=200)


def training_workers(folder: Path) -> list[psutil.Process]:
    """The processes that train, on the cluster that `gptj up` started in a folder."""
    ray = json.loads((folder / ".gptj/up.json").read_text())["parts"]["Ray"]
    found = descendants(ray["number"], "RayTrainWorker")
    assert found
    return found


def listening(folder: Path) -> set[str]:
    """Addresses on which what `gptj up` started in a folder takes connections.

    Without those of replicas, for whose calls of each other Ray has no setting; they ask for the
    token.
    """
    found: set[str] = set()
    for part in json.loads((folder / ".gptj/up.json").read_text())["parts"].values():
        process = psutil.Process(part["number"])
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                found |= {
                    connection.laddr.ip.removeprefix("::ffff:")
                    for connection in each.net_connections("tcp")
                    if connection.status == psutil.CONN_LISTEN
                    and "ServeReplica" not in "".join(each.cmdline())
                }
    return found


@pytest.mark.timeout(1200)  # four trainings, and some twenty programs that start
def test_the_readmes_path_leads_from_a_file_to_a_service_and_its_update(
    terminal: Terminal, tmp_path: Path
) -> None:
    """Each command is the README's own; one that is new there has to be played here too.

    Those of an adapter, in jobs/README.md, continue it.
    """
    (port,) = free_ports(1)
    path = iter(readme.commands("Your own data"))
    adapter = iter(readme.commands("LoRA", "jobs/README.md"))

    def next_command(begins: str, path: Iterator[str] = path) -> str:
        command = next(path)
        assert command.startswith(begins), f"the page goes on with {command}"
        if begins == "gptj serve":
            command += f" --port {port}"
        return command.replace(":8000", f":{port}")

    terminal.run(next_command("source .venv/bin/activate"))
    assert "export RAY_AUTH_TOKEN=" in terminal.run(next_command("gptj up"))
    terminal.run(next_command("source .gptj/env"))

    printed = terminal.run(next_command("gptj train --data reviews.csv"))
    job = re.search(r"classification on .*reviews.csv: run reviews, job (\S+)", printed)
    assert job is not None, printed
    followed = terminal.start(next_command("ray job logs --follow").replace("JOB", job[1]))
    assert followed.stdout is not None
    log = []
    for line in followed.stdout:
        log.append(line)
        if "saved s3://gptj/reviews/checkpoint-" in line:
            break
    assert "checkpoint-00000050" in log[-1], "".join(log)[-4000:]
    # A person is slow, and the training of a test is short: it is held until it is stopped.
    workers = training_workers(tmp_path)
    for worker in workers:
        worker.suspend()
    again = terminal.run("gptj train --data reviews.csv", status=1)
    assert f"job {job[1]} is already training this run, s3://gptj/reviews; remedy: " in again
    # Of Ray Train's clean-up, which looked for a cluster; a slow machine may show others.
    assert "PlacementGroupCleanerMonitor" not in "".join(log)
    assert re.search(r"GPTJForSequenceClassification of [\d,]{7} parameters", "".join(log))
    terminal.run(next_command("gptj curves"))
    assert (tmp_path / "curves/reviews/loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "curves/reviews/tensorboard").iterdir())
    stopping = terminal.start(next_command("ray job stop").replace("JOB", job[1]))
    for line in followed.stdout:
        if "SIGTERM: the training ends after this step" in line:
            break
    for worker in workers:
        worker.resume()
    stopped = followed.communicate(timeout=100)[0]  # until Ray would kill it
    assert re.search(r"checkpoint-\d+ is saved, and the same command resumes", stopped), stopped
    assert "was stopped" in stopping.communicate(timeout=60)[0]
    printed = terminal.run(next_command("gptj train --data reviews.csv"))
    assert "resuming after step" in printed
    assert "gptj serve s3://gptj/reviews/model" in printed

    found = json.loads(terminal.run(next_command("gptj evaluate")).splitlines()[-1])
    assert found["accuracy"] > 0.8 and found["confusion_matrix"]
    assert found["classes"]["positive"].keys() == {"precision", "recall", "f1", "support"}
    lines = terminal.run(next_command("gptj predict")).splitlines()
    assert len([line for line in lines if '"labels"' in line]) == 50
    served = terminal.run(next_command("gptj serve"))
    assert f"curl http://127.0.0.1:{port}/classification" in served
    ask = next_command("curl").replace("curl", "curl -s")
    ((best, _),) = json.loads(terminal.run(ask))
    assert best["label"] in ("positive", "negative")

    terminal.run(next_command("gptj train --data more.csv"))
    updated = terminal.run(next_command("gptj serve"))
    assert "more from s3://gptj/more/model" in updated
    assert len(json.loads(terminal.run(ask))) == 1
    listed = terminal.run(next_command("gptj models ls"))
    assert "s3://gptj/reviews/model" in listed and "s3://gptj/more/model" in listed

    adapted = terminal.run(next_command("gptj train --data more.csv", adapter))
    assert "gptj serve s3://gptj/lora/model" in adapted
    served = terminal.run(next_command("gptj serve", adapter))
    assert "lora from s3://gptj/lora/model" in served
    assert len(json.loads(terminal.run(ask))) == 1
    assert next(adapter, None) is None

    assert listening(tmp_path) == {"127.0.0.1"}
    processes = json.loads((tmp_path / ".gptj/up.json").read_text())["parts"]
    terminal.run(next_command("gptj down"))
    for process in processes.values():
        deadline = time.monotonic() + 10
        while Path(f"/proc/{process['number']}").exists():
            assert time.monotonic() < deadline, f"{process} has not ended"
            time.sleep(0.1)
    assert next(path, None) is None


def served(terminal: Terminal) -> Any:
    """How the cluster describes the only application, and its replicas' ids."""
    details = json.loads(
        terminal.run(
            'curl -s -H "Authorization: Bearer $RAY_AUTH_TOKEN" '
            "$RAY_API_SERVER_ADDRESS/api/serve/applications/"
        )
    )
    (application,) = details["applications"].values()
    (deployment,) = application["deployments"].values()
    return application, {each["replica_id"] for each in deployment["replicas"]}


@pytest.mark.timeout(600)
def test_serve_starts_what_failed_or_changed_and_nothing_else(
    terminal: Terminal, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    models = make_models()
    model, weights = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    models.classification.save_pretrained(model, tokenizer=models.tokenizer)
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    terminal.run("source .venv/bin/activate")
    terminal.run("gptj up")
    terminal.run("source .gptj/env")
    command = f"gptj serve {model} --port {port}"
    failed = terminal.run(command, status=1)
    assert re.search(r"error: classification: .*model.safetensors was altered", failed), failed

    weights.write_bytes(good)
    assert "curl http" in terminal.run(command)
    application, replicas = served(terminal)
    assert application["status"] == "RUNNING" and len(replicas) == 1
    terminal.run(command)
    assert served(terminal)[1] == replicas

    ask = f'curl -s http://127.0.0.1:{port}/classification -d \'{{"inputs": "A fine film"}}\' '
    ask += "-H 'Content-Type: application/json'"
    before = terminal.run(ask)
    for parameter in models.classification.score.parameters():
        parameter.data.neg_()
    shutil.rmtree(model)
    models.classification.save_pretrained(model, tokenizer=models.tokenizer)
    terminal.run(command)
    assert not served(terminal)[1] & replicas
    assert terminal.run(ask) != before

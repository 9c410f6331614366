"""jobs/batch_inference.py with Ray Data on a real cluster: one answer a row, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from serving_models import Models

from gptj import storage
from gptj.checkpoints.manifest import verify
from gptj.data.answers import lease_of
from gptj_local.processes import running, tail
from gptj_local.ray import LocalRay
from gptj_local.s3 import LocalS3

pytest_plugins = ["serving_fixtures"]
pytestmark = pytest.mark.slow

PROGRAM = str(Path(__file__).resolve().parents[2] / "jobs" / "batch_inference.py")
MODEL, DATA = "s3://gptj/batch-model/model", "s3://gptj/batch-rows"
ROWS = 90


@pytest.fixture(scope="module")
def cluster(
    s3_server: LocalS3, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    environment = {**os.environ, **s3_server.environment()}
    folder = tmp_path_factory.mktemp("ray")
    with LocalRay.start(folder, cpus=4, environment=environment) as node:
        yield {**environment, **node.environment()}


def command(output: str, *words: str, model: str = MODEL, data: str = DATA) -> list[str]:
    fixed = ["parameters.temperature=0", "parameters.ignore_eos=true", "chunk_rows=5", "keep=n"]
    return [sys.executable, PROGRAM, model, data, output, *fixed, "args.dtype=float32", *words]


def records(output: str) -> int:
    files = storage.list_files(f"{output}/unfinished")
    return sum(file.name != "plan.json" and "/" not in file.name for file in files)


def wait_for_records(output: str, count: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while records(output) < count:
        assert process.poll() is None, tail(log)
        assert time.monotonic() < deadline, tail(log)
        time.sleep(0.02)


def kill_workers_of(cluster: dict[str, str]) -> int:
    """SIGKILL the actors with the model; how many there were."""
    killed = 0
    for process in psutil.process_iter(["cmdline", "environ"]):
        title = " ".join(process.info["cmdline"] or ())
        ours = (process.info["environ"] or {}).get("AWS_ENDPOINT_URL")
        if "MapWorker" in title and ours == cluster["AWS_ENDPOINT_URL"]:
            process.send_signal(signal.SIGKILL)
            killed += 1
    return killed


def test_each_row_has_one_answer_despite_killed_processes(
    cluster: dict[str, str], s3: LocalS3, models: Models, tmp_path: Path
) -> None:
    models.with_unused_ids().save_pretrained(MODEL, tokenizer=models.tokenizer)
    for number in range(2):
        rows = [{"text": f"Anna {n}" if n % 30 else 7, "n": n} for n in range(number, ROWS, 2)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        storage.write_bytes(f"{DATA}/{number}.jsonl", lines.encode())

    output, log = "s3://gptj/batch-output", tmp_path / "log"
    slow = "parameters.max_tokens=200"
    with running(command(output, slow), environment=cluster, log=log) as process:
        wait_for_records(output, 2, process, log)
        process.kill()
    assert not storage.exists(f"{output}/manifest.json")
    before = {
        file.name: storage.read_bytes(file.address)
        for file in storage.list_files(output)
        if file.name.startswith("output-")
    }
    assert before

    with lease_of(output):  # as by a job on another cluster
        other = command(output, slow)
        refused = subprocess.run(other, env=cluster, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith(
        f"error: another job is writing its answers to {output}: process {os.getpid()} on "
    )

    log = tmp_path / "log-2"
    with running(command(output, slow, "workers=2"), environment=cluster, log=log) as process:
        wait_for_records(output, records(output) + 1, process, log)
        assert kill_workers_of(cluster)
        assert process.wait(600) == 0, tail(log)
    assert f"{ROWS} rows: {ROWS - 3} answers, 3 errors" in log.read_text()
    verify(output)
    for name, content in before.items():
        assert storage.read_bytes(f"{output}/{name}") == content
    found: dict[str, list[dict[str, object]]] = {"output": [], "errors": []}
    for file in storage.list_files(output):
        kind = file.name.partition("-")[0]
        if kind in found:
            content = storage.read_bytes(file.address).decode()
            found[kind] += [json.loads(line) for line in content.splitlines()]
    keys = [(line["file"], line["row"]) for line in found["output"]]
    assert keys == sorted(keys)
    assert sorted(line["n"] for line in found["output"] + found["errors"]) == [*range(ROWS)]
    assert sorted(line["n"] for line in found["errors"]) == [0, 30, 60]
    for line in found["output"]:
        assert line["completion"] and line["finish_reason"] == "length"


def test_a_model_that_workers_cannot_load_ends_the_job_in_one_line(
    cluster: dict[str, str], s3: LocalS3, models: Models
) -> None:
    folder = "s3://gptj/batch-unloadable"
    model, data = f"{folder}/model", f"{folder}/rows"
    models.with_unused_ids().save_pretrained(model, tokenizer=models.tokenizer)
    storage.write_bytes(f"{data}/0.jsonl", b'{"text": "Anna", "n": 0}\n')
    settings = ("device=cpu", "args.quantization=fp8")
    words = command(f"{folder}/output", *settings, model=model, data=data)
    done = subprocess.run(words, env=cluster, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    everything = done.stdout + done.stderr
    assert "Traceback" not in everything
    assert everything.splitlines()[-1] == (
        "error: the model cannot be loaded: quantization=fp8 is not available: fp8 needs a GPU, "
        "but the model is on cpu; remedy: quantization=int8"
    )


@pytest.mark.parametrize("fails", ["constructor", "task"])
def test_an_error_in_an_actor_is_reported_by_its_last_line(
    cluster: dict[str, str], fails: str
) -> None:
    program = f"""
import ray
from gptj_jobs.ray_errors import reason

@ray.remote(num_cpus=0)
class Actor:
    def __init__(self):
        if {fails!r} == "constructor":
            raise TypeError("of the constructor")

    def work(self):
        raise TypeError("of the task")

ray.init(logging_level="ERROR", log_to_driver=False)
try:
    ray.get(Actor.remote().work.remote())
except ray.exceptions.RayError as error:
    print(reason(error))
"""
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, env=cluster, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == [f"TypeError: of the {fails}"], done.stderr

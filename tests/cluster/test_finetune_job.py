"""jobs/finetune.py as users run it: `ray job submit` to a real cluster, results in a real S3."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import k8s_metrics
import psutil
import pytest
import torch

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer, storage
from gptj.checkpoints.manifest import verify
from gptj.training.progress import HISTORY
from gptj.training.state import latest_checkpoint
from gptj_local.processes import HOST, running, tail
from gptj_local.ray import LocalRay
from gptj_local.s3 import LocalS3

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).parent / "ray")
TINY = [
    "model.config.n_embd=64",
    "tokenizer.vocab_size=512",
    "data.sequence_length=64",
    "workers.count=2",
]


@pytest.fixture(scope="module")
def node(s3_server: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRay]:
    """A cluster of four logical CPUs, whose workers know the S3 server."""
    environment = {
        **os.environ,
        **s3_server.environment(),
        "RAY_metrics_report_interval_ms": "1000",
    }
    folder = tmp_path_factory.mktemp("ray")
    with LocalRay.start(folder, cpus=4, environment=environment) as node:
        yield node


@pytest.fixture
def cluster(node: LocalRay, s3: LocalS3) -> dict[str, str]:
    """The environment of programs that use the cluster and the S3 server."""
    return {**os.environ, **node.environment()}


def job(cluster: dict[str, str], *words: str) -> subprocess.Popen[str]:
    """`ray job submit` of the job with settings."""
    command = [RAY, "job", "submit", "--", str(ROOT / "jobs" / "finetune.py"), *words]
    return subprocess.Popen(
        command, env=cluster, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def direct(cluster: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """The program itself: seconds less than a job."""
    command = [sys.executable, str(ROOT / "jobs" / "finetune.py"), *words]
    return subprocess.run(command, env=cluster, cwd=ROOT, capture_output=True, text=True)


def losses(run: str) -> dict[int, float]:
    lines = storage.read_bytes(f"s3://gptj/{run}/{HISTORY}").decode().splitlines()
    return {p["step"]: p["loss"] for p in map(json.loads, lines) if "loss" in p}


def kill_a_worker(node: LocalRay) -> None:
    """SIGKILL, to one process of a training that has begun on this cluster."""
    workers = [
        process
        for process in psutil.Process(node.process_id).children(recursive=True)
        if "RayTrainWorker" in process.name() or "RayTrainWorker" in "".join(process.cmdline())
    ]
    assert len(workers) == 2, "the training's workers are not there"
    workers[-1].kill()


def test_a_killed_workers_run_goes_on_and_ends_like_an_undisturbed_one(
    cluster: dict[str, str], node: LocalRay
) -> None:
    """The logged losses after the resume point are equal to 1e-6; so nothing is lost or repeated.

    Dropout is on: the random state has to come back too.
    """
    words = [
        *TINY,
        "steps=24",
        "log_every=1",
        "checkpoint_every=4",
        "model.config.resid_pdrop=0.1",
        "storage=s3://gptj",
    ]
    undisturbed = job(cluster, "run=undisturbed", *words)
    output, _ = undisturbed.communicate(timeout=240)
    assert undisturbed.returncode == 0, output[-4000:]
    assert re.search(r"step 24 of 24  loss \d\.\d{4}.* tokens/s .* left", output)

    disturbed = job(cluster, "run=killed", *words)
    deadline = time.monotonic() + 120
    while latest_checkpoint("s3://gptj/killed") is None:
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)
    kill_a_worker(node)
    output, _ = disturbed.communicate(timeout=240)
    assert disturbed.returncode == 0, output[-4000:]
    resumed = re.search(r"resuming after step (\d+) of 24", output)
    assert resumed is not None and 4 <= int(resumed[1]) < 24, output[-4000:]
    expected = losses("undisturbed")
    assert sorted(expected) == list(range(1, 25))
    assert losses("killed") == pytest.approx(expected, abs=1e-6)

    for run in ("undisturbed", "killed"):
        verify(f"s3://gptj/{run}/model")
    model = GPTJForCausalLM.from_pretrained("s3://gptj/killed/model")
    assert model.config.n_embd == 64
    kept = {f.name.split("/")[0] for f in storage.list_files("s3://gptj/killed")}
    assert {"checkpoint-00000024", "checkpoint-00000020", "model", "loss.png"} <= kept
    assert "checkpoint-00000004" not in kept  # keep_checkpoints=2

    # The same command once more has nothing to do.
    again = direct(cluster, "run=killed", *words)
    assert again.returncode == 0
    assert "complete already: s3://gptj/killed/model" in again.stdout


def test_a_killed_jobs_run_resumes_when_it_is_submitted_again(cluster: dict[str, str]) -> None:
    """Though its oldest checkpoints, which Ray has on its list, are deleted by then.

    As long as it lives, it cannot be submitted again.
    """
    words = ["run=again", "storage=s3://gptj", "steps=200", "checkpoint_every=2", *TINY]
    command = [sys.executable, str(ROOT / "jobs" / "finetune.py"), *words]
    first = subprocess.Popen(
        command, env=cluster, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while (latest_checkpoint("s3://gptj/again") or "") < "s3://gptj/again/checkpoint-00000008":
        assert time.monotonic() < deadline and first.poll() is None, "no checkpoints appeared"
        time.sleep(0.05)
    refused = direct(cluster, *words)
    assert refused.returncode == 1
    assert f"'again' is being trained already: process {first.pid} on " in refused.stderr
    assert first.poll() is None, "the first one ended before the second was refused"
    first.kill()
    first.wait()
    done = direct(cluster, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming after step" in done.stdout + done.stderr
    assert sorted(losses("again")) == list(range(10, 201, 10))


@pytest.mark.parametrize(
    ("task", "metric"), [("classification", "accuracy"), ("question-answering", "exact_match")]
)
def test_the_other_heads_train_on_data_of_ours(
    task: str, metric: str, cluster: dict[str, str]
) -> None:
    words = [f"task={task}", f"run={task}", "storage=s3://gptj", "steps=4", *TINY]
    process = job(cluster, *words, "deepspeed.stage=3")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-4000:]
    assert re.search(rf"evaluation after step 4: .*{metric} \d", output)
    training = json.loads(storage.read_bytes(f"s3://gptj/{task}/model/training.json"))
    assert metric in training["metrics"]
    verify(f"s3://gptj/{task}/model")


def test_a_training_that_diverges_ends_with_one_clear_error(cluster: dict[str, str]) -> None:
    """Another try would end alike: the workers are not started again."""
    words = ["run=diverging", "storage=s3://gptj", "steps=20", *TINY]
    done = direct(cluster, *words, "model.config.initializer_range=1e30")
    assert done.returncode == 1
    assert re.search(
        r"^error: the training diverged: the training loss is (nan|inf) at step 1\. Start another "
        r"run= with .*\. There is no checkpoint yet$",
        done.stderr,
        re.MULTILINE,
    ), done.stderr
    # Said once, by the driver, whatever the number of workers.
    assert (done.stdout + done.stderr).count("the training diverged") == 1
    assert done.stdout.count("training examples") == 1
    # Ray's own cleaner, killed at the end, sometimes shows one.
    ours = [line for line in done.stderr.splitlines() if "(PlacementGroupCleaner " not in line]
    assert "Traceback" not in "\n".join(ours)


def test_what_one_worker_alone_meets_ends_the_run_at_once(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    """Worker 0 alone reads the weights, which are damaged; worker 1 waits for it in a collective.

    Four tries are allowed, and none of them would end otherwise.
    """
    torch.manual_seed(0)
    tokenizer = GPTJTokenizer.train(["some text to learn from"], 300)
    config = GPTJConfig(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, rotary_dim=4, n_positions=64
    )
    GPTJForCausalLM(config).save_pretrained(str(tmp_path / "m"), tokenizer=tokenizer)
    content = bytearray((tmp_path / "m" / "model.safetensors").read_bytes())
    content[-50] ^= 1
    (tmp_path / "m" / "model.safetensors").write_bytes(content)
    words = [f"model.checkpoint={tmp_path}/m", "data.sequence_length=64", "workers.count=2"]
    done = direct(cluster, "run=damaged", "storage=s3://gptj", "steps=2", *words)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert re.search(r"^error: \S+model\.safetensors was altered", done.stderr, re.MULTILINE), said
    assert said.count("was altered after it was written") == 1
    assert "failed 4 times" not in said
    assert said.count("training examples") == 1


def test_prometheus_reads_how_trainings_go(
    cluster: dict[str, str], node: LocalRay, tmp_path: Path
) -> None:
    """All that the dashboard and the alerts name, from a training that goes on and one that fails.

    The failed one's count stays after its end.
    """
    seen: dict[str, set[str]] = {}

    def look() -> dict[str, set[str]]:
        try:
            text = httpx.get(f"http://{HOST}:{node.metrics_port}/metrics", timeout=30).text
        except httpx.ConnectError:  # Ray's reporter comes up after the rest of the node
            return seen
        for name, labels in k8s_metrics.exported(text).items():
            seen.setdefault(name, set()).update(labels)
        return seen

    words = ["storage=s3://gptj", "log_every=5", *TINY]
    command = [sys.executable, str(ROOT / "jobs" / "finetune.py"), *words]
    going = [*command, "run=watched", "steps=200", "evaluate_every=50"]
    with running(going, environment=cluster, log=tmp_path / "watched.log") as process:
        while process.poll() is None:
            look()
            time.sleep(0.5)
    assert process.returncode == 0, tail(tmp_path / "watched.log")
    failed = direct(cluster, *words, "run=failing", "model.config.initializer_range=1e30")
    assert failed.returncode == 1
    named = [
        *k8s_metrics.panels("training"),
        *(each for each in k8s_metrics.rules() if "Training" in each.place),
    ]
    assert len(named) > 8
    deadline = time.monotonic() + 15
    while faults := k8s_metrics.missing(look(), named):
        assert time.monotonic() < deadline, faults
        time.sleep(0.5)


def test_what_is_wrong_is_said_before_training(cluster: dict[str, str], tmp_path: Path) -> None:
    """Each in seconds, in one line without a traceback, and with exit status 1."""
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "no text"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    store = "storage=s3://gptj/errors"
    cases = {
        "there is no such setting": [store, "lerning_rate=1"],
        "no bucket": ["storage=s3://not-there"],
        "workers.count=9 .* needs 9 CPUs, the cluster has 4": [
            store,
            "workers.count=9",
            "batch_size=9",
            "micro_batch_size=1",
        ],
        "workers.count=2 needs as many GPUs": [store, "workers.count=2", "workers.device=gpu"],
        "fp16 needs GPUs": [store, "deepspeed.precision=fp16"],
        "offload_.* CPU workers": [store, "deepspeed.offload_optimizer=true"],
        r"bad\.jsonl.*2.*text": [store, f"data.train={tmp_path}/bad.jsonl"],
        r"broken\.jsonl.*2": [store, f"data.train={tmp_path}/broken.jsonl"],
        r"missing\.jsonl": [store, f"data.train={tmp_path}/missing.jsonl"],
        "data.sequence_length=4096 is beyond .*n_positions=256": [
            store,
            "run=long",
            "data.sequence_length=4096",
        ],
        "no-model": [store, f"model.checkpoint={tmp_path}/no-model"],
    }

    def check(case: tuple[str, list[str]]) -> str:
        message, words = case
        done = direct(cluster, *words)
        assert done.returncode == 1, (words, done.stdout, done.stderr)
        assert re.search(f"error: (.|\n)*{message}", done.stderr), (words, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        return message

    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(check, cases.items()))) == len(cases)
    assert latest_checkpoint("s3://gptj/errors/finetune") is None

"""jobs/finetune.py as users run it: `ray job submit` to a real cluster, results in a real S3."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import k8s_metrics
import pytest
import torch
from faulty_s3 import Fault, FaultyS3, Reply, Request
from jobs_in_turn import run_in_turn

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer, storage
from gptj.checkpoints.manifest import verify
from gptj.training.progress import HISTORY
from gptj.training.state import checkpoint_step, latest_checkpoint
from gptj_bench.training_cluster import RESUMED
from gptj_local.processes import HOST, descendants, running, tail
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
def proxy(s3_server: LocalS3) -> Iterator[FaultyS3]:
    """What the cluster's workers take for the S3 server."""
    with FaultyS3.before(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def node(
    s3_server: LocalS3, proxy: FaultyS3, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalRay]:
    """A cluster of four logical CPUs, whose workers know the proxy."""
    environment = {
        **os.environ,
        **s3_server.environment(),
        "AWS_ENDPOINT_URL": proxy.endpoint,
        "RAY_metrics_report_interval_ms": "1000",
    }
    folder = tmp_path_factory.mktemp("ray")
    with LocalRay.start(folder, cpus=4, environment=environment) as node:
        yield node


@pytest.fixture
def cluster(node: LocalRay, s3: LocalS3) -> dict[str, str]:
    """The environment of programs that use the cluster and the S3 server."""
    return {**os.environ, **node.environment()}


def direct(cluster: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """The program itself: seconds less than a job."""
    command = [sys.executable, str(ROOT / "jobs" / "finetune.py"), *words]
    return subprocess.run(command, env=cluster, cwd=ROOT, capture_output=True, text=True)


def losses(run: str) -> dict[int, float]:
    lines = storage.read_bytes(f"s3://gptj/{run}/{HISTORY}").decode().splitlines()
    return {p["step"]: p["loss"] for p in map(json.loads, lines) if "loss" in p}


def kill_a_worker(node: LocalRay) -> None:
    """SIGKILL, to one process of a training that has begun on this cluster."""
    workers = descendants(node.process_id, "RayTrainWorker")
    assert len(workers) == 2, "the training's workers are not there"
    workers[-1].kill()


class Exported:
    """What Prometheus reads on the cluster's port while tests run: names, and their labels."""

    def __init__(self, node: LocalRay) -> None:
        self.seen: dict[str, set[str]] = {}
        self._url = f"http://{HOST}:{node.metrics_port}/metrics"

    def scrape(self) -> dict[str, set[str]]:
        with contextlib.suppress(httpx.TransportError):  # Ray's reporter comes up last
            text = httpx.get(self._url, timeout=60).text
            for name, labels in k8s_metrics.exported(text).items():
                self.seen.setdefault(name, set()).update(labels)
        return self.seen


@pytest.fixture(scope="module")
def exported(node: LocalRay) -> Exported:
    return Exported(node)


MAIN = [
    *TINY,
    "steps=40",
    "log_every=1",
    "checkpoint_every=4",
    "model.config.resid_pdrop=0.1",
    "storage=s3://gptj",
]


@pytest.fixture(scope="module")
def undisturbed(
    node: LocalRay,
    s3_server: LocalS3,
    exported: Exported,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """The output of a submitted run of 40 steps, which is evaluated on its way."""
    environment = {**os.environ, **s3_server.environment(), **node.environment()}
    log = tmp_path_factory.mktemp("undisturbed") / "log"
    command = [RAY, "job", "submit", "--", str(ROOT / "jobs" / "finetune.py"), "run=undisturbed"]
    command += [*MAIN, "evaluate_every=20"]
    deadline = time.monotonic() + 300
    while not exported.scrape():  # jobs are taken by the same process
        assert time.monotonic() < deadline, "Ray's agent did not come up"
        time.sleep(0.2)
    with running(command, environment=environment, log=log) as process:
        while process.poll() is None:
            exported.scrape()
            time.sleep(1)
    assert process.returncode == 0, tail(log, 4000)
    return log.read_text()


@pytest.fixture(scope="module")
def damaged(
    node: LocalRay,
    s3_server: LocalS3,
    undisturbed: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> subprocess.CompletedProcess[str]:
    """A run that begins with damaged weights, which its first worker reads."""
    folder = tmp_path_factory.mktemp("damaged")
    torch.manual_seed(0)
    tokenizer = GPTJTokenizer.train(["some text to learn from"], 300)
    config = GPTJConfig(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, rotary_dim=4, n_positions=64
    )
    GPTJForCausalLM(config).save_pretrained(str(folder / "m"), tokenizer=tokenizer)
    content = bytearray((folder / "m" / "model.safetensors").read_bytes())
    content[-50] ^= 1
    (folder / "m" / "model.safetensors").write_bytes(content)
    words = [f"model.checkpoint={folder}/m", "data.sequence_length=64", "workers.count=2"]
    environment = {**os.environ, **s3_server.environment(), **node.environment()}
    return direct(environment, "run=damaged", "storage=s3://gptj", "steps=2", *words)


def test_a_run_resumes_after_its_worker_or_job_is_killed(
    cluster: dict[str, str],
    node: LocalRay,
    proxy: FaultyS3,
    undisturbed: str,
    tmp_path: Path,
) -> None:
    """It ends like an undisturbed one: losses are equal to 1e-6, so nothing is lost or repeated.

    Dropout is on: the random state has to come back too. Then S3 is away for 20 s, and SIGTERM
    comes meanwhile: the run waits for S3, saves the step that it has come to, and stops.
    """
    assert re.search(r"step 40 of 40 \| loss \d\.\d{4}.* tokens/s.* left", undisturbed)
    log = tmp_path / "log"
    command = [sys.executable, str(ROOT / "jobs" / "finetune.py"), "run=killed", *MAIN]
    with log.open("w") as file:
        first = subprocess.Popen(command, env=cluster, cwd=ROOT, stdout=file, stderr=file)
    try:
        wait_for(lambda: storage.list_files("s3://gptj/killed/lease") != [], first, log)
        # As long as it lives, it cannot be submitted again. The steps go on meanwhile, and fast.
        with subprocess.Popen(
            command,
            env=cluster,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as refused:
            wait_for_checkpoint("killed", 4, first, log)
            kill_a_worker(node)
            said, _ = refused.communicate()
        assert refused.returncode == 1
        assert f"'killed' is already being trained: process {first.pid} on " in said
        wait_for(lambda: "resuming after step" in log.read_text(), first, log)
        wait_for_checkpoint("killed", 16, first, log)
    finally:
        first.kill()
        first.wait()
    resumed = RESUMED.search(log.read_text())
    assert resumed is not None, tail(log, 4000)
    assert 4 <= int(resumed[1]) < 40
    assert resumed[2] == "2"
    # The submission's number, then the attempt's: the order in which the workers were started.
    claims = storage.list_files("s3://gptj/killed/attempts")
    tokens = [json.loads(storage.read_bytes(claim.address))["token"] for claim in claims]
    assert tokens == [[1, 1], [1, 2]]

    faults = itertools.cycle(["reset", Reply(503, "SlowDown"), "lost", Reply(500, "InternalError")])
    log = tmp_path / "second"
    away, back = threading.Event(), threading.Event()

    def fault(request: Request) -> Fault:
        """S3 is away from the first checkpoint of the second submission on."""
        if request.method == "PUT" and "/checkpoint-" in request.path:
            if "resuming after step" in log.read_text():
                away.set()
        return next(faults) if away.is_set() and not back.is_set() else None

    environment = {**cluster, "AWS_ENDPOINT_URL": proxy.endpoint}
    with (
        log.open("w") as file,
        subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file) as second,
    ):
        proxy.fault = fault
        wait_for(away.is_set, second, log)
        time.sleep(20)
        second.terminate()
        back.set()
        second.wait()
    said = log.read_text()
    resumed = re.search(r"resuming after step (\d+) of 40", said)
    assert resumed is not None, said[-4000:]
    assert int(resumed[1]) >= 16
    assert "retrying for up to 5 minutes" in said
    stopped = re.search(
        r"^stopped after step (\d+) of 40: the job was told to stop \(SIGTERM\)\. "
        r"(s3://gptj/killed/checkpoint-[\w-]+) is saved, and the same command resumes from it$",
        said,
        re.MULTILINE,
    )
    assert stopped is not None, said[-4000:]
    assert second.returncode == 143
    assert "Traceback" not in said.partition("SIGTERM: the training ends")[2]
    assert latest_checkpoint("s3://gptj/killed") == stopped[2]

    done = direct(cluster, "run=killed", *MAIN)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"resuming after step {stopped[1]} of 40" in done.stdout + done.stderr

    expected = losses("undisturbed")
    assert sorted(expected) == list(range(1, 41))
    assert losses("killed") == pytest.approx(expected, abs=1e-6)
    for run in ("undisturbed", "killed"):
        verify(f"s3://gptj/{run}/model")
    model = GPTJForCausalLM.from_pretrained("s3://gptj/killed/model")
    assert model.config.n_embd == 64
    kept = {f.name.split("/")[0] for f in storage.list_files("s3://gptj/killed")}
    assert {"model", "loss.png"} <= kept
    steps = {checkpoint_step(name) for name in kept if name.startswith("checkpoint-")}
    assert {36, 40} <= steps
    assert 4 not in steps  # keep_checkpoints=2

    # The same command once more has nothing to do.
    again = direct(cluster, "run=killed", *MAIN)
    assert again.returncode == 0
    assert "already complete: s3://gptj/killed/model" in again.stdout


def wait_for_checkpoint(run: str, step: int, process: subprocess.Popen[bytes], log: Path) -> None:
    wanted = f"s3://gptj/{run}/checkpoint-{step:08}"
    wait_for(lambda: (latest_checkpoint(f"s3://gptj/{run}") or "") >= wanted, process, log)


def wait_for(there: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Until something is there that a process makes, which must live as long."""
    deadline = time.monotonic() + 300
    while not there():
        assert process.poll() is None, tail(log, 4000)
        assert time.monotonic() < deadline, tail(log, 4000)
        time.sleep(0.05)


def test_a_run_that_another_job_trains_is_refused_at_once(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    """Also where the other one has taken the room; neither job was submitted by gptj train."""
    words = [*TINY, "run=held", "storage=s3://gptj", "steps=100000", "checkpoint_every=50000"]
    submission = f"held-{os.getpid()}"
    submit = [RAY, "job", "submit", "--submission-id", submission, "--no-wait", "--"]
    program = str(ROOT / "jobs" / "finetune.py")
    subprocess.run([*submit, program, *words], env=cluster, check=True, capture_output=True)
    try:
        deadline = time.monotonic() + 120
        while not storage.list_files("s3://gptj/held/lease"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        before = {file.name for file in storage.list_files("s3://gptj/held/lease")}
        refused = direct(cluster, *words, "workers.count=4")
        assert refused.returncode == 1
        assert re.search(
            rf"error: the run 'held' is already being trained: process \d+ on \S+ "
            rf"\(job {submission}\) is still running\. .* or choose another run=$",
            refused.stderr.strip(),
        ), refused.stderr
        assert {file.name for file in storage.list_files("s3://gptj/held/lease")} == before
        train = [sys.executable, "-m", "gptj_cli", "train", *words]
        again = subprocess.run(train, env=cluster, cwd=tmp_path, capture_output=True, text=True)
        assert again.returncode == 1
        assert f"error: job {submission} is already training this run" in again.stderr
        assert f"or stop it: ray job stop {submission}" in again.stderr
    finally:
        stop = [RAY, "job", "stop", submission]
        subprocess.run(stop, env=cluster, check=True, capture_output=True)
    # It has let go: only what is wrong with the settings is said.
    done = direct(cluster, *words, "workers.count=9", "batch_size=9", "micro_batch_size=1")
    assert "needs 9 CPUs, but the cluster has 4" in done.stderr


def test_a_single_workers_error_ends_the_run_with_one_clear_message(
    damaged: subprocess.CompletedProcess[str],
) -> None:
    """Worker 0 alone reads the weights, which are damaged; worker 1 waits for it in a collective.

    Four tries are allowed, and none of them would end otherwise: the workers are not started again.
    """
    assert damaged.returncode == 1
    said = damaged.stdout + damaged.stderr
    assert re.search(r"^error: \S+model\.safetensors was altered", damaged.stderr, re.MULTILINE), (
        said
    )
    # Said once, by the driver, whatever the number of workers.
    assert said.count("was altered after it was written") == 1
    assert "failed 4 times" not in said
    assert said.count("training examples") == 1
    # Ray's own cleaner, killed at the end, sometimes shows one.
    ours = [line for line in damaged.stderr.splitlines() if "(PlacementGroupCleaner " not in line]
    assert "Traceback" not in "\n".join(ours)


def test_prometheus_reads_training_metrics(
    exported: Exported, undisturbed: str, damaged: subprocess.CompletedProcess[str]
) -> None:
    """All that the dashboard and the alerts name, from a training that goes on and one that fails.

    The failed one's count stays after its end.
    """
    assert damaged.returncode == 1
    named = [
        *k8s_metrics.panels("training"),
        *(each for each in k8s_metrics.rules() if "Training" in each.place),
    ]
    assert len(named) > 8
    deadline = time.monotonic() + 60
    while faults := k8s_metrics.missing(exported.scrape(), named):
        assert time.monotonic() < deadline, faults
        time.sleep(0.5)


def test_errors_are_reported_before_training(cluster: dict[str, str], tmp_path: Path) -> None:
    """Each in seconds, in one line without a traceback, and with exit status 1."""
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "no text"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    store = "storage=s3://gptj/errors"
    cases = {
        "unknown setting": [store, "lerning_rate=1"],
        "no bucket": ["storage=s3://not-there"],
        "workers.count=9 .* needs 9 CPUs, but the cluster has 4": [
            store,
            "workers.count=9",
            "batch_size=9",
            "micro_batch_size=1",
        ],
        "workers.device=gpu, but the cluster has no GPU": [
            store,
            "workers.count=2",
            "workers.device=gpu",
        ],
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

    replies = run_in_turn("jobs.finetune", [*cases.values()], cluster, tmp_path)
    for (message, words), (status, _, said) in zip(cases.items(), replies, strict=True):
        assert status == 1, (words, said)
        assert re.search(f"error: (.|\n)*{message}", said), (words, said)
        assert "Traceback" not in said, said
    assert latest_checkpoint("s3://gptj/errors/finetune") is None

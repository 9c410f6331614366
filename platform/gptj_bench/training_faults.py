"""Kills parts of a running training and says what was lost.

    python -m gptj_bench.training_faults [--faults worker,controller,…] [--json OUT]

Starts S3 and a Ray cluster of two nodes on loopback, and trains a tiny model with dropout, first
undisturbed and then once for each fault, which comes after a checkpoint: SIGKILL to a `worker`, to
Ray Train's `controller`, to the `driver` or to the second node's `raylet`; `drain`, Ray's notice
that it will take the second node away; and SIGTERM to the driver (`sigterm`). A run that ends is
submitted again. A line a fault: how many steps were computed twice, the seconds from the fault to
the first new step, and whether all losses are those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from gptj import storage
from gptj_local.processes import HOST, free_ports, running, tail
from gptj_local.ray import LocalRay
from gptj_local.s3 import LocalS3

JOB = Path(__file__).resolve().parents[2] / "jobs" / "finetune.py"
RAY = str(Path(sys.executable).parent / "ray")
FAULTS = ("worker", "controller", "driver", "raylet", "drain", "sigterm")
STEPS, EVERY = 60, 10
AT = 25  # the step after which a fault comes
DEADLINE_SECONDS = 900.0
SETTINGS = (
    "storage=s3://gptj",
    f"steps={STEPS}",
    f"checkpoint_every={EVERY}",
    "log_every=1",
    "model.config.n_embd=64",
    "model.config.resid_pdrop=0.1",
    "tokenizer.vocab_size=512",
    "data.sequence_length=128",
    "batch_size=32",
    "workers.count=2",
    "workers.cpus=2",  # a worker a node
)
STEP = re.compile(r"step (\d+) of \d+  loss")


@dataclass(frozen=True)
class Result:
    fault: str
    repeated: int  # steps that were computed again
    seconds: float  # from the fault to the first new step
    submissions: int  # how often the job was submitted
    equal: bool  # whether all losses are those of the undisturbed run


class Cluster:
    """A head, and a second node for as long as it is wanted."""

    def __init__(self, head: LocalRay, folder: Path, environment: dict[str, str]) -> None:
        self.head = head
        self.environment = {**environment, **head.environment()}
        self._folder = folder
        self._stack = ExitStack()
        self._second: subprocess.Popen[bytes] | None = None
        self._count = 0

    def start_second(self) -> None:
        """A node like the head; the one before, if any, is ended."""
        self._stack.close()
        self._count += 1
        log = self._folder / f"node-{self._count}.log"
        agent, metrics = free_ports(2)
        command = [
            *(RAY, "start", "--block", f"--address={HOST}:{self.head.port}", "--num-cpus=3"),
            *(f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"),
        ]
        second = self._stack.enter_context(
            running(command, environment=self.environment, log=log, grace_seconds=2)
        )

        def is_up() -> bool:
            if second.poll() is not None:
                raise RuntimeError(f"the second node does not start: {tail(log)}")
            return "Ray runtime started" in tail(log, 10_000)

        wait(is_up, "the second node", log)
        self._second = second

    def close(self) -> None:
        self._stack.close()

    def kill(self, name: str, *, second: bool = False) -> None:
        """SIGKILL to one process of a node, by its name."""
        parent = self._second.pid if second and self._second else self.head.process_id
        found = [
            process
            for process in psutil.Process(parent).children(recursive=True)
            if name in process.name() or name in " ".join(process.cmdline()[:1])
        ]
        if not found:
            raise RuntimeError(f"there is no process {name}")
        found[-1].kill()

    def drain_second(self) -> None:
        """Ray's notice that the second node goes away in a minute."""
        listed = subprocess.run(
            [RAY, "list", "nodes", "--format=json", "--filter=state=ALIVE"],
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        nodes = json.loads(listed.stdout[listed.stdout.index("[") :])
        (other,) = (node["node_id"] for node in nodes if not node["is_head_node"])
        command = [
            *(RAY, "drain-node", f"--address={HOST}:{self.head.port}", f"--node-id={other}"),
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=spot",
            "--deadline-remaining-seconds=60",
        ]
        subprocess.run(command, env=self.environment, check=True, capture_output=True)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    with LocalS3.start(folder / "s3") as s3:
        os.environ |= s3.environment()
        with LocalRay.start(folder, cpus=3, environment=dict(os.environ)) as head:
            found = Cluster(head, folder, dict(os.environ))
            found.start_second()
            try:
                yield found
            finally:
                found.close()


def measure(cluster: Cluster, fault: str, folder: Path, expected: dict[int, float]) -> Result:
    """Train with one fault, submitting again until the model is there."""
    log = folder / f"{fault}.log"
    job = submit(cluster, fault, log)
    wait(lambda: max_step(log.read_text()) >= AT, f"step {AT}", log)
    since = time.monotonic()
    if fault == "worker":
        cluster.kill("RayTrainWorker")
    elif fault == "controller":
        cluster.kill("TrainController")
    elif fault == "raylet":
        cluster.kill("raylet", second=True)
        cluster.start_second()
    elif fault == "drain":
        cluster.drain_second()
        cluster.start_second()
    else:
        job.send_signal(signal.SIGKILL if fault == "driver" else signal.SIGTERM)
    submissions = 1
    beyond: float | None = None
    while True:
        before, _, after = log.read_text().rpartition("resuming after step")
        if beyond is None and before and max_step(after) > max_step(before):
            beyond = time.monotonic() - since
        if (status := job.poll()) is not None:
            if status == 0:
                break
            submissions += 1
            if submissions > 4:
                raise RuntimeError(f"the run {fault} does not end: {tail(log, 4000)}")
            job = submit(cluster, fault, log)
        if time.monotonic() - since > DEADLINE_SECONDS:
            raise RuntimeError(f"the run {fault} takes too long: {tail(log, 4000)}")
        time.sleep(0.2)
    steps = [int(step) for step in STEP.findall(log.read_text())]
    found = losses(fault)
    equal = found.keys() == expected.keys() and all(
        abs(found[step] - loss) < 1e-6 for step, loss in expected.items()
    )
    repeated = len(steps) - len(set(steps))
    return Result(fault, repeated, beyond or 0.0, submissions, equal)


def submit(cluster: Cluster, run: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(JOB), f"run={run}", *SETTINGS]
    with log.open("ab") as output:
        return subprocess.Popen(command, env=cluster.environment, stdout=output, stderr=output)


def max_step(text: str) -> int:
    return max((int(step) for step in STEP.findall(text)), default=0)


def losses(run: str) -> dict[int, float]:
    lines = storage.read_bytes(f"s3://gptj/{run}/history.jsonl").decode().splitlines()
    return {point["step"]: point["loss"] for point in map(json.loads, lines) if "loss" in point}


def wait(there: Callable[[], bool], what: str, log: Path | None = None) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not there():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited in vain for {what}: {tail(log, 4000) if log else ''}")
        time.sleep(0.05)


def line(result: Result) -> str:
    return (
        f"{result.fault:10} {result.repeated:3} steps again, {result.seconds:5.1f} s until the "
        f"next new step, submitted {result.submissions} times, losses "
        f"{'equal' if result.equal else 'DIFFER'}"
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", default=",".join(FAULTS), help="in this order")
    parser.add_argument("--json", type=Path, metavar="OUT", help="append a line a fault")
    arguments = parser.parse_args(words)
    faults = arguments.faults.split(",")
    if unknown := set(faults) - set(FAULTS):
        parser.error(f"there is no fault {', '.join(sorted(unknown))}: {', '.join(FAULTS)}")
    with tempfile.TemporaryDirectory(prefix="gptj-faults-") as name:
        folder = Path(name)
        (folder / "s3").mkdir()
        with cluster(folder) as both:
            log = folder / "undisturbed.log"
            if submit(both, "undisturbed", log).wait() != 0:
                raise RuntimeError(tail(log, 4000))
            expected = losses("undisturbed")
            for fault in faults:
                result = measure(both, fault, folder, expected)
                print(line(result), flush=True)
                if arguments.json is not None:
                    with arguments.json.open("a") as file:
                        file.write(json.dumps(asdict(result)) + "\n")


if __name__ == "__main__":
    main()

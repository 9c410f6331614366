"""Kills parts of a running training and says what was lost.

    python -m gptj_bench.training_faults [--faults worker,controller,…] [--json OUT] [--logs DIR]

Starts S3 and a Ray cluster of two nodes on loopback. For each fault a tiny model trains with
dropout until the fault comes, between two checkpoints, and a few steps beyond; a run that ends is
submitted again. An undisturbed run then takes as many steps. A line a fault: the steps that were
computed twice, the longest time without a new step, and how far losses are from the undisturbed
run's.

| fault | what happens |
|---|---|
| `worker`, `controller`, `driver` | SIGKILL to it |
| `raylet` | SIGKILL to the second node's; another node joins |
| `raylets` | SIGKILL to the second node's and then to the head's; another cluster starts |
| `drain` | Ray's notice that the second node goes away; it goes when the grace period is over |
| `sigterm` | SIGTERM to the driver |
| `s3-stalled` | S3 answers nothing for two minutes (SIGSTOP) |
| `s3-down` | S3 ends, and starts again two minutes later |
| `elastic` | `workers.count=[1,3]` on three nodes: one is lost, and another one comes |
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
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from gptj import storage
from gptj_local.processes import HOST, descendants, kill_tree, tail
from gptj_local.ray import LocalRay
from gptj_local.s3 import LocalS3

JOB = Path(__file__).resolve().parents[2] / "jobs" / "finetune.py"
RAY = str(Path(sys.executable).parent / "ray")
EVERY = 10  # steps between checkpoints
AT = 25  # the step after which a fault comes
MORE = 12  # steps that a run takes after it
ENDLESS = 100_000
AWAY_SECONDS = 120.0  # of S3
GRACE_SECONDS = 45  # of a node
DEADLINE_SECONDS = 600.0
STOPPED = 128 + signal.SIGTERM
SETTINGS = (
    "storage=s3://gptj",
    f"checkpoint_every={EVERY}",
    "log_every=1",
    "optimizer.schedule=constant",  # a step does not depend on how many there will be
    "model.config.n_embd=64",
    "tokenizer.vocab_size=512",
    "data.sequence_length=128",
    "batch_size=48",
    "workers.cpus=2",  # a worker a node
)
FIXED = ("workers.count=2", "model.config.resid_pdrop=0.1")
# Which numbers dropout drops depends on the number of workers.
ELASTIC = ("workers.count=[1,3]",)
NODE_CPUS = 3
STEP = re.compile(r"step (\d+) of \d+ \| loss")
RESUMED = re.compile(r"resuming after step (\d+) of \d+ on (\d+) workers")


@dataclass(frozen=True)
class Result:
    fault: str
    repeated: int  # steps that were computed again
    seconds: float  # the longest time without a new step
    submissions: int  # how often the job was submitted
    steps: int  # of the whole run
    off: float = float("nan")  # of a loss, at most, from the undisturbed run's
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        return (
            f"{self.fault:10} {self.repeated:3} steps again, {self.seconds:6.1f} s without a new "
            f"step, submitted {self.submissions} times; {'; '.join(self.notes)}"
        )


class Cluster:
    """S3, a head, and further nodes for as long as they are wanted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._s3_stack = ExitStack()
        self._nodes: list[tuple[ExitStack, subprocess.Popen[bytes]]] = []
        self._count = 0
        self.s3 = self._s3_stack.enter_context(LocalS3.start(folder / "s3"))
        os.environ |= self.s3.environment()
        self.head: LocalRay

    def start(self) -> None:
        self._count += 1
        folder = self.folder / f"head-{self._count}"
        folder.mkdir()
        environment = dict(os.environ)
        self.head = self._stack.enter_context(
            LocalRay.start(folder, cpus=NODE_CPUS, environment=environment, more_nodes=True)
        )

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.head.environment()}

    def add_node(self) -> None:
        self._count += 1
        stack = ExitStack()
        log = self.folder / f"node-{self._count}.log"
        self._nodes.append((stack, stack.enter_context(self.head.worker(log, cpus=NODE_CPUS))))

    def nodes(self, count: int) -> None:
        """Let there be so many nodes beside the head."""
        while len(self._nodes) > count:
            self.lose_node()
        while len(self._nodes) < count:
            self.add_node()

    def lose_node(self) -> None:
        """SIGKILL to all processes of the oldest node, as when a machine is lost."""
        stack, process = self._nodes.pop(0)
        kill_tree(process)
        stack.close()

    def kill(self, name: str, *, of_head: bool = True) -> None:
        """SIGKILL to one process of the head, or of the oldest node, by its name."""
        parent = self.head.process_id if of_head else self._nodes[0][1].pid
        found = descendants(parent, name)
        if not found:
            raise RuntimeError(f"there is no process {name}")
        found[-1].kill()

    def drain_node(self) -> None:
        """Ray's notice that the one node beside the head goes away."""
        listed = self._ray("list", "nodes", "--format=json", "--filter=state=ALIVE")
        nodes = json.loads(listed[listed.index("[") :])
        (other,) = (node["node_id"] for node in nodes if not node["is_head_node"])
        self._ray(
            *("drain-node", f"--address={HOST}:{self.head.port}", f"--node-id={other}"),
            *("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"),
            f"--deadline-remaining-seconds={GRACE_SECONDS}",
        )

    def _ray(self, *words: str) -> str:
        done = subprocess.run([RAY, *words], env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ray {' '.join(words)}: {done.stderr[-2000:]}")
        return done.stdout

    def stall_s3(self, stalled: bool) -> None:
        process = psutil.Process(self.s3.process_id)
        for each in [process, *process.children(recursive=True)]:
            each.suspend() if stalled else each.resume()

    def end_s3(self) -> None:
        self._s3_stack.close()

    def restart_s3(self) -> None:
        self.s3 = self._s3_stack.enter_context(LocalS3.start(self.folder / "s3", again=self.s3))

    def close_ray(self) -> None:
        for stack, _ in self._nodes:
            stack.close()
        self._nodes.clear()
        self._stack.close()

    def close(self) -> None:
        self.close_ray()
        self._s3_stack.close()


@dataclass
class Run:
    """A training, submitted again whenever it ends, and watched."""

    cluster: Cluster
    name: str
    settings: Sequence[str]
    log: Path
    submissions: int = 0
    furthest: int = 0  # step
    resumed: list[int] = field(default_factory=list)  # on how many workers, each time
    saved: int = 0  # checkpoints
    repeated: int = 0  # steps
    longest_pause: float = 0.0  # in seconds, since a fault has come
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._position = 0  # in the log
        self._seen: set[str] = set()
        self._since: float | None = None  # the last new step, once a fault has come
        self.submit()

    def submit(self) -> None:
        command = [sys.executable, str(JOB), f"run={self.name}", *self.settings]
        with self.log.open("ab") as output:
            self.job = subprocess.Popen(
                command, env=self.cluster.environment, stdout=output, stderr=output
            )
        self.submissions += 1

    def begin_fault(self) -> None:
        self._since = time.monotonic()

    def look(self) -> None:
        """See what is new, and submit the run again if it has ended."""
        before = self.furthest
        for line in self._new_lines():
            if found := STEP.search(line):
                self.furthest = max(self.furthest, int(found[1]))
            elif found := RESUMED.search(line):
                self.resumed.append(int(found[2]))
                self.repeated += self.furthest - int(found[1])
            elif "saved s3://" in line:
                self.saved += 1
        now = time.monotonic()
        if self.furthest > before and self._since is not None:
            self.longest_pause = max(self.longest_pause, now - self._since)
            self._since = now
        if self.job.poll() is not None:
            if self.submissions == 5:
                raise RuntimeError(f"the run {self.name} does not go on: {tail(self.log, 4000)}")
            self.notes.append(f"its job ended with status {self.job.returncode}")
            self.submit()

    def _new_lines(self) -> list[str]:
        with self.log.open(errors="replace") as file:
            file.seek(self._position)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._position += len(whole.encode())
        # Both nodes forward what they find in the log folder that they share on one machine; lines
        # have their time, in milliseconds.
        lines = [line for line in dict.fromkeys(whole.splitlines()) if line not in self._seen]
        self._seen.update(lines)
        return lines

    def wait(self, there: Callable[[], bool], what: str, seconds: float = DEADLINE_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        self.look()
        while not there():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: no {what}: {tail(self.log, 4000)}")
            time.sleep(0.2)
            self.look()

    def go_on(self, since: int) -> None:
        """Wait for some steps beyond one."""
        self.wait(lambda: self.furthest >= since + MORE, f"step {since + MORE}")

    def go_on_resumed(self) -> None:
        self.wait(lambda: bool(self.resumed), "resumed run")
        self.go_on(self.furthest)

    def watch(self, seconds: float) -> None:
        """Let it run."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(0.2)
            self.look()

    def end(self) -> int:
        """SIGTERM: it saves and stops; the last step."""
        self.job.send_signal(signal.SIGTERM)
        if self.job.wait(DEADLINE_SECONDS) != STOPPED:
            raise RuntimeError(f"the run {self.name} does not stop: {tail(self.log, 4000)}")
        stopped = re.findall(r"stopped after step (\d+) of", self.log.read_text())
        return int(stopped[-1])


def measure(cluster: Cluster, fault: str) -> Result:
    """Train with one fault, and stop some steps later."""
    elastic = fault == "elastic"
    cluster.nodes(2 if elastic else 1)
    settings = (*SETTINGS, *(ELASTIC if elastic else FIXED), f"steps={ENDLESS}")
    run = Run(cluster, fault, settings, cluster.folder / f"{fault}.log")
    try:
        run.wait(lambda: run.furthest >= AT, f"step {AT}")
        run.begin_fault()
        _FAULTS[fault](cluster, run)
        steps = run.end()
    finally:
        run.job.kill()
        run.job.wait()
    pause = run.longest_pause
    return Result(
        fault, run.repeated, pause, run.submissions, steps, notes=tuple(dict.fromkeys(run.notes))
    )


def _worker(cluster: Cluster, run: Run) -> None:
    cluster.kill("RayTrainWorker")
    run.go_on_resumed()


def _controller(cluster: Cluster, run: Run) -> None:
    cluster.kill("TrainController")
    run.go_on_resumed()


def _driver(cluster: Cluster, run: Run) -> None:
    run.job.kill()
    run.go_on_resumed()


def _raylet(cluster: Cluster, run: Run) -> None:
    cluster.kill("raylet", of_head=False)
    cluster.nodes(0)
    cluster.nodes(1)
    run.go_on_resumed()


def _raylets(cluster: Cluster, run: Run) -> None:
    cluster.kill("raylet", of_head=False)
    run.watch(5)
    cluster.kill("raylet")
    run.job.wait(DEADLINE_SECONDS)  # before it is submitted to a cluster that is not there
    cluster.close_ray()
    cluster.start()
    cluster.nodes(1)
    run.go_on_resumed()


def _drain(cluster: Cluster, run: Run) -> None:
    cluster.drain_node()
    noticed = time.monotonic()
    cluster.add_node()
    run.wait(lambda: bool(run.resumed), "resumed run")
    run.notes.append(f"resumed {time.monotonic() - noticed:.0f} s after the notice")
    while time.monotonic() < noticed + GRACE_SECONDS:
        run.watch(1)
    cluster.lose_node()
    run.go_on(run.furthest)


def _sigterm(cluster: Cluster, run: Run) -> None:
    run.job.terminate()
    run.go_on_resumed()


def _s3_stalled(cluster: Cluster, run: Run) -> None:
    cluster.stall_s3(True)
    try:
        run.watch(AWAY_SECONDS)
    finally:
        cluster.stall_s3(False)
    _go_on_with_s3(run)


def _s3_down(cluster: Cluster, run: Run) -> None:
    cluster.end_s3()
    try:
        run.watch(AWAY_SECONDS)
    finally:
        cluster.restart_s3()  # also for the faults that follow
    _go_on_with_s3(run)


def _go_on_with_s3(run: Run) -> None:
    """Until checkpoints are saved again."""
    saved, back = run.saved, time.monotonic()
    run.wait(lambda: run.saved > saved + 1, "checkpoint")
    run.notes.append(f"two checkpoints saved {time.monotonic() - back:.0f} s after S3 was back")
    run.go_on(run.furthest)


def _elastic(cluster: Cluster, run: Run) -> None:
    lost = time.monotonic()
    cluster.lose_node()
    run.wait(lambda: 2 in run.resumed, "run on 2 workers")
    run.go_on(run.furthest)
    run.notes.append(f"2 workers: {MORE} steps {time.monotonic() - lost:.0f} s after the loss")
    cluster.add_node()
    came = time.monotonic()
    run.wait(lambda: 3 in run.resumed, "run on 3 workers")
    run.notes.append(f"3 workers resume {time.monotonic() - came:.0f} s after a node has come")
    run.go_on(run.furthest)


_FAULTS: dict[str, Callable[[Cluster, Run], None]] = {
    "worker": _worker,
    "controller": _controller,
    "driver": _driver,
    "raylet": _raylet,
    "drain": _drain,
    "sigterm": _sigterm,
    "s3-stalled": _s3_stalled,
    "s3-down": _s3_down,
    "elastic": _elastic,
    "raylets": _raylets,
}


def undisturbed(cluster: Cluster, name: str, settings: Sequence[str], steps: int) -> None:
    """Train without a fault."""
    cluster.nodes(1)
    words = (*SETTINGS, *settings, f"steps={steps}")
    run = Run(cluster, name, words, cluster.folder / f"{name}.log")
    if run.job.wait() != 0:
        raise RuntimeError(f"the run {name} ended: {tail(run.log, 4000)}")


def losses(run: str) -> dict[int, float]:
    lines = storage.read_bytes(f"s3://gptj/{run}/history.jsonl").decode().splitlines()
    return {point["step"]: point["loss"] for point in map(json.loads, lines) if "loss" in point}


def off(run: str, expected: dict[int, float], steps: int) -> float:
    """How far a run's losses are from another's, at most; infinite if one is missing."""
    found = losses(run)
    if not found.keys() >= set(range(1, steps + 1)):
        return float("inf")
    return max(abs(found[step] - expected[step]) for step in range(1, steps + 1))


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    found = Cluster(folder)
    try:
        found.start()
        yield found
    finally:
        found.close()


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", default=",".join(_FAULTS), help="in this order")
    parser.add_argument("--json", type=Path, metavar="OUT", help="append a line a fault")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="a new one, to be kept")
    arguments = parser.parse_args(words)
    faults = arguments.faults.split(",")
    if unknown := set(faults) - set(_FAULTS):
        parser.error(f"unknown fault {', '.join(sorted(unknown))}: {', '.join(_FAULTS)}")
    with ExitStack() as stack:
        folder = arguments.logs
        if folder is None:
            named = tempfile.TemporaryDirectory(prefix="gptj-faults-")
            folder = Path(stack.enter_context(named))
        folder.mkdir(parents=True, exist_ok=True)
        both = stack.enter_context(cluster(folder.absolute()))
        results: list[Result] = []
        failed: list[str] = []
        for fault in faults:
            try:
                results.append(measure(both, fault))
            except RuntimeError as error:  # the others are compared nonetheless
                failed.append(fault)
                print(f"{fault:10} has no result: {error}", flush=True)
                continue
            print(results[-1].line(), flush=True)
        for elastic in (False, True):
            of_kind = [each for each in results if (each.fault == "elastic") == elastic]
            if not of_kind:
                continue
            name = f"undisturbed-{elastic:d}"
            settings = ("workers.count=2",) if elastic else FIXED
            undisturbed(both, name, settings, max(each.steps for each in of_kind))
            expected = losses(name)
            for result in of_kind:
                difference = off(result.fault, expected, result.steps)
                print(
                    f"{result.fault:10} {result.steps} steps, losses off by at most "
                    f"{difference:.1e}",
                    flush=True,
                )
                if arguments.json is not None:
                    with arguments.json.open("a") as file:
                        file.write(json.dumps({**asdict(result), "off": difference}) + "\n")
    if failed:
        sys.exit(f"error: no result for {', '.join(failed)}")


if __name__ == "__main__":
    main()

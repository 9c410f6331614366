"""Kills parts of a running training and says what was lost.

    python -m gptj_bench.training_faults [--hosts] [--faults worker,…] [--json OUT] [--logs DIR]

Starts S3 and a Ray cluster of two nodes, on loopback or, with `--hosts`, each on a host of its own
(gptj_local.hosts), whose further faults are gptj_bench.host_faults. For each fault a tiny model
trains with dropout until the fault comes, between two checkpoints, and a few steps beyond; a run
that ends is submitted again. An undisturbed run then takes as many steps. A line a fault: the steps
that were computed twice, the longest time without a new step, and how far losses are from the
undisturbed run's.

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
import hashlib
import json
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
from gptj.errors import CheckpointError
from gptj.training.state import rank_manifest, read_progress
from gptj_bench import host_faults
from gptj_bench.training_cluster import DEADLINE_SECONDS, GRACE_SECONDS, MORE, Cluster, Run
from gptj_local.hosts import Network, enter_namespaces, obstacle
from gptj_local.processes import tail

EVERY = 10  # steps between checkpoints
AT = 25  # the step after which a fault comes
ENDLESS = 100_000
AWAY_SECONDS = 120.0  # of S3
ON_HOSTS = ("raylet", "raylets")  # faults on loopback that --hosts runs too by default
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
            f"{self.fault:12} {self.repeated:3} steps again, {self.seconds:6.1f} s without a new "
            f"step, submitted {self.submissions} times; {'; '.join(self.notes)}"
        )


def measure(cluster: Cluster, fault: str) -> Result:
    """Train with one fault, and stop some steps later."""
    elastic = fault == "elastic"
    cluster.with_clocks(fault in host_faults.CLOCKS)
    cluster.nodes(2 if elastic else 1)
    settings = (*SETTINGS, *(ELASTIC if elastic else FIXED), f"steps={ENDLESS}")
    run = Run(cluster, fault, settings, cluster.folder / f"{fault}.log")
    try:
        run.wait(lambda: run.furthest >= AT, f"step {AT}")
        run.begin_fault()
        (_FAULTS | host_faults.FAULTS)[fault](cluster, run)
        steps = run.end()
        run.notes.append(checkpoints(f"s3://gptj/{fault}"))
    finally:
        run.kill()
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
    run.kill()
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
    run.terminate()
    run.go_on_resumed()


def _s3_stalled(cluster: Cluster, run: Run) -> None:
    cluster.stall_s3(True)
    try:
        run.watch(AWAY_SECONDS)
    finally:
        cluster.stall_s3(False)
    run.go_on_saving()


def _s3_down(cluster: Cluster, run: Run) -> None:
    cluster.end_s3()
    try:
        run.watch(AWAY_SECONDS)
    finally:
        cluster.restart_s3()  # also for the faults that follow
    run.go_on_saving()


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


def checkpoints(folder: str) -> str:
    """How many a run has, all of whose files have been read and are whole. Raises RuntimeError."""
    names = {file.name.partition("/")[0] for file in storage.list_files(folder)}
    found = sorted(name for name in names if name.startswith("checkpoint-"))
    for name in found:
        address = storage.join(folder, name)
        try:
            world_size = read_progress(address).world_size
            for rank in range(world_size):
                manifest = rank_manifest(address, rank, world_size)
                for file in manifest.files:
                    content = storage.read_bytes(storage.join(address, file))
                    digest = hashlib.sha256(content).hexdigest()
                    manifest.check_content(file, len(content), digest)
        except CheckpointError as error:
            raise RuntimeError(f"a checkpoint is damaged: {error}") from error
    return f"{len(found)} checkpoints, all complete"


@contextmanager
def cluster(folder: Path, network: Network | None = None) -> Iterator[Cluster]:
    found = Cluster(folder, network)
    try:
        found.start()
        yield found
    finally:
        found.close()


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", action="store_true", help="each node on a host of its own")
    parser.add_argument(
        "--faults", help="in this order; default: all; with --hosts those of hosts, and of raylets"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="append a line a fault")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="a new one, to be kept")
    arguments = parser.parse_args(words)
    possible = (*host_faults.FAULTS, *(_FAULTS if arguments.faults else ON_HOSTS))
    if not arguments.hosts:
        possible = tuple(_FAULTS)
    faults = arguments.faults.split(",") if arguments.faults else possible
    if unknown := set(faults) - set(possible):
        parser.error(f"unknown fault {', '.join(sorted(unknown))}: {', '.join(possible)}")
    if arguments.hosts:
        if why := obstacle(clocks=not host_faults.CLOCKS.isdisjoint(faults)):
            sys.exit(f"error: {why}")
        enter_namespaces()
    with ExitStack() as stack:
        folder = arguments.logs
        if folder is None:
            named = tempfile.TemporaryDirectory(prefix="gptj-faults-")
            folder = Path(stack.enter_context(named))
        folder.mkdir(parents=True, exist_ok=True)
        network = stack.enter_context(Network.start()) if arguments.hosts else None
        both = stack.enter_context(cluster(folder.absolute(), network))
        results: list[Result] = []
        failed: list[str] = []
        for fault in faults:
            try:
                results.append(measure(both, fault))
            # The others are compared nonetheless.
            except (RuntimeError, OSError, subprocess.TimeoutExpired, psutil.Error) as error:
                failed.append(fault)
                print(f"{fault:12} has no result: {error}", flush=True)
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
                    f"{result.fault:12} {result.steps} steps, losses off by at most "
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

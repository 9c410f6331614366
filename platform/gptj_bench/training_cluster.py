"""A tiny training run, watched and resubmitted whenever it ends, and the cluster it runs on.

The cluster's nodes are all on loopback, or each on a host of its own (gptj_local.hosts).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

from gptj_local.hosts import NamespaceHost, Network
from gptj_local.processes import LOOPBACK, Host, descendants, kill_tree, tail, within
from gptj_local.ray import LocalRay
from gptj_local.s3 import LocalS3

JOB = Path(__file__).resolve().parents[2] / "jobs" / "finetune.py"
RAY = str(Path(sys.executable).parent / "ray")
MORE = 12  # steps that a run takes after a fault
NODE_CPUS = 3
GRACE_SECONDS = 45  # of a node that Ray is told to drain
DEADLINE_SECONDS = 600.0
STARTS = 3  # of a node: Ray gives up after half a minute, which is short on a busy machine
STOPPED = 128 + signal.SIGTERM
STEP = re.compile(r"step (\d+) of \d+ \| loss")
RESUMED = re.compile(r"resuming after step (\d+) of \d+ on (\d+) workers")


class _Node(NamedTuple):
    stack: ExitStack  # closed when it goes
    process: subprocess.Popen[bytes]
    host: NamespaceHost | None


class Cluster:
    """S3, a head, and further nodes for as long as they are wanted."""

    def __init__(self, folder: Path, network: Network | None = None) -> None:
        self.folder = folder
        self._network = network
        self._clocks = False  # whether those of head and nodes can be set
        self._stack = ExitStack()
        self._s3_stack = ExitStack()
        self._nodes: list[_Node] = []
        self._count = 0
        self.s3_host = self._host()
        self.s3 = self._s3_stack.enter_context(
            LocalS3.start(folder / "s3", host=self.s3_host or LOOPBACK)
        )
        os.environ |= self.s3.environment()
        self.head: LocalRay
        self.head_host: NamespaceHost | None = None

    def _host(self) -> NamespaceHost | None:
        """A new one; None on loopback."""
        return None if self._network is None else self._network.host(clock=self._clocks)

    def with_clocks(self, wanted: bool) -> None:
        """Restart Ray on hosts whose clocks can be set, or on ordinary ones; clocks start right."""
        if wanted or self._clocks:
            self.close_ray()
            self._clocks = wanted
            self.start()

    @property
    def network(self) -> Network:
        assert self._network is not None
        return self._network

    @property
    def node_host(self) -> NamespaceHost:
        """The oldest node's."""
        host = self._nodes[0].host
        assert host is not None
        return host

    def start(self) -> None:
        self._count += 1
        folder = self.folder / f"head-{self._count}"
        folder.mkdir()
        environment = dict(os.environ)
        self.head_host = self._host()
        if self.head_host is not None:
            self._stack.callback(self.head_host.lose)
        self.head = self._stack.enter_context(
            LocalRay.start(
                folder,
                cpus=NODE_CPUS,
                environment=environment,
                more_nodes=True,
                host=self.head_host or LOOPBACK,
            )
        )

    @property
    def environment(self) -> dict[str, str]:
        """A job's, on the head."""
        of_host = {} if self.head_host is None else self.head_host.environment
        return {**os.environ, **of_host, **self.head.environment()}

    def command(self, words: Sequence[str]) -> list[str]:
        """What runs a command on the head."""
        return (self.head_host or LOOPBACK).command(words)

    def add_node(self) -> None:
        self._start_node(self._host())

    def _start_node(self, host: NamespaceHost | None) -> None:
        on: Host = host or LOOPBACK
        for left in reversed(range(STARTS)):
            self._count += 1
            stack = ExitStack()
            log = self.folder / f"node-{self._count}.log"
            try:
                process = stack.enter_context(self.head.worker(log, cpus=NODE_CPUS, host=on))
            except RuntimeError:
                if left == 0:
                    raise
                continue
            self._nodes.append(_Node(stack, process, host))
            return

    def revive_node(self) -> bool:
        """Start Ray on the oldest node's host again if it has ended, as a supervisor does."""
        node = self._nodes[0]
        if node.process.poll() is None:
            return False
        self._nodes.pop(0)
        node.stack.close()
        self._start_node(node.host)
        return True

    def nodes(self, count: int) -> None:
        """Let there be so many nodes beside the head."""
        while len(self._nodes) > count:
            self.lose_node()
        while len(self._nodes) < count:
            self.add_node()

    def lose_node(self) -> None:
        """SIGKILL to all processes of the oldest node, as when a machine is lost."""
        node = self._nodes.pop(0)
        if node.host is not None:
            node.host.lose()
        kill_tree(node.process)
        node.stack.close()

    def kill(self, name: str, *, of_head: bool = True) -> None:
        """SIGKILL to one process of the head, or of the oldest node, by its name."""
        parent = self.head.process_id if of_head else self._nodes[0].process.pid
        found = descendants(parent, name)
        if not found:
            raise RuntimeError(f"no process named {name} is running")
        found[-1].kill()

    def drain_node(self) -> None:
        """Ray's notice that the one node beside the head goes away."""
        listed = self._ray("list", "nodes", "--format=json", "--filter=state=ALIVE")
        nodes = json.loads(listed[listed.index("[") :])
        (other,) = (node["node_id"] for node in nodes if not node["is_head_node"])
        self._ray(
            *("drain-node", f"--address={self.head.address}:{self.head.port}"),
            *(
                f"--node-id={other}",
                "--reason=DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message=spot",
            ),
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
        self.s3 = self._s3_stack.enter_context(
            LocalS3.start(self.folder / "s3", again=self.s3, host=self.s3_host or LOOPBACK)
        )

    def close_ray(self) -> None:
        while self._nodes:
            self.lose_node()
        self._stack.close()

    def close(self) -> None:
        self.close_ray()
        self._s3_stack.close()


@dataclass
class Run:
    """A training run, watched and resubmitted whenever it ends."""

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
        command = self.cluster.command(
            [sys.executable, str(JOB), f"run={self.name}", *self.settings]
        )
        with self.log.open("ab") as output:
            self.job = subprocess.Popen(
                command, env=self.cluster.environment, stdout=output, stderr=output
            )
        self.submissions += 1

    def begin_fault(self) -> None:
        self._since = time.monotonic()

    def poll(self) -> None:
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
        self.poll()
        while not there():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: no {what}: {tail(self.log, 4000)}")
            time.sleep(0.2)
            self.poll()

    def go_on(self, since: int) -> None:
        """Wait for some steps beyond one."""
        self.wait(lambda: self.furthest >= since + MORE, f"step {since + MORE}")

    def go_on_resumed(self) -> None:
        self.wait(lambda: bool(self.resumed), "resumed run")
        self.go_on(self.furthest)

    def go_on_saving(self) -> None:
        """Wait for two checkpoints, and some steps beyond."""
        saved, back = self.saved, time.monotonic()
        self.wait(lambda: self.saved > saved + 1, "checkpoint")
        self.notes.append(
            f"two checkpoints saved {time.monotonic() - back:.0f} s after S3 was back"
        )
        self.go_on(self.furthest)

    def watch(self, seconds: float) -> None:
        """Let it run."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(0.2)
            self.poll()

    def terminate(self) -> None:
        within(self.job).terminate()

    def kill(self) -> None:
        """SIGKILL to the driver."""
        if self.job.poll() is None:
            within(self.job).kill()
            self.job.wait()

    def end(self) -> int:
        """SIGTERM: it saves and stops; the last step."""
        self.terminate()
        if self.job.wait(DEADLINE_SECONDS) != STOPPED:
            raise RuntimeError(f"the run {self.name} does not stop: {tail(self.log, 4000)}")
        stopped = re.findall(r"stopped after step (\d+) of", self.log.read_text())
        return int(stopped[-1])

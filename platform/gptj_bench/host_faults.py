"""Faults of a training whose nodes are on hosts of their own, for gptj_bench.training_faults.

| fault | what happens |
|---|---|
| `link-cut` | the second node's link is down for 20 s, too short for Ray to declare the node dead |
| `link-lost` | it is down for 90 s: Ray declares the node dead before it is back |
| `link-half` | for 90 s head and second node lose what they send each other; both reach S3 |
| `s3-link` | S3's link is down for 60 s: requests are neither answered nor refused |
| `commit-cut` | the second node's link is down for 90 s from the middle of a checkpoint's upload |
| `clock-ahead` | the second node's wall clock jumps an hour ahead; later a worker is killed |
| `clock-behind` | it jumps an hour back; later a worker is killed, and then the node's raylet |
| `head-ahead` | as `clock-ahead`, but the head's, where driver, controller and GCS are |
| `head-behind` | the head's clock jumps an hour back |

A cut link drops packets silently: no connection is refused or reset. If Ray ends on a node, it is
restarted, as a supervisor would do. Clocks are set by a preloaded library (gptj_local/clock.c),
since time namespaces can offset only the monotonic and boot-time clocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from gptj import storage
from gptj_bench.training_cluster import MORE, Cluster, Run
from gptj_local.hosts import NamespaceHost

CUT_SECONDS = 20.0  # shorter than Ray takes to declare a node dead
LOST_SECONDS = 90.0  # longer
S3_SECONDS = 60.0
BEHIND_SECONDS = 75.0  # Ray Train waits a minute for workers, and tries again
HOUR = 3600.0
SLOW_KILOBITS = 1000  # a second, to S3: a checkpoint takes some seconds


def _link_cut(cluster: Cluster, run: Run) -> None:
    with _cut(cluster, cluster.node_host):
        run.watch(CUT_SECONDS)
    _go_on(cluster, run)


def _link_lost(cluster: Cluster, run: Run) -> None:
    with _cut(cluster, cluster.node_host):
        run.watch(LOST_SECONDS)
    _resumed(cluster, run)


def _link_half(cluster: Cluster, run: Run) -> None:
    head, node = cluster.head_host, cluster.node_host
    assert head is not None
    cluster.network.part(head, node)
    try:
        run.watch(LOST_SECONDS)
    finally:
        cluster.network.rejoin(head, node)
    _resumed(cluster, run)


def _s3_link(cluster: Cluster, run: Run) -> None:
    assert cluster.s3_host is not None
    with _cut(cluster, cluster.s3_host):
        run.watch(S3_SECONDS)
    run.go_on_saving()


def _commit_cut(cluster: Cluster, run: Run) -> None:
    assert cluster.s3_host is not None
    before = _files(run)
    found: list[str] = []

    def begun() -> bool:
        found.extend(_uploading(_files(run) - before))
        return bool(found)

    with ExitStack() as links:
        cluster.network.throttle(cluster.s3_host, SLOW_KILOBITS)
        links.callback(cluster.network.unthrottle, cluster.s3_host)
        run.wait(begun, "upload")
        links.enter_context(_cut(cluster, cluster.node_host))
        run.watch(LOST_SECONDS)
    _resumed(cluster, run)
    run.notes.append(f"cut while {found[0]} was uploaded")


@contextmanager
def _cut(cluster: Cluster, host: NamespaceHost) -> Iterator[None]:
    """The host's link is down during the block, and up for later faults, even after an error."""
    cluster.network.cut(host)
    try:
        yield
    finally:
        cluster.network.mend(host)


def _files(run: Run) -> set[str]:
    return {file.name for file in storage.list_files(f"s3://gptj/{run.name}")}


def _uploading(files: set[str]) -> set[str]:
    """Checkpoints of which some files are there, but no rank has finished."""
    new = {name for name in files if name.startswith("checkpoint-")}
    done = {name.partition("/")[0] for name in new if "/manifest-" in name}
    return {name.partition("/")[0] for name in new} - done


def _clock_ahead(cluster: Cluster, run: Run, *, of_head: bool) -> None:
    _jump(cluster, run, of_head, HOUR)
    # The workers that replace it read S3, the lease and Ray's state under that clock.
    cluster.kill("RayTrainWorker")
    _resumed(cluster, run)
    run.notes.append("a worker was killed after the jump")


def _clock_behind(cluster: Cluster, run: Run, *, of_head: bool) -> None:
    _jump(cluster, run, of_head, -HOUR)
    if of_head:
        return
    cluster.kill("RayTrainWorker")
    run.watch(BEHIND_SECONDS)
    if not run.resumed:
        # Ray's timers on that node wait an hour, and it reports nothing until it is started again.
        run.notes.append(f"no workers within {BEHIND_SECONDS:.0f} s after one was killed")
        cluster.kill("raylet", of_head=False)
    _resumed(cluster, run)


def _jump(cluster: Cluster, run: Run, of_head: bool, ahead: float) -> None:
    """Let a clock jump, and the run go on."""
    host = cluster.head_host if of_head else cluster.node_host
    assert host is not None
    host.set_clock(ahead)
    saved = run.saved
    _go_on(cluster, run)
    run.wait(lambda: run.saved > saved + 1, "checkpoint")
    run.notes.append(f"{run.longest_pause:.1f} s without a new step after the jump")


def _resumed(cluster: Cluster, run: Run) -> None:
    """Wait until the run has resumed, and some steps more."""
    back = time.monotonic()
    _supervised(cluster, run, lambda: bool(run.resumed), "resumed run")
    run.notes.append(f"resumed {time.monotonic() - back:.0f} s later")
    _go_on(cluster, run)


def _go_on(cluster: Cluster, run: Run) -> None:
    """Wait for some steps more."""
    step = run.furthest + MORE
    _supervised(cluster, run, lambda: run.furthest >= step, f"step {step}")


def _supervised(cluster: Cluster, run: Run, there: Callable[[], bool], what: str) -> None:
    """Wait; Ray's node is started again if it ends meanwhile."""

    def reached() -> bool:
        if cluster.revive_node():
            run.notes.append("Ray's second node ended, and was started again")
        return there()

    run.wait(reached, what)


FAULTS: dict[str, Callable[[Cluster, Run], None]] = {
    "link-cut": _link_cut,
    "link-lost": _link_lost,
    "link-half": _link_half,
    "s3-link": _s3_link,
    "commit-cut": _commit_cut,
    "clock-ahead": partial(_clock_ahead, of_head=False),
    "clock-behind": partial(_clock_behind, of_head=False),
    "head-ahead": partial(_clock_ahead, of_head=True),
    "head-behind": partial(_clock_behind, of_head=True),
}
CLOCKS = frozenset({"clock-ahead", "clock-behind", "head-ahead", "head-behind"})

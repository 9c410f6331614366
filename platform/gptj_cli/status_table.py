"""A cluster's status as a table for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gptj_cli.status import Numbers, Percentiles, Status

UNKNOWN = "-"
GOOD = ("RUNNING", "HEALTHY")
PASSING = ("STARTING", "UPDATING", "DEPLOYING", "STOPPING", "DELETING", "DRAINING", "NOT_STARTED")
HEADS = ("state", "running", "waiting", "req/s", "tokens/s", "KV cache")
TIMES = ("first token p50 / p99", "latency p50 / p99")


def rendered(status: Status) -> RenderableType:
    """A row per application, its checkpoint and replicas below, then notes."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("application", no_wrap=True)
    for head in (*HEADS, *TIMES):
        table.add_column(head, justify="left" if head == "state" else "right", no_wrap=True)
    for each in status.applications:
        running = sum(replica.state == "RUNNING" for replica in each.replicas)
        state = f"{each.status} {running}/{each.target_replicas}"
        title = Text.assemble((each.name, "bold"), f" {each.route}")
        table.add_row(title, _state(state), *_cells(each.numbers))
        if each.checkpoint is not None:
            table.add_row(Text(f"  {each.checkpoint}", "dim"))
        for replica in each.replicas:
            name = f"  {replica.id} on {replica.node or 'no node yet'}"
            table.add_row(name, _state(replica.state), *_cells(replica.numbers))
    notes = [
        Text(f"{each.name}: {each.message.strip().splitlines()[-1]}")  # the end of a traceback
        for each in status.applications
        if each.message.strip()
    ]
    sick = {node: state for node, state in status.proxies.items() if state != "HEALTHY"}
    notes += [Text(f"proxy on {node}: {state}", "red") for node, state in sick.items()]
    notes += [Text(f"not read: {problem}", "yellow") for problem in status.problems]
    over = "since the start" if status.seconds is None else f"of the last {status.seconds:.0f} s"
    return Group(table, *notes, Text(f"rates and percentiles {over}", "dim"))


def _cells(numbers: Numbers) -> list[str]:
    cache = numbers.cache_share
    return [
        _count(numbers.running),
        _count(numbers.waiting),
        _rate(numbers.requests_per_second),
        _rate(numbers.tokens_per_second),
        UNKNOWN if cache is None else f"{cache:.0%}",
        _times(numbers.first_token_seconds),
        _times(numbers.request_seconds),
    ]


def _state(state: str) -> Text:
    word = state.partition(" ")[0]
    return Text(state, "green" if word in GOOD else "yellow" if word in PASSING else "red")


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else str(value)


def _rate(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _times(times: Percentiles | None) -> str:
    return UNKNOWN if times is None else f"{_seconds(times.p50)} / {_seconds(times.p99)}"


def _seconds(value: float) -> str:
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s"

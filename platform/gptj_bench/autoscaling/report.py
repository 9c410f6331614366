"""Report a simulated day: rows of numbers, a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj_bench.autoscaling.simulation import Outcome

Row = dict[str, Any]
PERCENTILES = (50, 90, 99, 99.9)
SLOW_SECONDS = 1.0


def summary(outcome: Outcome) -> Row:
    """Time to first token over all served requests, and the replicas used."""
    times, waits = first_tokens(outcome)
    replicas = np.array([each.running + each.ending for each in outcome.moments])
    row: Row = {
        "requests": len(outcome.requests),
        "served": len(times),
        "refused": sum(request.refused for request in outcome.requests),
    }
    row |= {f"ttft_p{q:g}_s": round(float(np.percentile(waits, q)), 3) for q in PERCENTILES}
    row["ttft_max_s"] = round(float(waits.max()), 3)
    row[f"ttft_above_{SLOW_SECONDS:g}s_percent"] = round(
        100 * float((waits > SLOW_SECONDS).mean()), 3
    )
    row["replicas_mean"] = round(float(replicas.mean()), 2)
    row["replicas_max"] = int(replicas.max())
    row["replica_hours"] = round(outcome.replica_seconds / 3600, 2)  # including starting ones
    changes = np.diff([each.target for each in outcome.moments])
    row["starts"] = int(changes[changes > 0].sum())
    return row


def intervals(outcome: Outcome, seconds: float = 300) -> list[Row]:
    """The same as `summary`, by time of day."""
    times, waits = first_tokens(outcome)
    rows = []
    for start in np.arange(0, max(times.max(), outcome.moments[-1].time), seconds):
        inside = waits[(times >= start) & (times < start + seconds)]
        moments = [each for each in outcome.moments if start <= each.time < start + seconds]
        row: Row = {"from_s": float(start), "requests_per_s": round(len(inside) / seconds, 2)}
        if len(inside):
            row["ttft_p50_s"] = round(float(np.percentile(inside, 50)), 3)
            row["ttft_p99_s"] = round(float(np.percentile(inside, 99)), 3)
        if moments:
            row["replicas_mean"] = round(float(np.mean([each.running for each in moments])), 2)
            row["target_max"] = max(each.target for each in moments)
            row["queued_max"] = max(each.queued for each in moments)
        rows.append(row)
    return rows


def first_tokens(outcome: Outcome) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Arrival times of served requests, and their times to first token, in seconds."""
    served = [request for request in outcome.requests if not request.refused]
    if not served:
        raise ValueError("no request was served: the traffic is empty, or all were refused")
    times = np.array([request.arrival for request in served])
    return times, np.array([request.first for request in served]) - times


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with a column per name."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    lines += [[str(row.get(name, "")) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(outcome: Outcome, path: Path, title: str) -> None:
    """Plot requests, replicas and time to first token over the day."""
    from matplotlib.figure import Figure

    rows = intervals(outcome)
    hours = [row["from_s"] / 3600 for row in rows]
    figure = Figure(figsize=(10, 8), layout="constrained")
    traffic, replicas, waits = figure.subplots(3, sharex=True)
    traffic.step(hours, [row["requests_per_s"] for row in rows], where="post")
    traffic.set_ylabel("requests per second")
    traffic.set_title(title)
    moments = outcome.moments
    clock = [each.time / 3600 for each in moments]
    replicas.step(clock, [each.target for each in moments], where="post", label="wanted")
    replicas.step(clock, [each.running for each in moments], where="post", label="running")
    replicas.set_ylabel("replicas")
    replicas.legend()
    for name in ("ttft_p50_s", "ttft_p99_s"):
        waits.plot(hours, [row.get(name, np.nan) for row in rows], label=name)
    waits.set_yscale("log")
    waits.set_ylabel("seconds to first token")
    waits.set_xlabel("hour")
    waits.legend()
    figure.savefig(path)

"""An evaluation's result, as `jobs.evaluate.measure` returns it, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

MAX_COLUMNS = 12  # labels of a confusion matrix that a terminal has room for
SCORES = ("precision", "recall", "f1")


def rendered(result: Mapping[str, Any]) -> RenderableType:
    """The metrics; for a classifier, scores by label, and a confusion matrix if not too wide."""
    parts: list[RenderableType] = [_metrics(result)]
    if classes := result.get("classes"):
        parts += ["", _by_label(classes)]
    if (confusion := result.get("confusion_matrix")) is not None:
        labels = result["labels"]
        wide = len(labels) > MAX_COLUMNS
        note = f"a confusion matrix of {len(labels)} labels is in the output of --json"
        parts += ["", Text(note, "dim") if wide else _confusion(labels, confusion)]
    return Group(*parts)


def _metrics(result: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in result.items():
        if not isinstance(value, dict | list):
            table.add_row(Text(name), Text(_shown(value)))
    return table


def _by_label(classes: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("label")
    for name in (*SCORES, "rows"):
        table.add_column(name, justify="right")
    for label, scores in classes.items():
        shares = [f"{scores[name]:.3f}" for name in SCORES]
        table.add_row(Text(label), *shares, str(scores["support"]))
    return table


def _confusion(labels: list[str], confusion: list[list[int]]) -> Table:
    """Rows are the true labels, columns the predicted ones."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("true \\ predicted")
    for label in labels:
        table.add_column(Text(label), justify="right")
    for number, (label, counts) in enumerate(zip(labels, confusion, strict=True)):
        cells = [Text(str(count), "bold" if n == number else "") for n, count in enumerate(counts)]
        table.add_row(Text(label), *cells)
    return table


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

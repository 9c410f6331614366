"""The results of a check: JSON lines, each on disk as soon as it is added."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"
Row = dict[str, Any]


class Results:
    """What one part of the check adds to OUT/results.jsonl.

    A line has the part, what was measured (`what`), and when; `right` says of a check how it went.
    """

    def __init__(self, out: Path, part: str) -> None:
        self._path = out / RESULTS
        self._part = part
        self._start = time.monotonic()

    def add(self, what: str, **values: Any) -> Row:
        seconds = round(time.monotonic() - self._start, 2)
        row = {"part": self._part, "what": what, "at_s": seconds, **_plain(values)}
        line = json.dumps(row)
        print(line, flush=True)
        with open(self._path, "a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        return row

    def all(self) -> list[Row]:
        """Of all parts, so far."""
        return read(self._path.parent)

    def good(self) -> bool:
        """Whether every part was done, and no check was wrong."""
        rows = self.all()
        parts = all(row["outcome"] == "done" for row in rows if row["what"] == "part")
        return parts and not any(row.get("right") is False or "error" in row for row in rows)


def read(out: Path) -> list[Row]:
    """The lines; a last one that was cut off is left out."""
    path = out / RESULTS
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _plain(value: Any) -> Any:
    """As JSON has it: numbers to four digits, and no NaN."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)

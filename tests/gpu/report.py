"""The results of a check as Markdown tables, with the card's name, and the goals beside them.

python tests/gpu/report.py OUT      prints them, and writes OUT/report.md
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import Row, read

REPORT = "report.md"

# On one H100, for the 6B: by what is measured, and for which case.
GOALS: dict[tuple[str, int], str] = {
    ("decode", 1): "230 tokens/s or more (TensorRT-LLM in fp8: 185)",
    ("decode", 64): "8,000 tokens/s or more (TensorRT-LLM in fp8: 10,907)",
    ("prefill", 2048): "0.55 of the matrix peak or more",
    ("beams", 4): "36 samples/s or more (best published: 35.8)",
}

# A table for each kind of line: what, title, columns.
TABLES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("memory", "Memory", ("when", "free_gb", "allocated_gb", "reserved_gb", "peak_allocated_gb")),
    (
        "nearly all memory",
        "Nearly all memory for the cache",
        ("when", "tokens", "gb", "streams", "free_gb", "peak_reserved_gb", "tokens_per_s", "right"),
    ),
    ("loading from a file", "Loading from a file", ("seconds", "gb_per_s", "hashes_compared")),
    (
        "decode",
        "Decode",
        (
            *(
                "engine",
                "dtype",
                "sampling",
                "batch",
                "max_num_batched_tokens",
                "prompt_tokens",
                "new_tokens",
            ),
            *("tokens_per_s", "decode_tokens_per_s", "step_ms", "share_of_memory_limit"),
            *("share_by_weights_alone", "goal"),
        ),
    ),
    (
        "attention of groups",
        "Attention of beams",
        (
            *("cache", "rows", "together", "shared_tokens", "context", "groups", "ms"),
            "share_of_read_bandwidth",
        ),
    ),
    (
        "prefill",
        "Prefill",
        ("dtype", "tokens", "ms", "tokens_per_s", "tflops", "share_of_matrix_peak", "goal"),
    ),
    (
        "beams",
        "Beams",
        (
            *("dtype", "samples", "beams", "prompt_tokens", "new_tokens", "samples_per_s", "steps"),
            "goal",
        ),
    ),
    (
        "pauses",
        "Between the tokens of a stream",
        ("streams", "max_num_batched_tokens", "when", "p50_ms", "p95_ms", "p99_ms", "most_ms"),
    ),
    (
        "product",
        "Matrix products",
        (
            *("matrix", "rows", "kind", "ms", "gb_per_s", "share_of_read_bandwidth"),
            *("tflops", "share_of_matrix_peak", "relative_error"),
        ),
    ),
    (
        "quantized product",
        "Products with quantized weights",
        (
            *("bits", "matrix", "rows", "kind", "ms", "gb_per_s", "share_of_read_bandwidth"),
            "relative_error",
        ),
    ),
    (
        "fp8 product",
        "Products in fp8, with quantizing the activations",
        (
            *("matrix", "rows", "kind", "ms", "gb_per_s", "share_of_read_bandwidth", "tflops"),
            "relative_error",
        ),
    ),
    (
        "quantized steps",
        "Steps with quantized weights",
        ("kind", "step", "difference", "from_fp16", "same"),
    ),
    ("making a runner", "Making a runner", ("dtype", "seconds", "weights_gb")),
    (
        "attention of single tokens",
        "Attention of single tokens",
        ("cache", "rows", "context", "way", "ms", "gb_per_s", "share_of_read_bandwidth", "missing"),
    ),
    (
        "attention of a prompt",
        "Attention of a prompt",
        ("tokens", "way", "ms", "tflops", "share_of_matrix_peak", "missing"),
    ),
    ("copies of pages", "Copies of pages", ("pages", "layers", "ms", "gb_per_s")),
    ("sampling", "Sampling", ("params", "rows", "logits", "ms", "copying_ms")),
    ("consumers", "Threads that take tokens", ("threads", "tokens_per_s", "with_one_thread")),
    (
        "one layer",
        "Training: one layer, forward and backward",
        ("dtype", "rows", "tokens", "recomputing", "ms", "tflops", "share_of_matrix_peak"),
    ),
    (
        "memory of training",
        "Training: memory",
        ("layers", "rows", "tokens", "recomputing", "estimate_gb", "peak_allocated_gb", "ms"),
    ),
    (
        "training",
        "Training: losses beside the CPU's",
        ("variant", "optimizer", "steps", "largest_difference", "seconds", "right"),
    ),
    ("failed test", "Failed tests", ("part", "test", "message")),
    (
        "suite",
        "Tests",
        ("tests", "failures", "errors", "skipped", "test_seconds", "outcome", "slowest"),
    ),
    (
        "compute-sanitizer",
        "compute-sanitizer",
        (
            *("tool", "tests", "failures", "errors", "sanitizer_errors", "races"),
            *("races_elsewhere", "test_seconds", "outcome", "missing"),
        ),
    ),
)
# Lines that are shown whole.
PLAIN = (
    *("versions", "card", "settings", "read bandwidth", "matrix peak", "wheels"),
    *("making the model", "fusing, compiling, measuring and capturing", "first token", "cache"),
    *("a step fails", "greedy text equals generate in fp32"),
)
# Of a profile, with a table of their own parts.
PROFILES = (
    *(("decode step", "kernels"), ("beam step", "kernels"), ("prefill step", "kernels")),
    ("host time", "functions"),
)


def main() -> None:
    out = Path(sys.argv[1])
    print(write(out))


def write(out: Path) -> str:
    """Markdown, which is written to OUT/report.md as well."""
    rows = read(out)
    text = "\n".join(_lines(rows)) + "\n"
    (out / REPORT).write_text(text)
    return text


def _lines(rows: Sequence[Row]) -> list[str]:
    by_what: dict[str, list[Row]] = {}
    for row in rows:
        by_what.setdefault(row["what"], []).append(row)
    card = by_what.get("card", [{}])[-1].get("name", "no card")
    lines = [f"# GPU check: {card}", ""]
    parts = by_what.get("part", [])
    lines += _table(parts, ("of", "outcome", "seconds", "limit", "exit_code"))
    wrong = [row for row in rows if row.get("right") is False or "error" in row]
    lines += ["", f"Checked: {sum('right' in row for row in rows)}; wrong or failed: {len(wrong)}"]
    for row in wrong:
        lines.append(f"- {_short(row)}")
    lines += ["", "## Goals: one H100, 6B in fp16", "", *_goals(by_what)]
    for what in PLAIN:
        for row in by_what.get(what, []):
            lines += ["", f"**{what}**: {_short(row)}"]
    lines += ["", "## Correctness at 6B's widths", "", *_correctness(rows)]
    for what, title, columns in TABLES:
        if found := by_what.get(what):
            shown = [{**row, "goal": _goal(row)} for row in found]
            lines += ["", f"## {title} ({card})", "", *_table(shown, columns)]
    for what, parts_of in PROFILES:
        for row in by_what.get(what, []):
            rest = {key: value for key, value in row.items() if key != parts_of}
            lines += ["", f"## Profile: {what} ({card})", "", _short(rest), ""]
            inner = row.get(parts_of) or []
            lines += _table(inner, tuple(inner[0]) if inner else ())
    logs = by_what.get("log", [])
    lines += ["", "## What the library logged", ""]
    lines += [f"- {row['part']}: {row['message']}" for row in logs]
    return lines


def _goals(by_what: dict[str, list[Row]]) -> list[str]:
    """The best of what was measured, beside each goal."""
    found = []
    for (what, case), goal in GOALS.items():
        rows = [row for row in by_what.get(what, []) if _case(row) == case and "error" not in row]
        rows = [row for row in rows if _has_goal(row) and _figure(row)]
        best = max(rows, key=_figure, default=None)
        measured = "not measured" if best is None else f"{_figure(best):.4g}"
        settings = (
            ""
            if best is None
            else f"max_num_batched_tokens={best.get('max_num_batched_tokens', '')}"
        )
        found.append(
            {
                "goal": f"{what} {case}: {goal}",
                "measured": measured,
                "with": settings if settings != "max_num_batched_tokens=" else "",
            }
        )
    return _table(found, ("goal", "measured", "with"))


def _case(row: Row) -> Any:
    names = {"decode": "batch", "prefill": "tokens", "beams": "beams"}
    return row.get(names.get(row["what"], ""))


def _figure(row: Row) -> float:
    names = {"decode": "tokens_per_s", "beams": "samples_per_s", "prefill": "share_of_matrix_peak"}
    figure = row.get(names[row["what"]], 0.0)
    return figure if isinstance(figure, int | float) else 0.0  # NaN is a word


def _goal(row: Row) -> str:
    return GOALS.get((row["what"], _case(row)), "") if _has_goal(row) else ""


def _has_goal(row: Row) -> bool:
    ours = {"engine": "gptj", "dtype": "fp16", "sampling": "greedy"}
    return all(row.get(name, value) == value for name, value in ours.items())


def _correctness(rows: Sequence[Row]) -> list[str]:
    """A line for each claim and dtype: how often it was checked, how often it held."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["part"] == "correctness" and ("right" in row or "difference" in row):
            found.setdefault((row["what"], row.get("dtype", "")), []).append(row)
    table = []
    for (what, dtype), each in found.items():
        differences = [row["difference"] for row in each if "difference" in row]
        numbers = [value for value in differences if isinstance(value, int | float)]
        table.append(
            {
                "what": what,
                "dtype": dtype,
                "checked": len(each),
                "right": sum(row["right"] for row in each) if "right" in each[0] else "",
                "largest difference": max(numbers, default=""),
                "rows": ", ".join(str(row["rows"]) for row in each if "rows" in row),
            }
        )
    return _table(table, ("what", "dtype", "checked", "right", "largest difference", "rows"))


def _table(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Of the columns those that some row has; errors and what was left out in the last one."""
    shown = [{**row, "note": row.get("error") or row.get("skipped") or ""} for row in rows]
    used = [name for name in (*columns, "note") if any(row.get(name, "") != "" for row in shown)]
    if not used:
        return []
    lines = [used, ["---"] * len(used)]
    lines += [[_cell(row.get(name, "")) for name in used] for row in shown]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "/").replace("\n", " ")


def _short(row: Row) -> str:
    """A line's values, the long ones cut."""
    return "; ".join(f"{name} {_cell(value)[:200]}" for name, value in row.items())


if __name__ == "__main__":
    main()

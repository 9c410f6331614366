"""The tests of what runs on a GPU, on it; without Ray, S3 and what only other tests need."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import outcomes
from checking import Check, run
from results import Row

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
# The most important first: they run in this order.
FILES = (
    *("test_cuda_kernels", "test_cuda_quantized", "test_cuda_sampling", "test_cuda_runner"),
    *(
        "test_cuda_quantized_runner",
        "test_cuda_fp8",
        "test_cuda_fp8_cache",
        "test_runner",
        "test_engine",
    ),
    *("test_cache_size", "test_model", "test_generation"),
)
# Of the kernels and the GPU's runner all; of the others the GPU's cases. CPUs have their own tests.
NAMES = "(test_cuda or [cuda or [triton or fused_kernels) and not [cpu"
REHEARSED = "copied_pages"
WORKERS = 10
GRACE_SECONDS = 4  # for a summary, when the time is over


def main(check: Check) -> None:
    names = check.pick(NAMES, REHEARSED)
    ran = run_tests(check, FILES, names, check.seconds_left - 2 - GRACE_SECONDS)
    check.add("suite", **ran.row, **judged(ran.right))


@dataclass(frozen=True)
class Ran:
    """What came of some tests."""

    row: Row  # for the results
    exit_code: int | None  # None if they were stopped
    output: str

    @property
    def right(self) -> bool | None:
        """None if nothing was wrong with what was done when the time ended."""
        if self.row["failures"] or self.row["errors"]:
            return False
        return None if self.exit_code is None else self.exit_code == 0


def judged(right: bool | None) -> Row:
    return {} if right is None else {"right": right}


def run_tests(
    check: Check,
    files: tuple[str, ...],
    names: str,
    seconds: float,
    before: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
) -> Ran:
    """Run tests by pytest. Failures are results at once.

    Args:
        names: pytest's -k.
        seconds: after which it is stopped.
        before: the beginning of the command: a program that runs another.
    """
    command = [*before, sys.executable, "-m", "pytest", "-q", "-o", "addopts="]
    command += ["-p", "no:cacheprovider", "-p", outcomes.__name__, "-W", "ignore", "--tb=short"]
    if not before and not check.rehearsal and importlib.util.find_spec("xdist"):
        command += ["-n", str(WORKERS)]
    command += [str(path) for name in files for path in REPOSITORY.glob(f"tests/*/{name}.py")]
    command += ["-k", f"({names}) and not compile_for"]
    with tempfile.TemporaryDirectory() as folder:
        log, found = Path(folder) / "log.txt", Path(folder) / "outcomes.jsonl"
        variables = {
            # A worker's are not its subprocess's.
            **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST_")},
            **(environment or {}),
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
            outcomes.OUTCOMES: str(found),
            outcomes.RESULTS: str(check.out),
            outcomes.PART: check.part,
            "OMP_NUM_THREADS": "1",  # or all workers' threads are in each other's way
        }
        with log.open("wb") as file:  # a pipe would be waited for as long as anybody holds it
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=variables, stdout=file, stderr=file
            )
            code = _wait(process, max(seconds, 1))
        output = log.read_text(errors="replace")
        print(output)
        row = {
            "files": files,
            "names": names,
            "exit_code": code,
            "outcome": "no time left" if code is None else "ended",
            "tail": output[-600:],
            **_counts(found),
        }
        return Ran(row, code, output)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code; None if the time ended first. Then pytest may still print its summary."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return None


def _counts(path: Path) -> Row:
    lines = path.read_text().splitlines() if path.exists() else []
    rows: list[Row] = [json.loads(line) for line in lines]
    counts = Counter(row["outcome"] for row in rows)
    failed = [f"{row['test']}: {row['message']}" for row in rows if "message" in row]
    slowest = sorted(rows, key=lambda row: float(row["seconds"]), reverse=True)[:5]
    return {
        "tests": len({row["test"] for row in rows}),
        "failures": counts["failed"],
        "errors": counts["error"],
        "skipped": counts["skipped"],
        "test_seconds": sum(float(row["seconds"]) for row in rows),
        "failed_tests": failed[:30],
        "slowest": {row["test"].rpartition("/")[2]: row["seconds"] for row in slowest},
    }


if __name__ == "__main__":
    run(main)

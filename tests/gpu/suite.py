"""The tests of what runs on a GPU, on it; without Ray, S3 and what only other tests need."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from checking import Check, run

REPOSITORY = Path(__file__).resolve().parents[2]
# Those with kernels first; of others what has a device in its name.
FILES = (
    *("test_cuda_kernels", "test_cuda_quantized", "test_cuda_runner", "test_runner"),
    *("test_engine", "test_generation", "test_model", "test_cache_size"),
)
WORKERS = 8


def main(check: Check) -> None:
    files = check.pick(FILES, ("test_cuda_kernels",))
    names = "copied_pages" if check.rehearsal else "cuda or kernels or triton or plain or gpu"
    run_tests(check, "suite", files, names, check.seconds_left - 5)


def run_tests(
    check: Check,
    what: str,
    files: tuple[str, ...],
    names: str,
    seconds: float,
    before: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
) -> None:
    """Run tests by pytest and add what came of them.

    Args:
        names: pytest's -k.
        before: the beginning of the command: a program that runs another.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*before, sys.executable, "-m", "pytest", "-q", "-o", "addopts="]
        command += ["-p", "no:cacheprovider", "-W", "ignore", "--tb=short", f"--junitxml={report}"]
        if not before and not check.rehearsal and importlib.util.find_spec("xdist"):
            command += ["-n", str(WORKERS)]
        command += [str(*REPOSITORY.glob(f"tests/*/{name}.py")) for name in files]
        command += ["-k", f"({names}) and not compile_for"]
        log = Path(folder) / "log.txt"
        with log.open("wb") as file:  # a pipe would be waited for as long as anybody holds it
            try:
                code: int | None = subprocess.run(
                    command,
                    cwd=REPOSITORY,
                    env={**os.environ, **(environment or {})},
                    stdout=file,
                    stderr=file,
                    timeout=max(seconds, 1),
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        output = log.read_text(errors="replace")
        print(output)
        errors = re.findall(r"ERROR SUMMARY: (\d+) error", output)
        row = {
            "files": files,
            "names": names,
            "exit_code": code,
            "outcome": "ended" if code is not None else "no time left",
            "tail": output[-600:],
            **_counts(report),
        }
        if before:
            row["sanitizer_errors"] = sum(map(int, errors)) if errors else None
            row["command"] = " ".join(before)
        # Nothing was wrong with what was done when the time ended.
        check.add(what, **row, **({"right": code == 0} if code is not None else {}))


def _counts(report: Path) -> dict[str, object]:
    if not report.exists():
        return {}
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}: {(bad.get('message') or '')[:300]}"
        for case in suite.iter("testcase")
        for bad in (*case.findall("failure"), *case.findall("error"))
    ]
    seconds = float(suite.get("time", 0))
    return {**counts, "test_seconds": seconds, "failed_tests": failed[:30]}


if __name__ == "__main__":
    run(main)

"""Run the parts of the check, each in a process of its own; see check.sh.

The parts stand in the order of their worth. A crash, a time-out or the end of the time costs one
part, and is itself a line of the results. Only the standard library is imported here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

import report
from results import Results

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
MIN_SECONDS = 8  # of a part: less is not worth its start
GRACE_SECONDS = 3  # of a part whose time is over
LOG_BYTES = 8 * 2**20
INSTALL_SECONDS = 60
SHOWN = 10_000  # characters of the report: parts, goals and correctness come first


@dataclass(frozen=True)
class Part:
    """A script beside this one."""

    name: str
    seconds: int  # at most, on a GPU
    usual: int = 0  # that it takes on an H100: they are kept for it by the parts before


PARTS = (
    Part("card", 30, usual=12),  # versions, bandwidth, matrix peak: what all shares are of
    Part("loading", 60, usual=32),
    Part("correctness", 80, usual=38),
    Part("speed", 110, usual=56),
    Part("fp8", 110, usual=70),
    Part("quantized", 90, usual=45),
    Part("steps", 30, usual=16),  # a profile
    Part("suite", 110, usual=55),  # the tests of the GPU's code
    Part("operators", 70, usual=25),
    Part("stress", 40, usual=10),
    Part("training", 120, usual=45),
    Part("peers", 45, usual=36),
    Part("sanitizer", 60, usual=30),
)


class Stopped(Exception):
    """Somebody ends the check."""


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every part was done and nothing that was checked was wrong, else 1."""
    given = _arguments(arguments)
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, _stop)
    given.out.mkdir(parents=True, exist_ok=True)
    for before in ("results.jsonl", "log.txt", report.REPORT, "trace-*"):
        for path in given.out.glob(before):
            path.unlink()
    results = Results(given.out, "check")
    end = time.monotonic() + given.seconds
    chosen = [part for part in PARTS if not given.only or part.name in given.only]
    results.add("begins", parts=[part.name for part in chosen], rehearsal=given.rehearse)
    with (
        tempfile.TemporaryDirectory(prefix="gptj-check-", dir=_writable(given.out)) as folder,
        open(given.out / "log.txt", "ab", buffering=0) as log,
    ):
        try:
            environment = _environment(Path(folder), given, results, log)
            for number, part in enumerate(chosen):
                limit = end - time.monotonic()
                if not given.rehearse:
                    limit = limit_of(part, chosen[number + 1 :], limit)
                _run(part, limit, environment, given.out, results, log)
        except Stopped:
            results.add("stopped")
    print(report.write(given.out)[:SHOWN])
    return 0 if results.good() else 1


def limit_of(part: Part, later: Sequence[Part], left: float) -> float:
    """Seconds for a part: what the later ones leave or, if that is too little, its share."""
    kept = sum(each.usual for each in later)
    share = left * part.usual / max(part.usual + kept, 1)
    return min(part.seconds, max(left - kept, share))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/gpu/check.sh", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[])
    parser.add_argument("--seconds", type=float, default=470)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args(arguments)
    if unknown := set(given.only) - {part.name for part in PARTS}:
        parser.error(f"--only: there is no part {', '.join(sorted(unknown))}")
    given.out = given.out.resolve()
    return given


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped


def _run(
    part: Part,
    limit: float,
    environment: dict[str, str],
    out: Path,
    results: Results,
    log: IO[bytes],
) -> None:
    """One part, until it ends or its time does; how it went is a line of the results."""
    if limit < MIN_SECONDS:
        results.add("part", of=part.name, outcome="no time left", seconds=0)
        return
    log.write(f"\n==== {part.name}\n".encode())
    begin, start = log.seek(0, os.SEEK_END), time.monotonic()
    # Its own end comes a little before ours, so that it can choose what to leave out.
    own = {**environment, "GPTJ_CHECK_SECONDS": str(limit - 3)}
    process = subprocess.Popen(
        [sys.executable, "-u", str(HERE / f"{part.name}.py"), str(out)],
        cwd=REPOSITORY,
        env=own,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    outcome: dict[str, Any] = {"outcome": "done"}
    try:
        if code := process.wait(timeout=limit):
            outcome = {"outcome": "failed", "exit_code": code, "log": _tail(out, begin)}
    except subprocess.TimeoutExpired:
        outcome = {"outcome": "time-out", "log": _tail(out, begin)}
    finally:
        _end(process)
    seconds = round(time.monotonic() - start, 1)
    results.add("part", of=part.name, seconds=seconds, limit=round(limit, 1), **outcome)
    _shorten(out / "log.txt")


def _end(process: subprocess.Popen[bytes]) -> None:
    """A process and all that it has started, which get a moment to unlock what they hold."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(
    folder: Path, given: argparse.Namespace, results: Results, log: IO[bytes]
) -> dict[str, str]:
    """Of the parts: everything that is written goes to the folder, and nothing is fetched."""
    paths = [REPOSITORY / "platform", REPOSITORY, REPOSITORY / "tests/support"]
    programs = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    if given.wheels is not None:
        site = folder / "site"
        _install(given.wheels, site, results, log)
        paths.append(site)
        programs.append(str(site / "bin"))  # ninja, with which DeepSpeed compiles
    before = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*([before] if before else []), *map(str, paths)]),
        "PATH": os.pathsep.join(programs),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(folder),
        "HF_HUB_OFFLINE": "1",
        "GPTJ_CHECK_REHEARSE": "1" if given.rehearse else "",
    }
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "MPLCONFIGDIR"):
        environment[name] = str(folder / name.lower())
    if given.rehearse:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        environment |= _as_on_the_machine(environment["PYTHONPATH"])
    else:  # extensions that a rehearsal compiles are kept with those of other tests
        environment["TORCH_EXTENSIONS_DIR"] = str(folder / "torch_extensions")
    if not os.access(os.path.expanduser("~"), os.W_OK):
        environment["HOME"] = str(folder)
    return environment


def _as_on_the_machine(pythonpath: str) -> dict[str, str]:
    """Hides the packages that only this environment has."""
    import machine  # needs `packaging`, which nothing else of the check does

    return {
        "PYTHONPATH": os.pathsep.join([str(HERE / "rehearsed"), pythonpath]),
        "GPTJ_CHECK_HIDDEN": json.dumps(machine.hidden()),
    }


def _install(wheels: Path, site: Path, results: Results, log: IO[bytes]) -> None:
    """Unpack the wheels where the parts look; one that does not fit is left out, and named."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    command += ["--no-compile", "--no-cache-dir", "--disable-pip-version-check", "--target"]
    start = time.monotonic()
    found = sorted(wheels.glob("*.whl"))
    failed = []
    try:
        if not _ends_well([*command, str(site), *map(str, found)], log):
            shutil.rmtree(site, ignore_errors=True)
            one_by_one = {each.name: [*command, str(site), str(each)] for each in found}
            failed = [name for name, each in one_by_one.items() if not _ends_well(each, log)]
    except (OSError, subprocess.TimeoutExpired) as error:
        failed = [repr(error)]
    seconds = round(time.monotonic() - start, 1)
    results.add("wheels", count=len(found), failed=failed, seconds=seconds)


def _ends_well(command: list[str], log: IO[bytes]) -> bool:
    return subprocess.run(command, stdout=log, stderr=log, timeout=INSTALL_SECONDS).returncode == 0


def _writable(out: Path) -> str:
    """A folder for caches and models: not in OUT, whose size is limited, if there is another."""
    for folder in (os.environ.get("TMPDIR"), "/tmp", "/var/tmp", "/dev/shm"):
        if folder and os.access(folder, os.W_OK):
            return folder
    return str(out)


def _tail(out: Path, begin: int, most: int = 2000) -> str:
    with open(out / "log.txt", "rb") as file:
        file.seek(max(begin, file.seek(0, os.SEEK_END) - most))
        return file.read().decode(errors="replace")


def _shorten(path: Path) -> None:
    if path.stat().st_size > LOG_BYTES:
        content = path.read_bytes()[-LOG_BYTES // 2 :]
        path.write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())

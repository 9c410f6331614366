"""Command lines of a job, one after the other in one process that connects to a cluster once.

Starting a program, and its connection, cost seconds; the first time a job runs in a test, it should
be the program itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import contextlib, importlib, io, json, logging, sys
import ray
job = importlib.import_module(sys.argv[1])
ray.init(logging_level=logging.WARNING)
ray.init = lambda **_: None
for line in sys.stdin:
    sys.argv = [job.__file__, *json.loads(line)]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            job.main()
        except SystemExit as ended:
            status = ended.code
            if isinstance(status, str):  # as Python ends with a message
                print(status, file=sys.stderr)
                status = 1
    print("reply", json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""


class Reply(NamedTuple):
    """What a command line has come to."""

    status: int
    stdout: str
    stderr: str


def run_in_turn(
    job: str, commands: Sequence[Sequence[str]], environment: Mapping[str, str], folder: Path
) -> list[Reply]:
    """Have `job`, such as jobs.finetune, do what each command line says, in a working folder."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, job],
        input="".join(json.dumps([*words]) + "\n" for words in commands),
        env={**environment, "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line.partition(" ") for line in done.stdout.splitlines()]  # Ray prints others
    replies = [Reply(*json.loads(reply)) for word, _, reply in lines if word == "reply"]
    assert len(replies) == len(commands), done.stdout
    return replies

"""What the jobs' command lines share."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import logging
from gptj_jobs import command_line
command_line.log_to_stderr("job")
for name in ("gptj.interop", "job", "botocore.credentials"):
    logging.getLogger(name).info("info of %s", name)
    logging.getLogger(name).warning("warning of %s", name)
"""


def test_only_warnings_of_other_libraries_are_logged() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "info of gptj.interop",
        "warning of gptj.interop",
        "info of job",
        "warning of job",
        "warning of botocore.credentials",
    ]

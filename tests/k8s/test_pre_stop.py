"""The preStop hook of a training's head, in a process namespace: it signals all drivers it sees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptj_local.hosts import obstacle

pytestmark = pytest.mark.slow  # programs run

DRIVER = """
import signal, sys, time
from pathlib import Path
out = Path(sys.argv[1])
def save(number, frame):
    time.sleep(1)
    out.write_text("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
out.write_text("training")
time.sleep(60)
"""
# A shell with the program in its command, as Ray starts it; a second driver; another program.
SCRIPT = """
cd "$1"
bash -c 'python jobs/finetune.py first; echo $? > first.status' &
python "$1/jobs/finetune.py" second x=y &
python other.py other &
until test -e first && test -e second && test -e other; do sleep 0.1; done
python -m gptj_jobs.pre_stop
cat first second other
"""


@pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
def test_a_heads_drivers_save_before_its_pod_ends(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    for name in ("jobs/finetune.py", "other.py"):
        (tmp_path / name).write_text(DRIVER)
    command = ["unshare", "--pid", "--mount-proc", "--fork", "--kill-child"]
    if os.getuid() != 0:
        command[1:1] = ["--user", "--map-root-user"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    found = subprocess.run(
        [*command, "bash", "-c", SCRIPT, "bash", str(tmp_path)],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == "savedsavedtraining"

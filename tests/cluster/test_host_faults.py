"""A training on two hosts outlasts a cut link: see gptj_bench.host_faults."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from marked_processes import MARK, marked

from gptj_local.hosts import obstacle

# Nightly: minutes, most of which training takes to show that it goes on.
pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1000)]


def test_a_cut_link_to_a_node_costs_only_time(tmp_path: Path) -> None:
    """All losses equal an undisturbed run's, and nothing is left of the hosts."""
    if why := obstacle():
        pytest.skip(why)
    mark, out = secrets.token_hex(8), tmp_path / "results.jsonl"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "gptj_bench.training_faults", "--hosts"),
            *("--faults", "link-cut", "--json", str(out)),
        ],
        env={**os.environ, MARK: mark},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = map(json.loads, out.read_text().splitlines())
    assert result["off"] == 0
    assert result["seconds"] >= 20, "the cut was not felt"
    assert "all complete" in " ".join(result["notes"])
    assert not marked(mark)

"""A real Prometheus that scrapes one local address."""

from __future__ import annotations

import os
import shutil
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from gptj_local.processes import HOST, free_ports, running, tail

START_SECONDS = 60


@contextmanager
def prometheus(folder: Path, target: str, **labels: str) -> Iterator[str]:
    """Its address; it scrapes `target` (HOST:PORT) each second, and adds the labels."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus; remedy: apt-get install prometheus")
    scrape = {"job_name": "ray", "static_configs": [{"targets": [target], "labels": labels}]}
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    log = folder / "prometheus.log"
    command = [
        program,
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--web.listen-address={HOST}:{port}",
    ]
    with running(command, environment=os.environ, log=log, grace_seconds=5) as process:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"http://{HOST}:{port}/-/ready", timeout=5):
                    break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, tail(log)
                time.sleep(0.2)
        yield f"http://{HOST}:{port}"

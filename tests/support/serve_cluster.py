"""`serve run` of k8s/base/serve.yaml on a cluster of its own."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from serving_models import Models

from gptj_local.processes import HOST, free_ports, running, tail
from gptj_local.ray import LocalRay

SERVE_CONFIG = Path(__file__).resolve().parents[2] / "k8s" / "base" / "serve.yaml"


def save_all(config: dict[str, Any], models: Models, storage: str) -> None:
    """Save the models, and let the configuration's applications serve them in fp32."""
    for application in config["applications"]:
        name = application["name"].replace("-", "_")
        address = f"{storage}/{name}/model"
        model = models.with_unused_ids() if name == "generation" else getattr(models, name)
        model.save_pretrained(address, tokenizer=models.tokenizer)
        application["args"] |= {"checkpoint": address, "dtype": "float32"}


@contextmanager
def serving(config: dict[str, Any], folder: Path, cpus: int = 4) -> Iterator[tuple[str, LocalRay]]:
    """`serve run` of a configuration, on a free port and a cluster of its own."""
    (port,) = free_ports(1)
    config["http_options"]["port"] = port
    path, log = folder / "serve.yaml", folder / "serve.log"
    path.write_text(yaml.safe_dump(config))
    address = f"http://{HOST}:{port}"
    with LocalRay.start(folder, cpus=cpus) as node:
        command = [str(Path(sys.executable).parent / "serve"), "run", str(path)]
        with running(command, environment={**os.environ, **node.environment()}, log=log) as process:
            deadline = time.monotonic() + 180
            for application in config["applications"]:
                url = address + application["route_prefix"].rstrip("/") + "/health"
                while not _answers(url):
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"{url} does not answer:\n{tail(log, 6000)}")
                    time.sleep(0.2)
            yield address, node


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False

"""The generation service with a tiny random model on a Ray cluster of this machine.

Gives scripts that break or overload it its processes, nodes and deployments.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import torch
import yaml

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj_local.processes import HOST, free_ports, kill_tree, running, tail
from gptj_local.ray import LocalRay

SERVE_CONFIG = Path(__file__).resolve().parents[2] / "k8s" / "base" / "serve.yaml"
START_SECONDS = 240
PROMPTS = ("The tower", "A river", "Anna wrote", "In the year", "Who", "x", "The book", "Paris")


@dataclass
class LocalService:
    """A cluster with the service."""

    node: LocalRay
    url: str
    folder: Path
    config: dict[str, Any]  # as first deployed
    key: str = "none"
    workers: list[Popen[bytes]] = field(default_factory=list)  # nodes beside the head
    serving: str = ""  # the checkpoint that answers
    _versions: int = 0

    def __post_init__(self) -> None:
        self.serving = self.config["applications"][0]["args"]["checkpoint"]

    def processes(self, actor: str) -> dict[str, int]:
        """Process ids of the live actors of a class, by the actors' ids."""
        found = self._get("/api/v0/actors?limit=1000&detail=1")["data"]["result"]["result"]
        return {
            each["actor_id"]: each["pid"]
            for each in found
            if each["state"] == "ALIVE" and each["class_name"].startswith(actor)
        }

    def answers(self) -> bool:
        """Whether /health answers."""
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def application(self) -> dict[str, Any]:
        """The application's status in Serve."""
        found: dict[str, Any] = self._get("/api/serve/applications/")
        return dict(found["applications"]["generation"])

    def new_version(self, *, damaged: bool = False) -> str:
        """A copy of the model at a new address; a damaged one lacks half of the weights."""
        self._versions += 1
        address = self.folder / f"model-{self._versions}"
        shutil.copytree(self.folder / "model", address)
        if damaged:
            weights = address / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        return str(address)

    def deploy(self, checkpoint: str) -> None:
        """As `serve deploy` does; returns at once."""
        config = copy.deepcopy(self.config)
        config["applications"][0]["args"]["checkpoint"] = checkpoint
        reply = httpx.put(
            f"{self.node.dashboard}/api/serve/applications/",
            json=config,
            headers=self._headers(),
            timeout=60,
        )
        reply.raise_for_status()

    def deployed(self) -> str:
        """The checkpoint that was deployed last, successfully or not."""
        return str(self.application()["deployed_app_config"]["args"]["checkpoint"])

    def states(self) -> list[str]:
        """The replicas' states; empty while a new version is being built."""
        deployments = self.application()["deployments"].values()
        return [replica["state"] for each in deployments for replica in each["replicas"]]

    def lose_worker(self) -> None:
        """Kill a node and everything on it at once, as when its machine is lost."""
        kill_tree(self.workers.pop(0))

    def _get(self, path: str) -> Any:
        reply = httpx.get(self.node.dashboard + path, headers=self._headers(), timeout=30)
        return reply.raise_for_status().json()

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.node.token}"}


def save_model(address: Path) -> None:
    """A tiny language model with random weights."""
    tokenizer = GPTJTokenizer.train([*PROMPTS, "It runs past the tower, and nobody reads."], 300)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 8,
        "n_positions": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.3,
    }
    model = GPTJForCausalLM(GPTJConfig(vocab_size=len(tokenizer), **shape))
    model.save_pretrained(address, tokenizer=tokenizer)


def configuration(checkpoint: str, replicas: int, *, spread: bool) -> dict[str, Any]:
    """serve.yaml's generation with this many replicas; with `spread`, one per node."""
    config: dict[str, Any] = yaml.safe_load(SERVE_CONFIG.read_text())
    (port,) = free_ports(1)
    config["http_options"]["port"] = port
    config["applications"] = config["applications"][:1]
    (application,) = config["applications"]
    application["args"] |= {"checkpoint": checkpoint, "dtype": "float32"}
    (deployment,) = application["deployments"]
    deployment.pop("autoscaling_config")
    deployment["num_replicas"] = replicas
    if spread:
        deployment["max_replicas_per_node"] = 1
        # The nodes share one address, so their proxies would share one port.
        config["proxy_location"] = "HeadOnly"
    known = ("proxy_location", "http_options", "logging_config", "applications")
    return {key: config[key] for key in known}


@contextmanager
def local_service(
    folder: Path, replicas: int = 2, key: str = "none", workers: int = 0
) -> Iterator[LocalService]:
    """The service with serve.yaml's settings, during the block.

    Args:
        key: the clients' key, if the environment requires one.
        workers: nodes besides the head, which then runs no replicas; each runs at most one.
    """
    save_model(folder / "model")
    config = configuration(str(folder / "model"), replicas, spread=workers > 0)
    path, log = folder / "serve.yaml", folder / "serve.log"
    path.write_text(yaml.safe_dump(config))
    with ExitStack() as stack:
        cpus, more_nodes = (0, True) if workers else (4, False)
        node = stack.enter_context(LocalRay.start(folder, cpus=cpus, more_nodes=more_nodes))
        url = f"http://{HOST}:{config['http_options']['port']}"
        found = LocalService(node, url, folder, config, key)
        for number in range(workers):
            worker = node.worker(folder / f"worker-{number}.log", cpus=1)
            found.workers.append(stack.enter_context(worker))
        command = [str(Path(sys.executable).parent / "serve"), "run", str(path)]
        environment = {**os.environ, **node.environment()}
        process = stack.enter_context(running(command, environment=environment, log=log))
        deadline = time.monotonic() + START_SECONDS
        while len(found.processes("ServeReplica")) < replicas or not found.answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the service does not start:\n{tail(log, 6000)}")
            time.sleep(0.5)
        yield found

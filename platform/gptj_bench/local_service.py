"""The generation service with a tiny random model on a Ray cluster of this machine.

Gives scripts that break or overload it its processes, nodes and deployments.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from types import MappingProxyType
from typing import Any

import httpx
import psutil
import torch
import yaml

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj.adapters.base import Base
from gptj.adapters.config import LoRAConfig
from gptj.adapters.lora import adapter_parameters, add_lora
from gptj_local.processes import HOST, free_ports, kill_tree, running, tail
from gptj_local.ray import LocalRay

SERVE_CONFIG = Path(__file__).resolve().parents[2] / "k8s" / "base" / "serve.yaml"
START_SECONDS = 240
CPUS = 4  # of the only node, as Ray counts
PROMPTS = ("The tower", "A river", "Anna wrote", "In the year", "Who", "x", "The book", "Paris")

NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})


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
    _stack: ExitStack = field(default_factory=ExitStack)  # of what runs

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

    def haproxies(self) -> list[psutil.Process]:
        """HAProxy's processes, which the nodes' managers started; none without it."""
        managers = set(self.processes("HAProxyManager").values())
        return [
            each
            for each in psutil.process_iter(["name", "ppid"])
            if each.info["name"] == "haproxy" and each.info["ppid"] in managers
        ]

    def answers(self) -> bool:
        """Whether /health answers."""
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def application(self, name: str = "generation") -> dict[str, Any]:
        """The application's status in Serve."""
        found: dict[str, Any] = self._get("/api/serve/applications/")
        return dict(found["applications"][name])

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

    def states(self, application: str = "generation") -> list[str]:
        """The replicas' states; empty while a new version is being built."""
        deployments = self.application(application)["deployments"].values()
        return [replica["state"] for each in deployments for replica in each["replicas"]]

    @property
    def adapters(self) -> list[str]:
        """The models' names in requests, besides the base model."""
        return list(self.config["applications"][0]["args"].get("adapters", {}))

    def lose_head(self) -> None:
        """Kill the only node and everything on it at once, Ray's state included."""
        kill_tree(psutil.Process(self.node.process_id))

    def restart(self) -> None:
        """Start another cluster and `serve run` on it; returns before it answers."""
        self.node = self._stack.enter_context(LocalRay.start(self.folder, cpus=CPUS))
        self.serving = self.config["applications"][0]["args"]["checkpoint"]
        self.serve()

    def serve(self) -> Popen[bytes]:
        """Start `serve run` with the first configuration; its log is serve.log."""
        path = self.folder / "serve.yaml"
        path.write_text(yaml.safe_dump(self.config))
        command = [str(Path(sys.executable).parent / "serve"), "run", str(path)]
        environment = {**os.environ, **self.node.environment()}
        log = self.folder / "serve.log"
        return self._stack.enter_context(running(command, environment=environment, log=log))

    def lose_worker(self) -> None:
        """Kill a node and everything on it at once, as when its machine is lost."""
        kill_tree(self.workers.pop(0))

    def _get(self, path: str) -> Any:
        reply = httpx.get(self.node.dashboard + path, headers=self._headers(), timeout=30)
        return reply.raise_for_status().json()

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.node.token}"}


def save_model(folder: Path, adapters: int, **larger: int) -> None:
    """A language model with random weights, tiny unless `larger`, and as many adapters of it."""
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
        **larger,
    }
    model = GPTJForCausalLM(GPTJConfig(vocab_size=len(tokenizer), **shape))
    model.save_pretrained(folder / "model", tokenizer=tokenizer)
    base = Base.at(str(folder / "model"))
    for number in range(adapters):
        model = GPTJForCausalLM.from_pretrained(str(folder / "model"))
        add_lora(model, LoRAConfig(4))
        with torch.no_grad():
            for parameter in adapter_parameters(model).values():
                parameter.normal_(std=0.3)
        model.save_adapter(folder / f"adapter-{number}", base=base)


def configuration(
    folder: Path,
    replicas: int,
    adapters: int,
    *,
    one_per_node: bool,
    arguments: Mapping[str, Any] = NO_ARGUMENTS,
) -> dict[str, Any]:
    """serve.yaml's generation with this many replicas; or `one_per_node`."""
    config: dict[str, Any] = yaml.safe_load(SERVE_CONFIG.read_text())
    (port,) = free_ports(1)
    config["http_options"]["port"] = port
    config["applications"] = config["applications"][:1]
    (application,) = config["applications"]
    application["args"] |= {
        "checkpoint": str(folder / "model"),
        "dtype": "float32",
        **arguments,
    }
    if adapters:
        application["args"]["adapters"] = {
            f"adapter-{number}": str(folder / f"adapter-{number}") for number in range(adapters)
        }
    (deployment,) = application["deployments"]
    deployment.pop("autoscaling_config")
    deployment["num_replicas"] = replicas
    if one_per_node:
        deployment["max_replicas_per_node"] = 1
        # The nodes share one address, so their proxies would share one port.
        config["proxy_location"] = "HeadOnly"
    known = ("proxy_location", "http_options", "logging_config", "applications")
    return {key: config[key] for key in known}


@contextmanager
def local_service(
    folder: Path,
    replicas: int = 2,
    key: str = "none",
    workers: int = 0,
    adapters: int = 0,
    arguments: Mapping[str, Any] = NO_ARGUMENTS,
) -> Iterator[LocalService]:
    """The service with serve.yaml's settings, during the block.

    Args:
        key: the clients' key, if the environment requires one.
        workers: nodes besides the head, which then runs no replicas; each runs at most one.
        adapters: of the model, loaded at the start.
        arguments: more of the application's `args`.
    """
    save_model(folder, adapters)
    config = configuration(
        folder, replicas, adapters, one_per_node=workers > 0, arguments=arguments
    )
    with ExitStack() as stack:
        cpus, more_nodes = (0, True) if workers else (CPUS, False)
        node = stack.enter_context(LocalRay.start(folder, cpus=cpus, more_nodes=more_nodes))
        url = f"http://{HOST}:{config['http_options']['port']}"
        found = LocalService(node, url, folder, config, key, _stack=stack)
        for number in range(workers):
            worker = node.worker(folder / f"worker-{number}.log", cpus=1)
            found.workers.append(stack.enter_context(worker))
        process = found.serve()
        deadline = time.monotonic() + START_SECONDS
        while len(found.processes("ServeReplica")) < replicas or not found.answers():
            if process.poll() is not None or time.monotonic() > deadline:
                log = folder / "serve.log"
                raise RuntimeError(f"the service does not start:\n{tail(log, 6000)}")
            time.sleep(0.5)
        yield found

"""The services measured over HTTP: ours on a local Ray cluster, vLLM's, and Ray Serve LLM."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import yaml

from gptj.storage.addresses import absolute
from gptj_local.processes import HOST, free_ports, running, tail
from gptj_local.ray import HAPROXY_SWITCH, LocalRay

ROOT = Path(__file__).resolve().parents[2]
SERVE_CONFIG = ROOT / "k8s" / "base" / "serve.yaml"
RAY_SERVE_LLM = Path(__file__).parent / "peers" / "serve_llm.py"
START_SECONDS = 600
MODEL_NAME = "gptj"


@contextmanager
def ours(model: str, arguments: dict[str, Any], folder: Path) -> Iterator[str]:
    """Run our generation application from serve.yaml with one replica; yields its URL."""
    (port,) = free_ports(1)
    cpus = os.cpu_count() or 1
    config = yaml.safe_load(SERVE_CONFIG.read_text())
    application = config["applications"][0]
    application["args"] = {
        "checkpoint": absolute(model) if Path(model).exists() else model,
        "model_name": MODEL_NAME,
        **arguments,
    }
    deployment = application["deployments"][0]
    deployment["autoscaling_config"] |= {"min_replicas": 1, "max_replicas": 1}
    # Ray limits a replica's threads to its CPUs.
    deployment["ray_actor_options"] = {"num_cpus": cpus}
    config["http_options"]["port"] = port
    config["applications"] = [application]
    path, log = folder / "serve.json", folder / "serve.log"
    path.write_text(json.dumps(config))
    address = f"http://{HOST}:{port}"
    with LocalRay.start(folder, cpus=cpus) as node:
        environment = {**os.environ, **node.environment()}
        command = [str(Path(sys.executable).parent / "serve"), "run", str(path)]
        with running(command, environment=environment, log=log) as process:
            wait_until_healthy(address, process, log)
            yield address


@contextmanager
def vllm(model: str, python: Path, folder: Path, *, max_model_len: int = 1024) -> Iterator[str]:
    """Run vLLM's OpenAI server on the CPU, two threads; yields its URL."""
    (port,) = free_ports(1)
    log = folder / "vllm.log"
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--port", str(port), "--host", HOST, "--dtype", "bfloat16"]
    command += ["--max-model-len", str(max_model_len), "--served-model-name", MODEL_NAME]
    with running(command, environment=_of_vllm(python), log=log) as process:
        address = f"http://{HOST}:{port}"
        wait_until_healthy(address, process, log)
        yield address


@contextmanager
def ray_serve_llm(
    model: str, python: Path, folder: Path, *, max_model_len: int = 1024
) -> Iterator[str]:
    """Run Ray Serve LLM with vLLM and direct streaming (HAProxy), two threads; yields its URL."""
    port, stats, metrics, fallback = free_ports(4)
    log = folder / "ray-llm.log"
    environment = {
        **_of_vllm(python),
        "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
        HAPROXY_SWITCH: "1",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
    }
    command = [str(python), str(RAY_SERVE_LLM), "--model", model, "--name", MODEL_NAME]
    command += ["--port", str(port), "--max-model-len", str(max_model_len)]
    with running(command, environment=environment, log=log) as process:
        address = f"http://{HOST}:{port}"
        wait_until_healthy(address, process, log)
        yield address


def _of_vllm(python: Path) -> dict[str, str]:
    """The environment of a server with vLLM on two cores."""
    return {
        **os.environ,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def wait_until_healthy(address: str, process: Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _healthy(address):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{address} does not answer; the end of {log}:\n{tail(log, 6000)}")
        time.sleep(0.5)


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False  # not yet; the caller has the timeout

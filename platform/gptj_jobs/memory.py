"""Checks before a training that it fits the memory of the cluster's GPUs or machine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import torch

from gptj.config import GPTJConfig
from gptj.environment.devices import cpu_computes_bf16
from gptj.environment.host_memory import total_bytes
from gptj.training.memory import (
    as_long_as,
    changed,
    fits,
    fitting,
    words,
)
from gptj.training.memory_plan import certain_bytes, plan_memory
from gptj.training.settings import Settings, SettingsError

logger = logging.getLogger("finetune")

GPU_SECONDS = 60.0
MARGIN = 0.15  # predictions may be this much too high: a run that might fit is not refused


def check_memory(settings: Settings, config: GPTJConfig, on_gpu: bool, longest: int) -> None:
    """SettingsError, with settings that would fit, for a run that cannot fit.

    Nothing is checked if the memory is unknown: that of machines or GPUs that the cluster has yet
    to add, or the share of several machines' memory that a run on CPUs may use.

    Args:
        longest: tokens of the longest training example.
    """
    settings = as_long_as(settings, longest)
    if on_gpu:
        if (gpu := find_gpu(settings.workers.autoscaling)) is not None:
            host = None if settings.workers.autoscaling else roomiest_host()
            check_gpu_memory(settings, config, gpu, host)
    elif not settings.workers.autoscaling and sum(node["Alive"] for node in ray.nodes()) == 1:
        check_machine_memory(settings, config, total_bytes())


@dataclass(frozen=True)
class Gpu:
    """One of the cluster's GPUs, which are usually alike."""

    memory: int  # bytes
    bf16: bool  # whether it computes in it


@dataclass(frozen=True)
class Host:
    """A node with GPUs."""

    memory: int  # bytes that were free when Ray started
    gpus: int


def check_gpu_memory(
    settings: Settings, config: GPTJConfig, gpu: Gpu, host: Host | None = None
) -> None:
    """SettingsError if workers clearly need more than a GPU's memory.

    More than their host's is only a warning: Ray says how much was free when it started.

    Args:
        host: None: its memory is unknown.
    """
    plan, workers = plan_memory(settings, config, on_gpu=True), settings.workers.fewest
    needed = _needed(plan.device, f"of each GPU's {gpu.memory / 1e9:.1f} GB")
    too_much = plan.device_bytes * (1 - MARGIN) > gpu.memory
    room: dict[str, Any] = {}
    if host is not None:
        room = {"host_memory": host.memory, "node_gpus": host.gpus}
        local = min(workers, host.gpus)
        if plan.host_bytes * local > host.memory:
            has = f"for each of {local} workers on a host with {host.memory / 1e9:.1f} GB"
            needed += f", and {_needed(plan.host, has)}"
    if fits(plan, workers, gpu.memory, **room):
        logger.info("the run will need about %s", needed)
        return
    if not too_much:
        logger.warning("the run may not fit: it would need about %s", needed)
        return
    found = []
    fitting_gpus = partial(fitting, settings, config, gpu_memory=gpu.memory, bf16=gpu.bf16)
    for change in fitting_gpus(**room) or fitting_gpus():
        less = plan_memory(changed(settings, change), config, on_gpu=True)
        found.append(f"{words(change)} ({less.device_bytes / 1e9:.1f} GB)")
    raise SettingsError(
        f"the run does not fit: it would need about {needed}. "
        + (f"These settings fit: {'; or '.join(found)}" if found else "It needs more GPUs")
    )


def check_machine_memory(settings: Settings, config: GPTJConfig, memory: int) -> None:
    """SettingsError if weights, gradients and optimizer alone are more than a machine's memory."""
    needed = certain_bytes(settings, config)
    if needed > memory:
        half = changed(settings, {"deepspeed.precision": "bf16"})
        helps = cpu_computes_bf16() and certain_bytes(half, config) < needed
        bf16 = "deepspeed.precision=bf16, " if helps else ""
        raise SettingsError(
            f"the run does not fit: the weights, gradients and optimizer of "
            f"workers.count={settings.workers.count} workers need {needed / 1e9:.1f} GB together, "
            f"but the machine has {memory / 1e9:.1f} GB: choose a smaller model, an adapter "
            f"(adapter={{}}), {bf16}deepspeed.stage=3, or fewer workers"
        )


def _needed(parts: Mapping[str, int], room: str) -> str:
    sizes = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    return f"{sum(parts.values()) / 1e9:.1f} GB {room} ({sizes})"


def roomiest_host() -> Host | None:
    """The node with the most memory for each of its GPUs; None if there is none yet."""
    hosts = []
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        if has.get("GPU", 0) >= 1 and "memory" in has:
            # Ray takes its object store from the memory, but a training hardly uses it.
            size = has["memory"] + has.get("object_store_memory", 0)
            hosts.append(Host(int(size), int(has["GPU"])))
    return max(hosts, key=lambda host: host.memory / host.gpus, default=None)


def find_gpu(autoscaling: bool) -> Gpu | None:
    """One of the cluster's GPUs; None if none can be queried."""
    if autoscaling and not ray.cluster_resources().get("GPU"):
        return None
    asked = ray.remote(num_gpus=1)(_gpu).remote()
    try:
        found: Gpu = ray.get(asked, timeout=GPU_SECONDS)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(asked, force=True)  # otherwise it would take a GPU from the workers
        logger.warning(
            "no GPU answered within %.0f s: not checking whether the run fits its memory",
            GPU_SECONDS,
        )
        return None
    return found


def _gpu() -> Gpu:
    memory = torch.cuda.get_device_properties(0).total_memory
    return Gpu(int(memory), torch.cuda.is_bf16_supported(including_emulation=False))

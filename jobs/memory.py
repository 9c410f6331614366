"""Checks before a training that it fits the memory of the cluster's GPUs or machine."""

from __future__ import annotations

import logging
import os

import ray
import torch

from gptj.config import GPTJConfig
from gptj.training.memory import (
    as_long_as,
    certain_bytes,
    changed,
    fits,
    fitting,
    plan_memory,
    words,
)
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
        if (memory := gpu_memory(settings.workers.autoscaling)) is not None:
            check_gpu_memory(settings, config, memory)
    elif not settings.workers.autoscaling and sum(node["Alive"] for node in ray.nodes()) == 1:
        check_machine_memory(settings, config, machine_memory())


def check_gpu_memory(settings: Settings, config: GPTJConfig, memory: int) -> None:
    """SettingsError if a worker clearly needs more than a GPU's `memory`, in bytes."""
    plan = plan_memory(settings, config, on_gpu=True)
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in plan.device.items())
    needed = f"{plan.device_bytes / 1e9:.1f} GB of each GPU's {memory / 1e9:.1f} GB ({parts})"
    if fits(plan, settings.workers.fewest, memory):
        logger.info("the run will need about %s", needed)
        return
    if plan.device_bytes * (1 - MARGIN) <= memory:
        logger.warning("the run may not fit: it would need about %s", needed)
        return
    found = []
    for change in fitting(settings, config, gpu_memory=memory):
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
        raise SettingsError(
            f"the run does not fit: the weights, gradients and optimizer of "
            f"workers.count={settings.workers.count} workers need {needed / 1e9:.1f} GB together, "
            f"but the machine has {memory / 1e9:.1f} GB: choose a smaller model, an adapter "
            f"(adapter={{}}), deepspeed.precision=bf16, deepspeed.stage=3, or fewer workers"
        )


def gpu_memory(autoscaling: bool) -> int | None:
    """Bytes of one of the cluster's GPUs, which are usually alike; None if none can be queried."""
    if autoscaling and not ray.cluster_resources().get("GPU"):
        return None
    asked = ray.remote(num_gpus=1)(_gpu_memory).remote()
    try:
        found: int = ray.get(asked, timeout=GPU_SECONDS)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(asked, force=True)  # otherwise it would take a GPU from the workers
        logger.warning(
            "no GPU answered within %.0f s: not checking whether the run fits its memory",
            GPU_SECONDS,
        )
        return None
    return found


def _gpu_memory() -> int:
    return int(torch.cuda.get_device_properties(0).total_memory)


def machine_memory() -> int:
    """Bytes of this machine's physical memory, or of its container's limit if lower."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            return min(physical, int(file.read()))
    except (OSError, ValueError):  # no limit: "max", or no such file
        return physical

"""Estimate a training run's memory per GPU and per host, by part.

    python -m gptj.training.memory --gpus 4 --gpu-memory 24 [--model 6b|small|tiny|ADDRESS]
                                   [SETTINGS.yaml] [key=value …]

Prints the parts and, if the run does not fit, settings with which it would. `--gpu-memory` and
`--host-memory` (of a node with up to 8 GPUs) are in GB; without the first, the run is on CPUs, and
the second is refused.

DeepSpeed's state is computed from the number of weights; activations are measured by running
blocks of the model on PyTorch's meta device, whose tensors have shapes but no data.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptj.config import PRESETS, GPTJConfig
from gptj.data.examples import PAD_MULTIPLE
from gptj.training.memory_plan import MemoryPlan, plan_memory
from gptj.training.settings import Settings, SettingsError, read_settings

NODE_GPUS = 8
PUBLISHED = "EleutherAI/gpt-j-6B"
SPARE = 0.05  # share of a GPU's memory lost to fragmentation


def fitting(
    settings: Settings,
    config: GPTJConfig,
    *,
    gpu_memory: float,
    host_memory: float | None = None,
    node_gpus: int = NODE_GPUS,
    bf16: bool = True,
    limit: int = 3,
) -> list[dict[str, Any]]:
    """Changes of settings, as {key: value}, that make a run fit; cheapest first.

    Args:
        gpu_memory: of each GPU, in bytes.
        host_memory: of a node, in bytes; None: unlimited.
        node_gpus: of a node.
        bf16: whether the GPUs compute in it.
    """
    found: list[dict[str, Any]] = []
    for change in _changes(settings, bf16):
        if any(each.items() <= change.items() for each in found):
            continue  # a smaller change suffices
        plan = plan_memory(changed(settings, change), config, on_gpu=True)
        if fits(plan, settings.workers.fewest, gpu_memory, host_memory, node_gpus):
            found.append(change)
            if len(found) == limit:
                break
    return found


def as_long_as(settings: Settings, longest: int) -> Settings:
    """Lower data.sequence_length to the longest example's: batches are padded to no more."""
    length = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    if settings.task == "question-answering":  # windows must be longer than their overlap
        length = max(length, settings.data.stride + 1)
    if length >= settings.data.sequence_length:
        return settings
    return changed(settings, {"data.sequence_length": length})


def fits(
    plan: MemoryPlan,
    gpus: int,
    gpu_memory: float,
    host_memory: float | None = None,
    node_gpus: int = NODE_GPUS,
) -> bool:
    """Whether a run fits, with SPARE of the GPU's memory left; nodes have up to `node_gpus`."""
    local = min(gpus, node_gpus)
    roomy = host_memory is None or plan.host_bytes * local <= host_memory
    return roomy and plan.device_bytes <= gpu_memory * (1 - SPARE)


def changed(settings: Settings, change: Mapping[str, Any]) -> Settings:
    """The settings with values replaced, given by dotted keys."""
    fields = settings.model_dump(exclude_unset=True)
    for key, value in change.items():
        *path, leaf = key.split(".")
        section = fields
        for name in path:
            section[name] = dict(section.get(name) or {})
            section = section[name]
        section[leaf] = value
    return Settings(**fields)


def words(change: Mapping[str, Any]) -> str:
    """The change in command-line syntax, as a shell takes it."""
    return shlex.join(f"{key}={json.dumps(value)}" for key, value in change.items())


def _changes(settings: Settings, bf16: bool) -> Iterator[dict[str, Any]]:
    """All changes that may save memory, ordered by cost: time, host memory, then quality."""
    sizes = [settings.micro_batch_size]
    while sizes[-1] > 1 and sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    if sizes[-1] > 1:
        sizes.append(1)
    offloads: list[dict[str, Any]] = [{}]
    if not settings.deepspeed.offload_optimizer:
        offloads.append({"deepspeed.offload_optimizer": True})
    if not settings.deepspeed.offload_parameters:
        both = {"deepspeed.offload_optimizer": True, "deepspeed.offload_parameters": True}
        offloads.append(both)
    adapters: list[dict[str, Any]] = [{}]
    if settings.adapter is None and settings.model.checkpoint:
        adapters += [{"adapter": {}}, {"adapter": {"quantization": "nf4"}}]
    elif settings.adapter is not None and settings.adapter.quantization is None:
        adapters.append({"adapter.quantization": "nf4"})
    moments: list[dict[str, Any]] = [{}]
    if settings.optimizer.moments == "fp32":
        moments.append({"optimizer.moments": "8bit"})
    recomputes: list[dict[str, Any]] = [{}]
    if not settings.model.gradient_checkpointing:
        recomputes.append({"model.gradient_checkpointing": "selective"})
    if settings.model.gradient_checkpointing is not True:
        recomputes.append({"model.gradient_checkpointing": True})
    precisions: list[dict[str, Any]] = [{}]
    if bf16 and settings.deepspeed.precision == "fp32":  # GPUs are also faster in it
        precisions.append({"deepspeed.precision": "bf16"})
    stages = [{}, *({"deepspeed.stage": s} for s in (2, 3) if s > settings.deepspeed.stage)]
    if settings.workers.fewest == 1 and settings.deepspeed.stage < 3:
        stages = [{}, {"deepspeed.stage": 3}]
    for adapter, moment, offload, size, stage, recompute, precision in itertools.product(
        adapters, moments, offloads, sizes, stages, recomputes, precisions
    ):
        change = {**precision, **recompute, **stage, **offload, **moment, **adapter}
        if size != settings.micro_batch_size:
            change["micro_batch_size"] = size
        adapts = settings.adapter is not None or "adapter" in change
        way = change.get("model.gradient_checkpointing", settings.model.gradient_checkpointing)
        if adapts and way == "selective":  # which keeps more than it saves
            continue
        now = change.get("deepspeed.stage", settings.deepspeed.stage)
        if now == 3 and _quantized(settings, change):
            continue
        offloaded = settings.deepspeed.offload_optimizer or "deepspeed.offload_optimizer" in change
        if offloaded and _moments(settings, change) == "8bit":
            continue
        if "deepspeed.offload_parameters" in change and now < 3:
            continue
        if "deepspeed.offload_optimizer" in change and now < 1:
            continue
        yield change


def _quantized(settings: Settings, change: Mapping[str, Any]) -> bool:
    if "adapter.quantization" in change:
        return True
    if "adapter" in change:
        return "quantization" in change["adapter"]
    return settings.adapter is not None and settings.adapter.quantization is not None


def _moments(settings: Settings, change: Mapping[str, Any]) -> str:
    return str(change.get("optimizer.moments", settings.optimizer.moments))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gptj.training.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="a preset's name, or a checkpoint's address")
    parser.add_argument("--gpus", type=int, help="as workers.count")
    parser.add_argument("--gpu-memory", type=float, help="GB of each")
    parser.add_argument("--host-memory", type=float, help="GB of each node")
    parser.add_argument("settings", nargs="*", help="SETTINGS.yaml key=value …")
    given = parser.parse_intermixed_args(arguments)
    on_gpu = given.gpu_memory is not None
    if given.host_memory is not None and not on_gpu:
        parser.error(
            "--host-memory is checked for runs on GPUs: give --gpu-memory too; a run on CPUs needs "
            "what is printed without either, for each worker"
        )
    given_words = list(given.settings)
    if given.gpus is not None:
        given_words.append(f"workers.count={given.gpus}")
        if not any(word.startswith("batch_size=") for word in given_words):
            given_words.append(f"batch_size={given.gpus * 8}")
    if given.model is not None:
        kind = "model.preset" if given.model in ("tiny", "small") else "model.checkpoint"
        given_words.append(f"{kind}={PUBLISHED if given.model == '6b' else given.model}")
    try:
        settings = read_settings(given_words)
        config = known_config(settings)
    except (SettingsError, OSError) as error:
        sys.exit(f"error: {error}")
    plan = plan_memory(settings, config, on_gpu=on_gpu)
    print(described(plan, settings.workers.fewest, on_gpu=on_gpu))
    if not on_gpu:
        return
    memory = given.gpu_memory * 1e9
    host = None if given.host_memory is None else given.host_memory * 1e9
    if fits(plan, settings.workers.fewest, memory, host):
        print(f"It fits {given.gpu_memory:g} GB.")
        return
    print(f"It does not fit {given.gpu_memory:g} GB. These settings fit:")
    found = fitting(settings, config, gpu_memory=memory, host_memory=host)
    for change in found:
        plan = plan_memory(changed(settings, change), config, on_gpu=True)
        print(f"  {words(change)}  ({plan.device_bytes / 1e9:.1f} GB)")
    if not found:
        print("  none: take more or larger GPUs, or a shorter data.sequence_length")
        sys.exit(1)


def known_config(settings: Settings) -> GPTJConfig:
    """The configuration of the run's model, as far as it is known without the data."""
    if settings.model.checkpoint == PUBLISHED:  # works offline
        return GPTJConfig(**PRESETS["6b"])
    if settings.model.checkpoint:
        revision = settings.model.revision or None
        return GPTJConfig.from_pretrained(settings.model.checkpoint, revision=revision)
    return GPTJConfig(**{**PRESETS[settings.model.preset], **settings.model.config})


def described(plan: MemoryPlan, workers: int, *, on_gpu: bool) -> str:
    """The parts as a table, in GB."""
    where = "each GPU" if on_gpu else "each worker"
    columns = [(f"{where} of {workers}", plan.device)]
    if plan.host:
        columns.append(("the host, for each", plan.host))
    lines = []
    for title, parts in columns:
        lines.append(f"{title}:")
        lines += [f"  {name:<12}{size / 1e9:8.2f} GB" for name, size in parts.items()]
        lines.append(f"  {'in all':<12}{sum(parts.values()) / 1e9:8.2f} GB")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

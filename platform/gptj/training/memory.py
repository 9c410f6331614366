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
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from gptj.adapters.lora import NEW_HEADS, add_lora
from gptj.adapters.quantization import count_weights, quantize_blocks
from gptj.checkpoints.skeleton import without_weights
from gptj.config import PRESETS, GPTJConfig
from gptj.data.batches import micro_batches
from gptj.data.examples import PAD_MULTIPLE
from gptj.pretrained import GPTJPreTrainedModel
from gptj.training.deepspeed_config import BUCKET, sums_in_fp32
from gptj.training.live_bytes import LiveBytes
from gptj.training.optimizer import MOMENT_BYTES, STORED_MOMENT_BYTES
from gptj.training.sections import AdapterSettings, Recomputation
from gptj.training.settings import Settings, SettingsError, read_settings
from gptj.training.tasks import TASKS, TaskName

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of a weight
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MASTER = 4  # bytes of a trained weight in fp32
LIVE = 1_000_000_000  # parameters that stage 3 keeps gathered
REDUCED = 500_000_000  # gradients that stage 0 adds up at a time
CONTEXT = 1_200_000_000  # bytes that CUDA and NCCL take on each GPU
PROCESS = 700_000_000  # bytes of a CPU worker: Python, PyTorch, DeepSpeed, Ray
NODE_GPUS = 8
PUBLISHED = "EleutherAI/gpt-j-6B"
SPARE = 0.05  # share of a GPU's memory lost to fragmentation


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the peak, by part.

    Args:
        device: on each GPU; on CPUs, of each worker.
        host: of each GPU's worker, in host memory.
    """

    device: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def plan_memory(settings: Settings, config: GPTJConfig, *, on_gpu: bool) -> MemoryPlan:
    """Memory that each of the run's workers needs.

    Args:
        config: the run's model configuration.
    """
    deepspeed, workers = settings.deepspeed, settings.workers.fewest
    width, stage = WIDTHS[deepspeed.precision], deepspeed.stage
    counts = _count(settings.task, config, settings.adapter)
    total, trained, largest = counts.numbers, counts.trained, counts.largest
    moments = MOMENT_BYTES[settings.optimizer.moments]
    rows = settings.micro_batch_size
    body, head = _activations(
        settings.task,
        config.to_json(),
        settings.adapter,
        deepspeed.precision,
        settings.model.gradient_checkpointing,
        rows,
        settings.data.sequence_length,
    )

    weights = counts.bytes(width) // (workers if stage == 3 else 1)
    gathered = min(total, LIVE) * width if stage == 3 else 0
    masters = 0 if stage == 0 and deepspeed.precision == "fp32" else MASTER
    optimizer = int(trained * (masters + moments)) // (workers if stage else 1)
    accumulation = micro_batches(settings.batch_size, workers, settings.micro_batch_size)
    sums = sums_in_fp32(deepspeed, accumulation)
    gradients = trained * (4 if sums else width) // (workers if stage >= 2 else 1)
    # DeepSpeed's optimizer reads gradients in fp32: in a copy, unless they are. Stage 3 copies them
    # into one tensor first, for one group of weights after the other.
    copied = 4 if masters and not (sums and stage == 2) else 0  # bytes of each
    if stage == 3 and width < 4 and not sums:
        copied += width
    copies = min(trained // (workers if stage else 1), LIVE if stage == 3 else trained) * copied
    if stage == 0 and workers > 1:  # to add up all workers' gradients
        copies = max(copies, min(trained, REDUCED) * width)
    if not on_gpu and settings.optimizer.moments == "8bit":  # its update needs temporary tensors
        copies += 5 * 4 * (trained // workers if stage else largest)
    bucket = BUCKET if on_gpu else min(trained, BUCKET)
    buffers = bucket * width * (2 if on_gpu and 0 < stage < 3 else 1) if stage else 0

    device = {"weights": weights}
    host: dict[str, int] = {}
    if deepspeed.offload_parameters:
        host["weights"], device["weights"] = weights, 0
    if deepspeed.offload_optimizer:  # gradients move along, in fp32
        host["optimizer"] = optimizer + trained * 4 // workers
        if stage == 3:  # with those of the micro-batches so far
            host["gradients"] = gradients
        gradients = gradients if stage == 1 else 0
    else:
        device["optimizer"] = optimizer
    # Backward pass: a micro-batch's activations are freed as its gradients appear.
    together = accumulation > 1 or stage >= 2
    learning = body + head + gradients if together else max(body + head, gradients)
    updating = gradients + (0 if deepspeed.offload_optimizer else copies)
    # A run that resumes reads moments in 8 bits with each number's scale, all in fp32.
    restoring = 0
    if settings.optimizer.moments == "8bit":
        restoring = trained * STORED_MOMENT_BYTES["8bit"] // (workers if stage else 1)
    if not on_gpu and restoring > max(learning, updating):
        device["restoring"] = restoring
    elif learning >= updating:
        device["gradients"] = max(0, learning - body - head)
        device["activations"], device["logits"] = body, head
    else:
        device["gradients"], device["update"] = gradients, updating - gradients
    device["buffers"] = buffers + gathered
    if on_gpu:
        device["CUDA"] = CONTEXT
        # The first rank reads the whole model there, and the others need as much room.
        host["loading"] = counts.unquantized * width
        host["process"] = PROCESS * 2
        if restoring > host["loading"]:  # after that
            del host["loading"]
            host["restoring"] = restoring
    else:
        device["process"] = PROCESS
    return MemoryPlan({k: v for k, v in device.items() if v}, host)


def certain_bytes(settings: Settings, config: GPTJConfig) -> int:
    """Lower bound on the memory of all workers together: weights, Adam's state, gradients.

    A machine with less cannot run them.
    """
    deepspeed, workers = settings.deepspeed, settings.workers.fewest
    width = WIDTHS[deepspeed.precision]
    counts = _count(settings.task, config, settings.adapter)
    trained = counts.trained
    weights = counts.bytes(width) * (1 if deepspeed.stage == 3 else workers)
    state = MOMENT_BYTES[settings.optimizer.moments] + (
        0 if deepspeed.precision == "fp32" else MASTER
    )
    optimizer = int(trained * state) * (1 if deepspeed.stage else workers)
    gradients = trained * width * (1 if deepspeed.stage >= 2 else workers)
    return weights + optimizer + gradients


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


@lru_cache(maxsize=256)
def _activations(
    task: TaskName,
    config: str,
    adapter: AdapterSettings | None,
    precision: str,
    recompute: Recomputation,
    rows: int,
    length: int,
) -> tuple[int, int]:
    """Peak activation bytes of a micro-batch's forward and backward pass: body, head.

    Excludes weights and stored gradients. All blocks take the same, so only a few are run.
    """
    fields = GPTJConfig(**json.loads(config))
    layers = fields.n_layer
    peaks = []
    for count in (2, 3):  # the first one may have inputs without gradients
        fields.n_layer = count
        peaks.append(_peak(task, fields, adapter, precision, recompute, rows, length))
    (body, whole), (next_body, next_whole) = peaks
    body += (layers - 2) * (next_body - body)
    whole += (layers - 2) * (next_whole - whole)
    return min(body, whole), max(0, whole - body)


def _peak(
    task: TaskName,
    config: GPTJConfig,
    adapter: AdapterSettings | None,
    precision: str,
    recompute: Recomputation,
    rows: int,
    length: int,
) -> tuple[int, int]:
    """Peak bytes of a model on the meta device: without its head, and with it."""
    model = _meta_model(task, config, adapter).to(DTYPES[precision]).train()
    if recompute:
        model.gradient_checkpointing_enable(selective=recompute == "selective")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    found = []
    with mock.patch.object(F, "scaled_dot_product_attention", _fused_attention):
        for head in (False, True):
            with LiveBytes() as memory:
                if head:
                    loss = _loss(task, model, ids)
                else:
                    hidden = model.base_model(input_ids=ids, use_cache=False)
                    loss = hidden.last_hidden_state.mean()
                loss.backward()
                del loss
                hidden = None
            found.append(memory.peak)
    return found[0], found[1]


def _loss(task: TaskName, model: GPTJPreTrainedModel, ids: Tensor) -> Tensor:
    if task == "causal-lm":
        loss = model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss
    else:  # the other heads have few outputs
        loss = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.mean()
    assert isinstance(loss, Tensor)
    return loss


def _drop(parameter: Tensor) -> None:
    """Stored gradients are counted separately."""
    parameter.grad = None


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> Tensor:
    """The fused kernel of GPUs and CPUs; on the meta device PyTorch would decompose attention."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask)[0]
    return out


@dataclass(frozen=True)
class _Counts:
    """A model's weights.

    Attributes:
        numbers: weights in the training precision.
        codes: bytes of quantized weights, with their scales.
        unquantized: all weights, as they are loaded.
        trained: trainable weights.
        largest: weights of the largest trained matrix.
    """

    numbers: int
    codes: int
    unquantized: int
    trained: int
    largest: int

    def bytes(self, width: int) -> int:
        """Total bytes, with `width` bytes per unquantized weight."""
        return self.numbers * width + self.codes


@lru_cache(maxsize=64)
def _counted(task: TaskName, config: str, adapter: AdapterSettings | None) -> _Counts:
    model = _meta_model(task, GPTJConfig(**json.loads(config)), adapter)
    sizes = [(p.numel(), p.is_floating_point()) for p in model.parameters()]
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    return _Counts(
        numbers=sum(size for size, plain in sizes if plain),
        codes=sum(size for size, plain in sizes if not plain),
        unquantized=count_weights(model),
        trained=sum(trained),
        largest=max(trained),
    )


def _count(task: TaskName, config: GPTJConfig, adapter: AdapterSettings | None) -> _Counts:
    return _counted(task, config.to_json(), adapter)


def _meta_model(
    task: TaskName, config: GPTJConfig, adapter: AdapterSettings | None
) -> GPTJPreTrainedModel:
    cls = TASKS[task].head
    with without_weights():
        model = cls(config)
        if adapter is not None and adapter.quantization is not None:
            quantize_blocks(model, adapter.quantization)
        if adapter is not None:
            add_lora(model, adapter.lora(NEW_HEADS.get(cls.__name__, ())))
    return model


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

"""Predict a training run's memory: settings and a configuration in, bytes by part out.

`python -m gptj.training.memory` prints it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
from gptj.config import GPTJConfig
from gptj.data.batches import micro_batches
from gptj.pretrained import GPTJPreTrainedModel
from gptj.training.deepspeed_config import BUCKET, sums_in_fp32
from gptj.training.live_bytes import LiveBytes
from gptj.training.optimizer import MOMENT_BYTES, STORED_MOMENT_BYTES
from gptj.training.sections import AdapterSettings, Recomputation
from gptj.training.settings import Settings
from gptj.training.tasks import TASKS, TaskName

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of a weight
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MASTER = 4  # bytes of a trained weight in fp32
LIVE = 1_000_000_000  # parameters that stage 3 keeps gathered
REDUCED = 500_000_000  # gradients that stage 0 adds up at a time
CONTEXT = 1_200_000_000  # bytes that CUDA and NCCL take on each GPU
PROCESS = 700_000_000  # bytes of a CPU worker: Python, PyTorch, DeepSpeed, Ray


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

"""Training by DeepSpeed on one GPU against the CPU; one 6B layer; memory."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from checking import Check, run
from models import matrix_parameters
from task_data import make_data

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer, storage
from gptj.adapters.config import TARGET_MODULES
from gptj.adapters.lora import add_lora
from gptj.data.batches import BatchOrder
from gptj.training import agreement, loop
from gptj.training.dataset import TaskData
from gptj.training.deepspeed_config import (
    deepspeed_config,
    learning_rate_share,
    parameter_groups,
)
from gptj.training.loop import Worker, train
from gptj.training.model_config import make_config
from gptj.training.sections import Recomputation
from gptj.training.settings import Settings
from gptj.training.state import upload_state
from gptj.training.tokenizer import prepare_tokenizer
from gptj_bench.decode import random_model

# Of the losses beside the CPU's in fp32. fp16 begins with steps that its loss scale lets go.
NEAR = {"fp32": 1e-3, "bf16": 0.3, "fp16": 1.5}
# Stage 3 first: it needs the ranks before another run has set up DeepSpeed. PyTorch's AdamW, as on
# the CPU, unless the optimizer is what is tried.
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "stage 3, bf16, recomputing": ({"stage": 3, "precision": "bf16"}, True),
    "stage 3, fp32": ({"stage": 3}, False),
    "stage 2, fp32": ({"stage": 2}, False),
    "stage 2, bf16": ({"stage": 2, "precision": "bf16"}, False),
    "stage 2, fp16": ({"stage": 2, "precision": "fp16"}, False),
}
# With the optimizers that DeepSpeed compiles: for a GPU, and for the host's memory.
COMPILED: dict[str, dict[str, Any]] = {
    "DeepSpeed's FusedAdam": {"stage": 2},
    "offloading all, stage 3": {
        "stage": 3,
        "offload_optimizer": True,
        "offload_parameters": True,
    },
}
COMPILE_SECONDS = 45
REHEARSED = ("stage 2, fp32",)  # stage 3 is among the compiled ones, recomputing in `one_layer`
TINY = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 32}
MODEL = {"n_embd": 256, "n_layer": 4, "n_head": 8, "rotary_dim": 16, "n_positions": 128}


def main(check: Check) -> None:
    with check.attempt("one layer"):
        one_layer(check)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [f"word{n} is {'very ' * (n % 5)}good." for n in range(check.pick(2000, 101))]
        (folder / "train.jsonl").write_text(json.dumps({"text": " ".join(words)}) + "\n")
        expected: list[float] = []
        with check.attempt("training on the CPU"):
            expected = on_the_cpu(_settings(check, folder, "cpu", {}, False))
            check.add("training on the CPU", losses=expected)
        with ranks(check):
            for variant in check.pick(tuple(VARIANTS), REHEARSED):
                deepspeed, recomputing = VARIANTS[variant]
                if not check.late("training", 10, variant=variant):
                    settings = _settings(check, folder, variant, deepspeed, recomputing)
                    with check.attempt("training", variant=variant):
                        compare(check, variant, settings, expected, compiled=False)
            if not check.late("training", 10, variant="LoRA"):
                with check.attempt("training", variant="LoRA"):  # on what stage 2 in fp32 gave
                    base = _settings(check, folder, "stage 2, fp32", {}, False).model_folder
                    settings = _settings(check, folder, "LoRA", {"stage": 2}, False, base)
                    compare(check, "LoRA", settings, on_the_cpu(settings), compiled=False)
            for variant in check.pick(tuple(COMPILED), ("offloading all, stage 3",)):
                if not check.late("training", COMPILE_SECONDS, variant=variant):
                    settings = _settings(check, folder, variant, COMPILED[variant], False)
                    with check.attempt("training", variant=variant):
                        compare(check, variant, settings, expected, compiled=True)


def _settings(
    check: Check,
    folder: Path,
    name: str,
    deepspeed: dict[str, Any],
    recomputing: bool,
    base: str | None = None,
) -> Settings:
    """A run; with a base, of an adapter for it."""
    length = check.pick(128, 32)
    fields: dict[str, Any] = {
        "run": "".join(letter if letter.isalnum() else "-" for letter in name),
        "storage": str(folder),
        "steps": check.pick(20, 3),
        "batch_size": 8,
        "micro_batch_size": 4,
        "log_every": 1,
        "data": {"train": str(folder / "train.jsonl"), "sequence_length": length},
        "model": {
            "preset": "tiny",
            "config": check.pick(MODEL, TINY),
            "gradient_checkpointing": recomputing,
        },
        "tokenizer": {"vocab_size": 300},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "deepspeed": deepspeed,
    }
    if base is not None:
        del fields["tokenizer"]
        fields |= {"model": {"checkpoint": base}, "adapter": {"target_modules": TARGET_MODULES}}
    return Settings(**fields)


def on_the_cpu(settings: Settings) -> list[float]:
    """Losses of a plain loop in fp32, each global batch as a whole."""
    data = make_data(settings, prepare_tokenizer(settings)).train
    config = make_config(settings, prepare_tokenizer(settings), data.labels)
    torch.manual_seed(settings.seed)
    if settings.adapter is None:
        model = GPTJForCausalLM(config)
    else:
        model = GPTJForCausalLM.from_pretrained(settings.model.checkpoint)
        add_lora(model, settings.adapter.lora())
    model.train()
    total = settings.total_steps(len(data))
    chosen = settings.optimizer
    optimizer = torch.optim.AdamW(
        parameter_groups(model, chosen.weight_decay),
        lr=chosen.learning_rate,
        betas=(chosen.beta1, chosen.beta2),
        eps=chosen.epsilon,
    )
    order = BatchOrder(len(data), settings.batch_size, settings.seed)
    losses = []
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = chosen.learning_rate * learning_rate_share(chosen, step, total)
        batch = data.collate([data[i] for i in order.indices(step)])
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), chosen.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@contextmanager
def ranks(check: Check) -> Iterator[None]:
    """A group of one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0")
    os.environ["WORLD_SIZE"] = "1"
    if not check.rehearsal:
        torch.cuda.set_device(0)
    torch.distributed.init_process_group(check.pick("nccl", "gloo"), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def compare(
    check: Check, variant: str, settings: Settings, expected: list[float], *, compiled: bool
) -> None:
    """The losses of all steps beside the CPU's, and the most memory that was taken."""
    prepare_tokenizer(settings)
    device = torch.device(check.device.kind, 0) if not check.rehearsal else torch.device("cpu")
    losses: list[float] = []

    def report(
        metrics: dict[str, float], folder: Path, name: str, fence: Callable[[], None]
    ) -> None:
        upload_state(folder, storage.join(settings.folder, name), 0, 1, fence)

    def watch(point: dict[str, float]) -> None:
        if "loss" in point:
            losses.append(point["loss"])

    def plan(settings: Settings, device_type: str, world_size: int) -> dict[str, Any]:
        config = deepspeed_config(settings, device_type, world_size)
        config["optimizer"]["params"]["torch_adam"] = not compiled or check.rehearsal
        return config

    def in_memory(settings: Settings, tokenizer: GPTJTokenizer, *_: Any) -> TaskData:
        return make_data(settings, tokenizer)  # prepared data needs pyarrow, which is not carried

    check.device.reset_peak()
    with (
        mock.patch.object(loop, "deepspeed_config", plan),
        mock.patch.object(agreement, "node_data", in_memory),
    ):
        seconds, _ = check.wall(lambda: train(settings, Worker(0, 1, device, report, watch)))
    precision = settings.deepspeed.precision
    differences = [abs(a - b) for a, b in zip(losses, expected, strict=False)]
    falling = losses[-1] < losses[0]
    check.add(
        "training",
        variant=variant,
        optimizer="DeepSpeed's own" if compiled else "PyTorch's AdamW",
        precision=precision,
        steps=len(losses),
        losses=losses,
        largest_difference=max(differences, default=float("nan")),
        seconds=seconds,
        right=bool(differences) and falling and max(differences) < NEAR[precision],
        **check.device.memory(),
    )


def one_layer(check: Check) -> None:
    """Forward and backward of a 6B layer in bf16, as the difference of three layers and one."""
    rows, length = check.pick((4, 1024), (2, 16))
    ways: tuple[Recomputation, ...] = (False, "selective", True)
    for recomputing in ways:
        timings = {}
        for layers in (1, 3):
            config = check.config(layers)
            timings[layers] = _forward_and_backward(check, config, rows, length, recomputing)
        milliseconds = (timings[3] - timings[1]) / 2
        one = check.config(1)
        tokens = rows * length
        attention = 2 * one.n_embd * length * (length + 1) * rows
        operations = 3.0 * (2 * matrix_parameters(one) * tokens + attention)
        rate = operations / max(milliseconds, 1e-6) * 1e3
        check.add(
            "one layer",
            dtype="bf16",
            rows=rows,
            tokens=length,
            recomputing=recomputing,
            ms=milliseconds,
            tflops=rate / 1e12,
            share_of_matrix_peak=rate / check.matrix_peak,  # recomputing counts for nothing
        )


def _forward_and_backward(
    check: Check, config: GPTJConfig, rows: int, length: int, recomputing: Recomputation
) -> float:
    """Milliseconds; and a line with the memory that it took, beside an estimate."""
    model = random_model(config, torch.bfloat16, check.device.kind).train()
    if recomputing:
        model.gradient_checkpointing_enable(selective=recomputing == "selective")
    ids = torch.randint(config.vocab_size, (rows, length), device=check.device.kind)

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=False)  # gradients stay where they are

    check.device.reset_peak()
    timing = check.time(step, warm_up=2, repeats=5, calls=2)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    values = rows * length * config.n_embd
    # Numbers of a layer that wait for the backward pass: input, norm, q, k, v, attended, and four
    # times the width before and after the activation. Selectively, without the norm and what comes
    # after rotation and activation, but with the projection of what was attended to.
    kept_values = {False: 15, "selective": 10, True: 1}[recomputing]
    kept = config.n_layer * values * 2 * kept_values + (15 * 2 * values)
    logits = rows * length * config.vocab_size * (2 + 4 + 4)
    check.add(
        "memory of training",
        layers=config.n_layer,
        recomputing=recomputing,
        rows=rows,
        tokens=length,
        estimate_gb=(parameters * 4 + kept + logits) / 1e9,
        ms=timing["ms"],
        **check.device.memory(),
    )
    return float(timing["ms"])


if __name__ == "__main__":
    run(main)

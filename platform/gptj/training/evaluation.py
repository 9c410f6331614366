"""Evaluation on one or many ranks: a model and data in, metrics out.

Each rank collects a part (sums and predictions); the metrics are computed from all parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gptj.training.loader import to_device
from gptj.training.tasks import AnyTask, Data, Part


def evaluate(
    task: AnyTask,
    model: nn.Module,
    data: Data,
    *,
    batch_size: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[Part], Iterable[Part]] | None = None,
) -> dict[str, float]:
    """The task's metrics over all of `data`.

    Args:
        batch_size: examples per forward pass on each rank.
        rank, world_size: of this process; all ranks must call this.
        reduce: this rank's part in, the parts of all ranks out, like all_gather_object; required
            if world_size is above 1, forbidden otherwise.
    """
    if (world_size > 1) != (reduce is not None):
        raise ValueError(f"reduce is for world_size > 1 only, and required there; got {world_size}")
    part = collect(
        task,
        model,
        data,
        batch_size=batch_size,
        device=device,
        rank=rank,
        world_size=world_size,
    )
    return metrics(task, data, [part] if reduce is None else reduce(part))


def collect(
    task: AnyTask,
    model: nn.Module,
    data: Data,
    *,
    batch_size: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
) -> Part:
    """Run this rank's share of the examples through the model.

    Every rank calls the model equally often, since ZeRO-3 gathers weights for each call: a rank
    without examples left repeats one and discards the result.
    """
    if batch_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size must be 1 or more and rank in [0, world_size), got "
            f"batch_size={batch_size}, rank={rank}, world_size={world_size}"
        )
    part = Part()
    with evaluating(model):
        for start in range(0, len(data), batch_size * world_size):
            first = start + rank * batch_size
            mine = range(first, min(first + batch_size, len(data)))
            batch = data.collate([data[index] for index in mine or range(1)])
            items = data.count_items(batch)
            loss, output = task.forward(model, to_device(batch, device), items)
            if mine:
                part.loss += float(loss)
                part.items += items
                part.outputs.update(zip(mine, task.outputs(data, output, mine), strict=False))
    return part


def metrics(task: AnyTask, data: Data, parts: Iterable[Part]) -> dict[str, float]:
    """The task's metrics from the parts of all ranks."""
    whole = Part()
    for part in parts:
        whole.loss += part.loss
        whole.items += part.items
        whole.outputs.update(part.outputs)
    return task.metrics(data, whole)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode for the block."""
    training = model.training
    model.eval()
    try:
        # Not inference_mode: ZeRO-3 keeps weights gathered here for the next training step, where
        # autograd rejects inference tensors.
        with torch.no_grad():
            yield
    finally:
        model.train(training)

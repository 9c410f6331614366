"""How good a model is: a model and data in, numbers out, computed on one rank or on many.

Each rank collects a part (sums and predictions); the metrics come from all parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

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
        batch_size: examples that a rank computes at a time.
        rank, world_size: this process among those that share the work; all of them must call this.
        reduce: this rank's part in, the parts of all ranks out, as by all_gather_object; needed
            where world_size is above 1.
    """
    if (world_size > 1) != (reduce is not None):
        raise ValueError(f"reduce gathers the parts of all ranks, and world_size is {world_size}")
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
    """This rank's share of the examples, run through the model.

    Every rank calls the model equally often (ZeRO-3 gathers its weights for each call): one that
    has no examples left repeats some, and drops the result.
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
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            loss, output = task.forward(model, inputs, items)
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
    """The model in evaluation mode, and as it was after that."""
    training = model.training
    model.eval()
    try:
        # Not inference_mode: ZeRO-3 keeps weights that it gathers here for the next training
        # step, which may not use tensors made in that mode.
        with torch.no_grad():
            yield
    finally:
        model.train(training)

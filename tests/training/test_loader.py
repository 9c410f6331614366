"""The loader: what a step gets follows from its number, and is there before the step asks."""

from __future__ import annotations

import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptj.data.batches import BatchOrder
from gptj.training.loader import Loader


class Numbers:
    """Examples that are their own numbers; it notes which thread collates what."""

    labels = None

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self.made: list[tuple[str, list[int]]] = []

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, examples: list[int]) -> dict[str, Tensor]:
        if -1 in examples:
            raise ValueError("no example")
        self.made.append((threading.current_thread().name, examples))
        ids = torch.tensor([examples])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def count_items(self, batch: dict[str, Tensor]) -> int:
        return batch["input_ids"].numel()

    def count_tokens(self, batch: dict[str, Tensor]) -> int:
        return batch["input_ids"].numel()

    def summary(self) -> str:
        return ""

    def save(self, folder: Path) -> None: ...


def loader(data: Any, rank: int = 0, world: int = 1, *, first: int = 0, last: int) -> Loader:
    order = BatchOrder(len(data), 8, seed=3)
    return Loader(data, order, rank=rank, world_size=world, micro_batch=2, first=first, last=last)


def rows_of(batches: Any) -> list[int]:
    return [row for batch in batches.batches for row in batch["input_ids"].flatten().tolist()]


def test_interrupted_runs_see_each_row_of_an_epoch_once() -> None:
    """Tries that end anywhere, each by other numbers of workers, from the last checkpoint on."""
    generator = random.Random(0)
    data = Numbers(1000)
    steps = 3 * 1000 // 8
    done, kept = 0, []  # steps of the last checkpoint, and the rows of these
    while done < steps:
        world = generator.choice((1, 2, 4))
        end = min(steps, done + generator.randint(1, 60))
        checkpoint = generator.randint(done, end)
        if end == steps:
            checkpoint = end
        tries = [loader(data, rank, world, first=done, last=steps) for rank in range(world)]
        for each in tries:
            each.__enter__()
        for step in range(done, end):
            rows = [row for each in tries for row in rows_of(each.next()[0])]
            if step < checkpoint:
                kept.append(rows)
        for each in tries:
            each.__exit__(None, None, None)
        done = checkpoint
    assert len(kept) == steps
    flat = [row for rows in kept for row in rows]
    for epoch in range(3):
        assert Counter(flat[1000 * epoch : 1000 * epoch + 1000]) == Counter(range(1000))
    order = BatchOrder(1000, 8, seed=3)
    assert kept == [order.indices(step) for step in range(steps)]


def test_only_the_next_steps_batches_are_prefetched() -> None:
    data = Numbers(64)
    with loader(data, last=3) as batches:
        for step in range(3):
            found, waited = batches.next()
            assert (found.items, found.tokens, found.room) == (8, 8, 8)
            assert found.pairs == 4 * 2**2  # a micro-batch is one row of two
            assert waited >= 0
            assert len(data.made) <= 4 * min(3, step + 2)
    assert len(data.made) == 12
    assert {name.startswith("loader") for name, _ in data.made} == {True}
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]


def test_a_collation_error_is_raised_by_its_step() -> None:
    class Broken(Numbers):
        def __getitem__(self, index: int) -> int:
            return -1

    with loader(Broken(64), last=3) as batches, pytest.raises(ValueError, match="no example"):
        batches.next()


def test_a_rank_with_fewer_rows_gets_an_empty_batch() -> None:
    """Eight rows among five ranks, a row at a time: the last two have one row and two steps."""
    data = Numbers(16)
    order = BatchOrder(len(data), 8, seed=3)
    rows: list[int] = []
    for rank in range(5):
        with Loader(
            data, order, rank=rank, world_size=5, micro_batch=1, first=0, last=1
        ) as batches:
            step, _ = batches.next()
        assert len(step.batches) == 2
        assert step.items == step.tokens == step.counted == (2 if rank < 3 else 1)
        rows += rows_of(step)[: step.counted]
    assert rows == order.indices(0)

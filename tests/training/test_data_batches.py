"""Batches: every example once an epoch, whatever the step that a run resumes at or its workers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptj.data.batches import BatchOrder, micro_batches, share


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31))
def test_every_epoch_has_every_example_once(examples: int, batch: int, seed: int) -> None:
    order = BatchOrder(examples, batch, seed)
    steps = -(-3 * examples // batch)
    stream = [index for step in range(steps) for index in order.indices(step)]
    assert all(len(order.indices(step)) == batch for step in range(steps))
    for epoch in range(3):
        assert sorted(stream[epoch * examples : (epoch + 1) * examples]) == list(range(examples))


def test_a_step_has_the_same_batch_whatever_came_before_it() -> None:
    whole = [BatchOrder(100, 7, seed=3).indices(step) for step in range(40)]
    resumed = BatchOrder(100, 7, seed=3)
    assert [resumed.indices(step) for step in range(25, 40)] == whole[25:]
    assert resumed.indices(2) == whole[2]


def test_the_order_is_numpys_for_seed_and_epoch() -> None:
    """Fixed here, so that a run resumes in the same order after an upgrade."""
    order = BatchOrder(8, 8, seed=5)
    assert order.indices(0) == np.random.default_rng([5, 0]).permutation(8).tolist()
    assert order.indices(1) == np.random.default_rng([5, 1]).permutation(8).tolist()
    assert order.indices(0) == [1, 4, 2, 3, 7, 5, 6, 0]
    assert BatchOrder(8, 8, seed=6).indices(0) != order.indices(0) != order.indices(1)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 12), (1, 1), (2, 3), (3, 4), (4, 1)])
def test_ranks_partition_a_batch(world_size: int, micro_batch: int) -> None:
    batch = BatchOrder(50, 12, seed=1).indices(3)
    parts = [share(batch, rank, world_size, micro_batch) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    assert {len(micro) for part in parts for micro in part} == {micro_batch}
    assert [index for part in parts for micro in part for index in micro] == batch


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 7))
def test_a_batch_that_does_not_divide_is_shared_as_evenly_as_can_be(
    batch: int, world_size: int, micro_batch: int
) -> None:
    """Every rank makes as many steps as DeepSpeed is told, and at most the last one is empty."""
    if batch < world_size:
        return
    parts = [share(range(batch), rank, world_size, micro_batch) for rank in range(world_size)]
    assert [index for part in parts for micro in part for index in micro] == list(range(batch))
    assert {len(part) for part in parts} == {micro_batches(batch, world_size, micro_batch)}
    sizes = [sum(map(len, part)) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert max(len(micro) for part in parts for micro in part) <= micro_batch
    assert all(micro for part in parts for micro in part[:-1])
    assert all(part[0] for part in parts)


def test_too_few_examples_for_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 2 examples is too small for 3 ranks"):
        share(range(2), 0, 3, 4)
    with pytest.raises(ValueError, match="rank=2, world_size=2"):
        share(range(8), 2, 2, 4)


@pytest.mark.parametrize("fields", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_an_empty_data_set_is_refused(fields: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        BatchOrder(*fields)
    with pytest.raises(ValueError, match="step must be 0 or more, got -1"):
        BatchOrder(1, 1, 0).indices(-1)

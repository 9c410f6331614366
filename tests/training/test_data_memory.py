"""Data of any size takes the same memory: the peak at one size also holds for three times it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from gptj import GPTJTokenizer
from gptj.data.batches import BatchOrder
from gptj.data.preparing import prepare
from gptj.data.shards import TaskName
from gptj.training.dataset import node_data, raw_plan
from gptj.training.loader import Loader
from gptj.training.settings import Settings
from gptj_bench.data_memory import WORDS, write_rows

pytestmark = pytest.mark.slow

SHARD = 6_000  # characters


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.train([" ".join(WORDS), "0123456789"], 400)


def peak(task: TaskName, folder: Path, rows: int, tokenizer: GPTJTokenizer) -> int:
    """Bytes that Python and numpy had allocated at most, from raw rows to the last batch."""
    folder.mkdir()
    write_rows(folder / "all.jsonl", task, 0.25)
    lines = (folder / "all.jsonl").read_text().splitlines(keepends=True)[:rows]
    (folder / "rows.jsonl").write_text("".join(lines))
    settings = Settings(
        task=task,
        storage=str(folder),
        data={"train": str(folder / "rows.jsonl")},  # type: ignore[arg-type]
    )
    tracemalloc.start()
    try:
        plan = raw_plan(settings, "train", tokenizer, chunk_characters=SHARD)
        prepare(plan, str(folder / "prepared"), tokenizer)
        prepared = {"train": str(folder / "prepared")}
        data = node_data(settings, tokenizer, folder, prepared).train
        steps = len(data) // 8
        order = BatchOrder(len(data), 8, seed=0)
        with Loader(
            data, order, rank=0, world_size=1, micro_batch=8, first=0, last=steps
        ) as loader:
            for _ in range(steps):
                loader.next()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("task", ["causal-lm", "classification", "question-answering"])
def test_memory_from_raw_rows_to_batches_does_not_grow_with_the_data(
    task: TaskName, tmp_path: Path, tokenizer: GPTJTokenizer
) -> None:
    peak(task, tmp_path / "first", 12, tokenizer)  # what is allocated once
    small, large = (peak(task, tmp_path / str(n), n, tokenizer) for n in (40, 160))
    assert large < 1.25 * small + 50_000

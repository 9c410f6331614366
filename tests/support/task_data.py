"""A run's data, read and tokenized in memory: what prepared data is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gptj import GPTJTokenizer
from gptj.config import GPTJConfig
from gptj.data.causal_lm import CausalLMData
from gptj.data.packing import Packing
from gptj.data.prepared import Prepared
from gptj.data.rows import Row
from gptj.data.sources import find_columns, read_rows
from gptj.data.split import Split, split_rows
from gptj.training.dataset import TaskData
from gptj.training.settings import Settings


def make_data(settings: Settings, tokenizer: GPTJTokenizer) -> TaskData:
    """Without fingerprints."""
    task, labels = settings.task_definition, None
    if checkpoint := settings.model.checkpoint:
        config = GPTJConfig.from_pretrained(checkpoint)
        labels = task.known_labels(config, checkpoint, settings.data)
    train = task.read(_rows(settings, settings.train_data), tokenizer, settings.data, labels)
    if settings.evaluation_data is None:
        return TaskData(train, None, {}, {})
    rows = _rows(settings, settings.evaluation_data, held_out=True)
    return TaskData(train, task.read(rows, tokenizer, settings.data, train.labels), {}, {})


def packed(
    folder: Path,
    address: str,
    tokenizer: GPTJTokenizer,
    sequence_length: int,
    packing: Packing = "concatenate",
) -> CausalLMData:
    """A language model's prepared data, by way of a new folder."""
    prepared = Prepared.at(address)
    assert prepared is not None
    CausalLMData.write(folder, prepared, tokenizer, sequence_length, packing)
    return CausalLMData.load(folder)


def _rows(settings: Settings, address: str, *, held_out: bool = False) -> Iterator[Row]:
    data, kinds = settings.data, settings.task_definition.row_kinds
    columns = find_columns(address, kinds, data.columns, delimiter=data.delimiter)
    rows = read_rows(address, columns, data.columns, delimiter=data.delimiter)
    if data.evaluation_split is None:
        return rows
    cut = "text" if settings.task == "causal-lm" else None
    return split_rows(rows, Split(data.evaluation_split, settings.seed, held_out, cut))

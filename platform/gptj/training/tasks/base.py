"""The interface of a task to the loop and the evaluation: its data, head, loss and metrics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from gptj.config import GPTJConfig
from gptj.data.labels import LabelSet
from gptj.data.prepared import Prepared
from gptj.data.rows import Row
from gptj.data.shards import SHARD_KINDS, TaskName
from gptj.model import GPTJPreTrainedModel
from gptj.tokenizer import GPTJTokenizer
from gptj.training.sections import DataSettings


class Data(Protocol):
    """A tokenized data set: examples by number, and batches of them."""

    @property
    def labels(self) -> LabelSet | None:
        """A classifier's labels; None for other tasks."""

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def collate(self, examples: list[Any]) -> dict[str, Tensor]: ...

    def count_items(self, batch: dict[str, Tensor]) -> int:
        """Number of items that the loss averages over: tokens or rows."""

    def count_tokens(self, batch: dict[str, Tensor]) -> int:
        """Tokens that are not padding."""

    def summary(self) -> str:
        """A line for the log."""


@dataclass
class Part:
    """One rank's share of an evaluation; plain values, so that it can be pickled."""

    loss: float = 0.0  # summed over items
    items: int = 0
    # Results of Task.outputs, by the example's index.
    outputs: dict[int, Any] = field(default_factory=dict)


D = TypeVar("D", bound=Data)


class Task(ABC, Generic[D]):
    """A task that GPT-J can be trained for."""

    name: TaskName
    head: type[GPTJPreTrainedModel]
    text_columns: tuple[str, ...] = ("text",)  # a new tokenizer is trained on these
    sample: str  # built-in data
    best_by: tuple[str, ...] = ("loss",)  # the first of these that exists ranks models
    own_settings: tuple[str, ...] = ()  # keys of `data` that apply only to this task

    @property
    def row_kinds(self) -> tuple[tuple[str, ...], ...]:
        """Column names, ours, of each kind of row."""
        return SHARD_KINDS[self.name].row_kinds

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that the task reads, by our names."""
        return tuple(dict.fromkeys(column for kind in self.row_kinds for column in kind))

    def texts(self, row: Row) -> list[str]:
        """The texts to train a tokenizer on."""
        return [row.text(column) for column in self.text_columns if column in row.values]

    @abstractmethod
    def read(
        self,
        rows: Iterable[Row],
        tokenizer: GPTJTokenizer,
        options: DataSettings,
        labels: LabelSet | None = None,
    ) -> D:
        """Tokenize rows into memory.

        Args:
            labels: of the training data or the checkpoint; None: taken from the rows.

        Raises:
            DataError: naming the row that does not fit.
        """

    @abstractmethod
    def write(
        self,
        folder: Path,
        prepared: Prepared,
        tokenizer: GPTJTokenizer,
        options: DataSettings,
        labels: LabelSet | None = None,
    ) -> None:
        """Tokenize prepared data to a new folder, holding one shard in memory.

        Raises:
            DataError: if it was prepared for another task or tokenizer, or as in `read`.
            CheckpointError: for a damaged shard.
        """

    def labels_in(
        self, parts: Sequence[Prepared], options: DataSettings, labels: LabelSet | None = None
    ) -> LabelSet | None:
        """A classifier's labels in all parts of one data set, and how they are written there.

        Args:
            labels: of the checkpoint; None: taken from the parts.

        Raises:
            DataError: naming the row that does not fit.
        """
        return labels

    @abstractmethod
    def load(self, folder: Path) -> D:
        """Memory-map the data written by `write`."""

    def forward(self, model: nn.Module, batch: dict[str, Tensor], items: int) -> tuple[Tensor, Any]:
        """A batch's loss, summed over its items so that batches add up, and the output.

        Args:
            batch: on the model's device.
            items: by Data.count_items.
        """
        output = model(**batch, use_cache=False)
        return output.loss * items, output

    def outputs(self, data: D, output: Any, examples: Sequence[int]) -> list[Any]:
        """Plain values that the metrics need from each example of a batch."""
        return []

    @abstractmethod
    def metrics(self, data: D, whole: Part) -> dict[str, float]:
        """The task's metrics over all of the data, including `loss`."""

    def score(self, metrics: dict[str, float]) -> float:
        """A score that ranks models by their metrics; higher is better."""
        name = next(each for each in self.best_by if each in metrics)
        return -metrics[name] if name in ("loss", "mse") else metrics[name]

    def is_better(self, metrics: dict[str, float], than: dict[str, float]) -> bool:
        """Whether an evaluation ranks higher than an earlier one.

        By their losses if their scores are equal: an F1 often stays the same, at 0 or 1 above all,
        while the loss shows that the model still learns. NaN is worse than anything.
        """

        def rank(each: dict[str, float]) -> tuple[float, ...]:
            # NaN is null in a checkpoint.
            each = {name: math.nan if value is None else value for name, value in each.items()}
            both = (self.score(each), -each["loss"])
            return tuple(-math.inf if math.isnan(value) else value for value in both)

        return rank(metrics) > rank(than)

    def check(self, options: DataSettings) -> None:
        """ValueError if the settings contradict each other."""

    def labels_of(
        self, config: GPTJConfig, record: Mapping[str, Any] | None = None
    ) -> LabelSet | None:
        """The labels of a trained classifier; None for other tasks and heads.

        Args:
            record: how its training's data wrote them (LabelSet.record), if known.
        """
        return None

    def known_labels(
        self,
        config: GPTJConfig,
        checkpoint: str,
        options: DataSettings,
        record: Mapping[str, Any] | None = None,
    ) -> LabelSet | None:
        """The labels that a run keeps from its initial checkpoint.

        Args:
            record: as in labels_of.

        Raises:
            SettingsError: if the settings contradict them.
        """
        return None


def check_all_there(data: Data, part: Part) -> None:
    """ValueError if a rank's examples are missing."""
    if len(part.outputs) != len(data):
        raise ValueError(f"parts of {len(part.outputs)} examples, but there are {len(data)}")

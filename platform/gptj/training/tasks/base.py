"""What the loop and the evaluation know of a task: its data, head, loss and metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
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
        """What a classifier tells apart; None for other tasks."""

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def collate(self, examples: list[Any]) -> dict[str, Tensor]: ...

    def count_items(self, batch: dict[str, Tensor]) -> int:
        """What the loss averages over: tokens or rows."""

    def count_tokens(self, batch: dict[str, Tensor]) -> int:
        """Tokens that are not padding."""

    def summary(self) -> str:
        """A line for the log."""


@dataclass
class Part:
    """What one rank has evaluated; plain values, which pickle."""

    loss: float = 0.0  # summed over items
    items: int = 0
    # What Task.outputs gives, by the number of the example.
    outputs: dict[int, Any] = field(default_factory=dict)


D = TypeVar("D", bound=Data)


class Task(ABC, Generic[D]):
    """One thing that GPT-J can be trained for."""

    name: TaskName
    head: type[GPTJPreTrainedModel]
    text_columns: tuple[str, ...] = ("text",)  # of these, what a tokenizer learns from
    sample: str  # data that needs no download
    best_by: tuple[str, ...] = ("loss",)  # the metric that ranks models: the first there is
    own_settings: tuple[str, ...] = ()  # keys of `data` that mean nothing to other tasks

    @property
    def row_kinds(self) -> tuple[tuple[str, ...], ...]:
        """Our names of the columns that each kind of rows has."""
        return SHARD_KINDS[self.name].row_kinds

    @property
    def columns(self) -> tuple[str, ...]:
        """Our names of all columns that it reads."""
        return tuple(dict.fromkeys(column for kind in self.row_kinds for column in kind))

    def texts(self, row: Row) -> list[str]:
        """What a tokenizer learns from."""
        return [row.text(column) for column in self.text_columns if column in row.values]

    @abstractmethod
    def read(
        self,
        rows: Iterable[Row],
        tokenizer: GPTJTokenizer,
        options: DataSettings,
        labels: LabelSet | None = None,
    ) -> D:
        """Tokenize rows, into memory.

        Args:
            labels: of the training data or of the checkpoint; None finds them in the rows.

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
        """The same of prepared data, to a new folder, in as much memory as a shard takes.

        Raises:
            DataError: if the task or the tokenizer is another, or as `read`.
            CheckpointError: for a damaged shard.
        """

    @abstractmethod
    def load(self, folder: Path) -> D:
        """What `write` has written, memory-mapped."""

    def forward(self, model: nn.Module, batch: dict[str, Tensor], items: int) -> tuple[Tensor, Any]:
        """A batch's loss as a sum over its items, which batches can share, and the output.

        Args:
            batch: on the model's device.
            items: by Data.count_items.
        """
        output = model(**batch, use_cache=False)
        return output.loss * items, output

    def outputs(self, data: D, output: Any, examples: Sequence[int]) -> list[Any]:
        """What the metrics need of each example of a batch, as plain values."""
        return []

    @abstractmethod
    def metrics(self, data: D, whole: Part) -> dict[str, float]:
        """The task's numbers over all of the data, `loss` among them."""

    def score(self, metrics: dict[str, float]) -> float:
        """What ranks models by their metrics; higher is better."""
        name = next(each for each in self.best_by if each in metrics)
        return -metrics[name] if name in ("loss", "mse") else metrics[name]

    def check(self, options: DataSettings) -> None:
        """ValueError if the settings contradict each other."""

    def labels_of(self, config: GPTJConfig) -> LabelSet | None:
        """What a model with this task's head tells apart, if it is a classifier."""
        return None

    def known_labels(
        self, config: GPTJConfig, checkpoint: str, options: DataSettings
    ) -> LabelSet | None:
        """The labels that a run keeps from the checkpoint that it begins with.

        Raises:
            SettingsError: if the settings contradict them.
        """
        return None


def check_all_there(data: Data, part: Part) -> None:
    """ValueError if a rank's examples are missing."""
    if len(part.outputs) != len(data):
        raise ValueError(f"parts of {len(part.outputs)} examples, but there are {len(data)}")

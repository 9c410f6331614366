"""Computes concurrent requests' rows together: token ids in, a head's results out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from gptj.engine.backends import IntQuantization
from gptj.engine.request import check_ids
from gptj.engine.row_models import best_row_model, default_max_tokens
from gptj.pretrained import GPTJPreTrainedModel
from gptj.serving.errors import InvalidRequestError
from gptj.serving.metrics import NoRecorder, Recorder
from gptj.serving.results import results_of
from gptj.workers.batcher import Batcher, BatchTimes

Result = TypeVar("Result")


@dataclass(frozen=True)
class Batching:
    """Limits of a service's batches, and how it keeps its weights."""

    max_batch: int  # rows
    max_queued: int  # rows waiting
    # Tokens; a longer row is a batch of its own. Default: 256 on a CPU, and on a GPU what
    # max_batch rows can have.
    max_num_batched_tokens: int | None = None
    quantization: IntQuantization = "none"
    release: bool = False  # move the weights out of the model instead of copying them
    max_queue_seconds: float | None = None  # longest that a row may be expected to wait


class BatchedRows(Generic[Result]):
    """A model's body, and a head that reads its final hidden states.

    A batch is as many waiting rows as the limits allow; the next begins as soon as it ends.

    Args:
        name: for logs.
        head: called with each row's states (W, D), on the model's device; returns its result.
        last_only: W is 1, a row's last token; otherwise a row's length.
    """

    def __init__(
        self,
        name: str,
        model: GPTJPreTrainedModel,
        head: Callable[[list[Tensor]], Sequence[Result]],
        batching: Batching,
        recorder: Recorder | None = None,
        *,
        last_only: bool,
    ) -> None:
        self._head = head
        self._vocab_size = model.config.vocab_size
        self._last_only = last_only
        self._recorder = recorder or NoRecorder()
        limit = batching.max_num_batched_tokens or default_max_tokens(
            model.device, batching.max_batch, model.config.n_positions
        )
        self._model = best_row_model(
            model,
            max_rows=batching.max_batch,
            max_tokens=limit,
            quantization=batching.quantization,
            release=batching.release,
            heartbeat=lambda: self._batcher.heartbeat(),  # long batches report progress
        )
        self._batcher: Batcher[list[int], Result] = Batcher(
            name,
            self._compute,
            max_batch=batching.max_batch,
            max_queued=batching.max_queued,
            max_queue_seconds=batching.max_queue_seconds,
            cost=len,
            max_cost=limit,
            observe=self._observe,
            finish=self._model.close,
        )

    def checked(self, rows: Sequence[list[int]]) -> Sequence[list[int]]:
        """The rows, if the model has their ids: another would fail all rows of its batch.

        A million ids take a while: not on the event loop. Raises InvalidRequestError.
        """
        for row in rows:
            if row and not 0 <= min(row) <= max(row) < self._vocab_size:
                try:
                    check_ids("inputs", row, self._vocab_size)
                except ValueError as error:
                    raise InvalidRequestError(str(error)) from error
        return rows

    async def results(self, rows: Sequence[list[int]]) -> list[Result]:
        """One for each of `checked` rows. Cancelling the call withdraws waiting rows.

        Raises QueueFullError, ClosedError or ModelError.
        """
        return await results_of(self._batcher.submit(rows))

    def alive(self, within_seconds: float) -> bool:
        return self._batcher.alive(within_seconds)

    def close(self) -> None:
        self._batcher.close()

    @torch.inference_mode()
    def _compute(self, rows: Sequence[list[int]]) -> Sequence[Result]:
        return self._head(self._model.hidden_states(rows, last_only=self._last_only))

    def _observe(self, rows: Sequence[list[int]], times: BatchTimes) -> None:
        self._recorder.batch(times.queued, sum(map(len, rows)), times.computing)

"""The Runner protocol: one step of the model over a paged KV cache.

Tokens of several sequences in, logits (W, V) out, on any device. Shape suffixes: R sequences,
T tokens of this step, W rows of logits, P pages of a sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptj.config import GPTJConfig
from gptj.engine.runners.lora import NONE, LoRAWeights

Ints = npt.NDArray[np.int32]

PAGE_SIZE = 16  # positions


@dataclass(frozen=True)
class StepBatch:
    """The new tokens of several sequences, concatenated without padding."""

    ids_T: Ints
    positions_T: Ints  # within its sequence; consecutive
    query_start_loc: Ints  # (R + 1): sequence r has tokens loc[r]:loc[r + 1], at least one
    page_table_RP: Ints  # each sequence's pages, in order; entries beyond its context are not read
    logits_indices: Ints  # (W): the tokens to return logits for, in this order
    adapters_R: Ints | None = None  # slot of each sequence's adapter, or NONE; None: no adapters
    # On the device of an asynchronous runner: replaces the first ids_T, not known to the host yet.
    device_ids: Tensor | None = None

    def slot(self, row: int) -> int:
        """The slot of a sequence's adapter."""
        return NONE if self.adapters_R is None else int(self.adapters_R[row])

    @property
    def slots_T(self) -> Ints:
        """The slot of each token's adapter."""
        if self.adapters_R is None:
            return np.full(len(self.ids_T), NONE, dtype=np.int32)
        return np.repeat(self.adapters_R, np.diff(self.query_start_loc))

    def check(self, config: GPTJConfig, page_size: int, num_pages: int) -> None:
        """Validate indices; kernels do not, and would access memory out of bounds."""
        for array in (
            self.ids_T,
            self.positions_T,
            self.query_start_loc,
            self.page_table_RP,
            self.logits_indices,
        ):
            assert array.dtype == "int32" and array.flags.c_contiguous
        assert self.ids_T.min() >= 0 and self.ids_T.max() < config.vocab_size
        last = int(self.positions_T.max())
        assert self.positions_T.min() >= 0 and last < config.n_positions
        assert last < self.page_table_RP.shape[1] * page_size
        assert self.page_table_RP.min() >= 0 and self.page_table_RP.max() < num_pages
        assert self.query_start_loc[0] == 0 and self.query_start_loc[-1] == len(self.ids_T)
        assert len(self.page_table_RP) == len(self.query_start_loc) - 1
        if self.adapters_R is not None:
            assert len(self.adapters_R) == len(self.page_table_RP)


class PageCopy(NamedTuple):
    """Copies the first `filled` positions of page `source` to page `target`, in all layers."""

    source: int
    target: int
    filled: int


def independent_groups(copies: Sequence[PageCopy]) -> Iterator[list[PageCopy]]:
    """Group copies so that each group can be made in any order or in parallel.

    A page may have been freed and reallocated between copies, so order matters between groups.
    """
    run: list[PageCopy] = []
    read: set[int] = set()
    written: set[int] = set()
    for copy in copies:
        if copy.source in written or copy.target in read or copy.target in written:
            yield run
            run, read, written = [], set(), set()
        run.append(copy)
        read.add(copy.source)
        written.add(copy.target)
    if run:
        yield run


class Draw(Protocol):
    """Draws a token for each of some rows, as `cuda.sampling.draw` does."""

    def __call__(
        self,
        logits_RV: Tensor,
        rows_D: Tensor,
        temperatures_D: Tensor,
        top_k_D: Tensor,
        top_p_D: Tensor,
        min_p_D: Tensor,
        uniforms_D: Tensor,
    ) -> Tensor: ...


class Runner(Protocol):
    """A model with a paged KV cache; not thread-safe."""

    config: GPTJConfig
    device: torch.device  # of the logits
    page_size: int  # positions of a page
    num_pages: int
    # Whether `step` returns before its logits are computed. The device executes steps, copies,
    # loads and resets in the order of the calls: pages and slots may be reused by later ones.
    asynchronous: bool
    draw: Draw | None  # samples from logits of `step`; None: PyTorch does

    def step(self, batch: StepBatch) -> Tensor:
        """Cache the tokens' keys and values, and return logits (W, V) in fp32.

        A token at position p is stored in its sequence's page p // page_size, slot p % page_size,
        and attends to its sequence's positions 0 to p.
        """

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Make the copies in order."""

    def load_adapter(self, slot: int, weights: LoRAWeights) -> None:
        """Put an adapter into a slot that no sequence uses; any thread may call this.

        A launched step may still read the slot: an asynchronous device loads after it.
        """

    def reset(self) -> None:
        """Clear the cache, after a failed step."""

    def close(self) -> None:
        """Free the runner's memory."""


class ResizableRunner(Runner, Protocol):
    def resize(self, num_pages: int) -> None:
        """Replace the cache by an empty one of `num_pages` pages."""

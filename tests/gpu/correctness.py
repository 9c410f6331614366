"""Steps at 6B's widths with two layers, against the model in fp32 and plain PyTorch.

One sequence as long as the context is computed by the model in fp32. Whatever a step computes is a
part of it: a row that decodes at position p has the sequence's first p tokens before it. Rows share
the pages before the one that they write to.
"""

from __future__ import annotations

import copy
import queue
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from checking import DTYPES, Check, run
from models import new_engine, new_model, new_runner, plain_runner, prompts
from torch import Tensor

from gptj import GPTJForCausalLM
from gptj.engine.engine import Engine
from gptj.engine.events import Failed, Finished, TokenEvent
from gptj.engine.request import one_by_one
from gptj.engine.runners.base import StepBatch
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.sampling import SamplingParams

PAGE = CudaRunner.page_size
# Largest difference, in standard deviations of the logits: sums in another order; 11 and 8 bits.
TOLERANCES = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.08}
ROWS = (1, 2, 3, 17, 64, 65, 256, 300)
CHUNK = 512


@dataclass
class Known:
    """A sequence, and what the model in fp32 makes of it."""

    ids: list[int]
    logits_LV: Tensor

    def batch(self, parts: Sequence[tuple[int, int]], pages: Sequence[Sequence[int]]) -> StepBatch:
        """A step of some parts of it, each (first, end), with logits after every token."""
        lengths = [end - first for first, end in parts]
        most = max(map(len, pages))
        positions = np.concatenate([np.arange(*part) for part in parts]).astype(np.int32)
        return StepBatch(
            np.array(self.ids, np.int32)[positions],
            positions,
            np.cumsum([0, *lengths]).astype(np.int32),
            np.array([[*each, *([0] * (most - len(each)))] for each in pages], np.int32),
            np.arange(len(positions), dtype=np.int32),
        )

    def error(self, logits_TV: Tensor, batch: StepBatch) -> tuple[float, float]:
        """The largest difference, in standard deviations, and the share of equal best tokens."""
        expected_TV = self.logits_LV[torch.from_numpy(batch.positions_T).long()]
        expected_TV = expected_TV.to(logits_TV.device)
        difference = (logits_TV - expected_TV).abs().max() / expected_TV.std()
        same = (logits_TV.argmax(-1) == expected_TV.argmax(-1)).float().mean()
        return float(difference), float(same)


class Paged:
    """A runner whose first pages hold the sequence."""

    def __init__(self, runner: CudaRunner, known: Known) -> None:
        self.runner = runner
        self.known = known
        self.shared = list(range(-(-len(known.ids) // PAGE)))

    def fill(self) -> Tensor:
        """Compute the sequence in chunks; its logits."""
        found, length = [], len(self.known.ids)
        for first in range(0, length, CHUNK):
            part = (first, min(first + CHUNK, length))
            found.append(self.runner.step(self.known.batch([part], [self.shared])).cpu())
        return torch.cat(found)

    def decoding(self, contexts: Sequence[int]) -> StepBatch:
        """A row for each context, with its last page of its own, filled up to its position."""
        tables, parts, fill = [], [], []
        for row, context in enumerate(contexts):
            whole, rest = divmod(context - 1, PAGE)
            own = len(self.shared) + row
            tables.append([*self.shared[:whole], own])
            parts.append((context - 1, context))
            if rest:
                fill.append(((context - 1 - rest, context - 1), tables[-1]))
        # Sequences of one token come first in a step.
        fill.sort(key=lambda each: each[0][1] - each[0][0] > 1)
        for start in range(0, len(fill), 32):
            some = fill[start : start + 32]
            self.runner.step(self.known.batch(*zip(*some, strict=True)))
        return self.known.batch(parts, tables)

    def poison(self, batch: StepBatch) -> Tensor:
        """NaN in all places that the rows of a decoding batch do not see; the cache before."""
        cache = self.runner._cache.data  # (2, layers, pages, heads, page size, width)
        before = cache.clone()
        seen = torch.zeros(cache.shape[2], PAGE, dtype=torch.bool)
        for position, table in zip(batch.positions_T.tolist(), batch.page_table_RP, strict=True):
            whole, rest = divmod(position, PAGE)
            seen[torch.from_numpy(table[:whole]).long()] = True
            seen[int(table[whole]), : rest + 1] = True
        cache.masked_fill_(~seen.to(cache.device)[None, None, :, None, :, None], torch.nan)
        return before


def main(check: Check) -> None:
    config = check.config(layers=2)
    with torch.inference_mode():
        model = new_model(check, config, torch.float32)
        (ids,) = prompts(config, [config.n_positions])
        expected = model(torch.tensor([ids], device=check.device.kind)).logits[0].cpu()
        known = Known(ids, expected)
        for name in check.pick(("fp16", "fp32", "bf16"), ("fp16",)):
            with check.attempt("steps", dtype=name):
                _steps(check, model, known, name)
        with check.attempt("plain operations"):
            _plain(check, model, known)
    with check.attempt("greedy text"):
        greedy_text(check, model)


def _steps(check: Check, model: GPTJForCausalLM, known: Known, name: str) -> None:
    rows = check.pick(ROWS, (1, 2))
    pages = -(-len(known.ids) // PAGE) + max(rows) + 8
    runner = new_runner(check, copy.deepcopy(model).to(DTYPES[name]), pages, interpreted=True)
    paged = Paged(runner, known)

    def compare(what: str, logits_TV: Tensor, batch: StepBatch, **values: object) -> None:
        error, same = known.error(logits_TV, batch)
        right = error < TOLERANCES[name]
        check.add(what, dtype=name, difference=error, same=same, right=right, **values)

    whole = known.batch([(0, len(known.ids))], [paged.shared])
    compare("a prompt in chunks equals fp32", paged.fill(), whole, chunk=CHUNK)
    for count in rows:
        batch = paged.decoding(_contexts(count, len(known.ids)))
        logits = runner.step(batch)
        compare("decoding rows equal fp32", logits, batch, rows=count)
        _graph_equals_eager(check, runner, batch, logits, name)
        before = paged.poison(batch)
        poisoned = runner.step(batch)
        check.add(
            "unseen places may be NaN",
            dtype=name,
            rows=count,
            right=torch.equal(poisoned, logits),
            not_finite=int((~poisoned.isfinite()).sum()),
        )
        runner._cache.data.copy_(before)
        del before, poisoned
    for count in check.pick((1, 17, 64), (1,)):
        parts, tables = _mixed(paged, count)
        batch = known.batch(parts, tables)
        compare("a mixed step equals fp32", runner.step(batch), batch, rows=count, parts=len(parts))
    _alternate(check, paged, rows, name)
    runner.close()


def _contexts(count: int, longest: int) -> list[int]:
    """From 1 to the longest, pages' borders among them."""
    special = [longest, 1, PAGE, PAGE + 1, longest - 1, 2 * PAGE, PAGE - 1]
    spread = np.linspace(1, longest, max(count, 2)).astype(int).tolist()
    return [*special, *spread][:count] if count < len(special) else special + spread[len(special) :]


def _mixed(paged: Paged, count: int) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Rows that decode, and then chunks with and without a past, on pages of their own."""
    batch = paged.decoding(_contexts(count, len(paged.known.ids)))
    parts = [(position, position + 1) for position in batch.positions_T.tolist()]
    tables = [table.tolist() for table in batch.page_table_RP]
    length, spare = len(paged.known.ids), len(paged.shared) + count
    for first, tokens in ((0, 33), (2 * PAGE, length // 8), (length // 2, length // 8)):
        first -= first % PAGE
        used = -(-tokens // PAGE)
        if spare + used > paged.runner.num_pages:
            break
        parts.append((first, first + tokens))
        tables.append([*paged.shared[: first // PAGE], *range(spare, spare + used)])
        spare += used
    return parts, tables


def _graph_equals_eager(
    check: Check, runner: CudaRunner, batch: StepBatch, logits: Tensor, name: str
) -> None:
    if runner._graphs is None:
        check.add("a graph equals its kernels", dtype=name, rows=len(logits), skipped="no graphs")
        return
    graphs, runner._graphs = runner._graphs, None
    try:
        eager = runner.step(batch)
    finally:
        runner._graphs = graphs
    check.add(
        "a graph equals its kernels",
        dtype=name,
        rows=len(logits),
        right=torch.equal(eager, logits),
        difference=float((eager - logits).abs().max()),
    )


def _alternate(check: Check, paged: Paged, rows: Sequence[int], name: str) -> None:
    """Batches of all sizes in any order give each time what they gave the first time."""
    length = len(paged.known.ids)
    # The same row is the same in all of them; the largest has filled all pages last.
    batches = [paged.decoding([length - row % 3 for row in range(count)]) for count in sorted(rows)]
    first = [paged.runner.step(batch) for batch in batches]
    numbers, steps, wrong = random.Random(0), check.pick(500, 2), 0
    for _ in range(steps):
        place = numbers.randrange(len(batches))
        wrong += not torch.equal(paged.runner.step(batches[place]), first[place])
    check.add("alternating sizes", dtype=name, steps=steps, wrong=wrong, right=wrong == 0)


def _plain(check: Check, model: GPTJForCausalLM, known: Known) -> None:
    """The plain operations in fp16, beside which ours are to be no worse."""
    rows = check.pick((1, 17, 65), (2,))
    pages = len(known.ids) // PAGE + max(rows) + 2
    runner = plain_runner(copy.deepcopy(model).to(torch.float16), pages)
    paged = Paged(runner, known)
    whole = known.batch([(0, len(known.ids))], [paged.shared])
    error, same = known.error(paged.fill(), whole)
    check.add("plain: a prompt in chunks", dtype="fp16", difference=error, same=same)
    for count in rows:
        batch = paged.decoding(_contexts(count, len(known.ids)))
        error, same = known.error(runner.step(batch), batch)
        check.add("plain: decoding rows", dtype="fp16", difference=error, same=same, rows=count)
    runner.close()


def greedy_text(check: Check, model: GPTJForCausalLM) -> None:
    """The engine's in fp32 is that of `generate` for each prompt alone; in fp16 it may differ."""
    lengths, new = check.pick(((1, 7, 64, 300, 1000), 48), ((5,), 2))
    asked = prompts(model.config, lengths, seed=1)
    expected = []
    for prompt in asked:
        ids = torch.tensor([prompt], device=check.device.kind)
        text = model.generate(ids, max_new_tokens=new, eos_token_id=[])
        expected.append(text[0, len(prompt) :].tolist())
    for name in ("fp32", "fp16"):
        runner = new_runner(
            check, copy.deepcopy(model).to(DTYPES[name]), check.pick(512, 24), interpreted=True
        )
        engine = new_engine(runner, 8, check.pick(256, 16))
        try:
            found = [_text(engine, prompt, new) for prompt in asked]
        finally:
            engine.close()
            runner.close()
        equal = [ours == theirs for ours, theirs in zip(found, expected, strict=True)]
        share = sum(equal) / len(equal)
        right = {"right": share == 1} if name == "fp32" else {}
        check.add("greedy text equals generate in fp32", dtype=name, share=share, new=new, **right)


def _text(engine: Engine, prompt: Sequence[int], new: int) -> list[int]:
    events: queue.SimpleQueue[object] = queue.SimpleQueue()
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    engine.submit(prompt, params, one_by_one(events.put))
    ids: list[int] = []
    while not isinstance(event := events.get(timeout=120), Finished):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, TokenEvent):
            ids.append(event.token_id)
    return ids


if __name__ == "__main__":
    run(main)

"""The cost of dtypes: a model's perplexity on a text, computed by the engine in each dtype.

int4 is rounded to nearest as the model is loaded; a folder by jobs/quantize.py can stand beside it.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gptj import GPTJTokenizer
from gptj.data.causal_lm import CausalLMData
from gptj.data.sources import read_rows
from gptj.engine.engine import Engine
from gptj.engine.events import Event, Failed, Finished, PromptLogprobs
from gptj.engine.request import one_by_one
from gptj.sampling import SamplingParams
from gptj_bench.decode import load_runner


@dataclass(frozen=True)
class Perplexity:
    model: str
    data: str  # as for jobs/evaluate.py
    dtypes: tuple[str, ...]  # the first is the baseline
    quantized: str | None = None  # the same model's folder by jobs/quantize.py

    def run(self) -> Iterator[dict[str, Any]]:
        tokenizer = GPTJTokenizer.from_pretrained(self.model)
        first: float | None = None
        measured = [(self.model, dtype) for dtype in self.dtypes]
        if self.quantized is not None:
            measured.append((self.quantized, "int4"))
        for model, dtype in measured:
            loss, tokens = self._measure(model, dtype, tokenizer)
            first = loss if first is None else first
            yield {
                "engine": "gptj",
                "model": model,
                "dtype": dtype,
                "tokens": tokens,
                "perplexity": round(math.exp(loss), 4),
                f"above_{self.dtypes[0]}_percent": round(100 * math.expm1(loss - first), 4),
            }

    def _measure(self, model: str, dtype: str, tokenizer: GPTJTokenizer) -> tuple[float, int]:
        """Mean loss per token in nats, and the number of tokens."""
        runner = load_runner(model, dtype, lambda config: config.n_positions)
        rows = CausalLMData(read_rows(self.data, ["text"]), tokenizer, runner.config.n_positions)
        engine = Engine(runner, eos_ids=[], max_num_batched_tokens=512, max_queued=len(rows))
        try:
            losses = score(engine, [rows[index].ids.tolist() for index in range(len(rows))])
        finally:
            engine.close()
            runner.close()
        return sum(losses) / len(losses), len(losses)


@torch.inference_mode()
def score(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Loss in nats of each token except the prompts' first. Raises a failed request's error."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    for prompt in prompts:
        engine.submit(prompt, params, one_by_one(events.put))
    losses: list[float] = []
    running = len(prompts)
    while running:
        event = events.get()
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, PromptLogprobs):
            losses += [-each.logprob for each in event.tokens if each.logprob is not None]
        running -= isinstance(event, Finished)
    return losses

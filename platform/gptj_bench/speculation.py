"""The gain of speculation where outputs repeat, and its cost where they do not.

- copy: the continuation of a text's second copy, greedy, by a model that was trained to copy and
  then widened without changing its outputs, so that a step costs as much as a large model's.
- random: random prompts and outputs (temperature 1, random weights).
- hostile: the same with eight different tokens, so that drafts are found everywhere, and fail.

The engine runs alternately with and without speculation.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from gptj import GPTJConfig, GPTJForCausalLM
from gptj.engine.backends import best_runner
from gptj.engine.engine import Engine
from gptj.engine.speculation import Speculation
from gptj.model import GPTJBlock
from gptj.sampling import SamplingParams
from gptj_bench.decode import generate, random_model, split_dtype

Work = Literal["copy", "random", "hostile"]
WORKS: tuple[Work, ...] = ("copy", "random", "hostile")

VOCABULARY = 50400
IDS = 64  # that occur in texts
UNLIKELY = -30.0  # the other ids' logit
COPIED = (8, 40)  # tokens of a text
BEGUN = 4  # tokens of its second copy that are in the prompt
HOSTILE_IDS = tuple(range(2, 10))
WARM_UP_TOKENS = 8
TRAINED_BELOW = 0.3  # loss: the first token of a copy cannot be known
MAX_TRAINING_STEPS = 3000


@dataclass(frozen=True)
class SpeculationBenchmark:
    """Measures a model with random or copying weights.

    Args:
        width: n_embd is 64 times this.
        layers: at least 2.
    """

    dtype: str
    batches: tuple[int, ...]
    new_tokens: int
    threads: int
    repeats: int
    width: int
    layers: int

    def run(self) -> Iterator[dict[str, Any]]:
        """One measurement per workload and batch size."""
        torch.set_num_threads(self.threads)
        copying = widened(copying_model(), self.width, self.layers, VOCABULARY)
        stored, _ = split_dtype(self.dtype)
        dtype, device = getattr(torch, stored), "cuda" if torch.cuda.is_available() else "cpu"
        yield from self._of_model(copying.to(device, dtype), WORKS[:1])
        yield from self._of_model(random_model(copying.config, dtype, device), WORKS[1:])

    def _of_model(self, model: GPTJForCausalLM, works: Sequence[Work]) -> Iterator[dict[str, Any]]:
        runner = best_runner(
            model,
            max(self.batches) * model.config.n_positions,
            quantization=split_dtype(self.dtype)[1],
        )
        # They share a runner, but never run at the same time.
        engines = [
            Engine(runner, eos_ids=[], prefix_caching=False, speculation=each)
            for each in (None, Speculation())
        ]
        try:
            for work in works:
                for batch in self.batches:
                    yield self._measure(engines, work, batch)
        finally:
            for engine in engines:
                engine.close()
            runner.close()

    def _measure(self, engines: Sequence[Engine], work: Work, batch: int) -> dict[str, Any]:
        """Run both engines alternately."""
        prompts = prompts_of(work, batch)
        params = params_of(work, self.new_tokens)
        for engine in engines:
            generate(engine, prompts, WARM_UP_TOKENS, params_of(work, WARM_UP_TOKENS))
        before = engines[1].stats()
        wall: list[list[float]] = [[], []]
        processor: list[list[float]] = [[], []]
        for number in range(self.repeats):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                start = time.process_time()
                timing = generate(engines[which], prompts, self.new_tokens, params)
                processor[which].append(time.process_time() - start)
                wall[which].append(timing.seconds)
        after = engines[1].stats()
        drafted = after.spec_decode_num_draft_tokens - before.spec_decode_num_draft_tokens
        accepted = after.spec_decode_num_accepted_tokens - before.spec_decode_num_accepted_tokens
        return {
            "engine": "gptj",
            "dtype": self.dtype,
            "work": work,
            "batch": batch,
            "new_tokens": self.new_tokens,
            "without_tokens_per_s": round(batch * self.new_tokens / statistics.median(wall[0]), 1),
            "tokens_per_s": round(batch * self.new_tokens / statistics.median(wall[1]), 1),
            # Ratios of adjacent runs.
            "speedup": _ratio(*wall),
            "speedup_in_cpu_seconds": _ratio(*processor),
            "drafted": drafted,
            "accepted": accepted,
            "tokens_per_step": round(
                (after.tokens_out - before.tokens_out) / (after.steps - before.steps) / batch, 2
            ),
        }


def _ratio(without: Sequence[float], with_: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(without, with_, strict=True)), 3)


def prompts_of(work: Work, batch: int) -> list[list[int]]:
    numbers = random.Random(0)
    if work == "copy":
        texts = [numbers.choices(range(2, IDS), k=COPIED[1] - BEGUN) for _ in range(batch)]
        return [text + text[:BEGUN] for text in texts]
    ids = range(2, IDS) if work == "random" else HOSTILE_IDS
    return [numbers.choices(ids, k=2 * COPIED[1]) for _ in range(batch)]


def params_of(work: Work, new_tokens: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=new_tokens,
        temperature=0 if work == "copy" else 1,
        seed=0,
        ignore_eos=True,
        allowed_token_ids=HOSTILE_IDS if work == "hostile" else None,
    )


def copying_model() -> GPTJForCausalLM:
    """Two layers that continue a text's second copy; half a minute of one core."""
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=IDS, n_positions=512, n_embd=64, n_layer=2, n_head=4, rotary_dim=16
    )
    model = GPTJForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 50))
    recent: list[float] = []
    for _ in range(MAX_TRAINING_STEPS):
        length = int(torch.randint(*COPIED, ()))
        text = torch.randint(2, IDS, (32, length))
        labels = torch.cat((torch.full_like(text, -100), text), dim=1)
        loss = model(input_ids=torch.cat((text, text), dim=1), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = [*recent[-49:], loss.item()]
        if len(recent) == 50 and statistics.mean(recent) < TRAINED_BELOW:
            return model.eval()
    raise RuntimeError(f"the model has not learned to copy: its loss is {recent[-1]:.3f}")


@torch.no_grad()
def widened(model: GPTJForCausalLM, width: int, layers: int, vocabulary: int) -> GPTJForCausalLM:
    """A larger model of the same function: `width` copies of each channel and head; idle layers.

    Chen, Goodfellow and Shlens, "Net2Net", 2016.
    """
    small = model.config
    config = GPTJConfig(
        vocab_size=vocabulary,
        n_positions=small.n_positions,
        n_embd=small.n_embd * width,
        n_layer=layers,
        n_head=small.n_head * width,
        rotary_dim=small.rotary_dim,
    )
    wide = GPTJForCausalLM(config).eval()
    for block in wide.transformer.h:
        assert isinstance(block, GPTJBlock)
        for last in (block.attn.out_proj, block.mlp.fc_out):
            for parameter in last.parameters():
                parameter.zero_()
    wide.lm_head.weight.zero_()
    wide.lm_head.bias.fill_(UNLIKELY)
    weights = wide.state_dict()
    for name, value in model.state_dict().items():
        target = (
            weights[name][: len(value)] if value.shape[0] == small.vocab_size else weights[name]
        )
        copies = [new // old for new, old in zip(target.shape, value.shape, strict=True)]
        # A product sums over the copies of its inputs. The embedding has no inputs.
        inputs = width if value.dim() == 2 and not name.endswith("wte.weight") else 1
        target.copy_(value.repeat(copies) / inputs)
    return wide

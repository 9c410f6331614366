"""Sampling: logits (B, V) in, token ids (B,) and their log-probabilities out.

Each row has its own parameters and random generator, so a seeded request gets the same tokens
whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5  # dividing by such a temperature would overflow


class OutputGrammar(Protocol):
    """A grammar for one tokenizer, as gptj.engine.constraints compiles it."""

    words: int  # 32-bit words in a mask
    eos_ids: tuple[int, ...]  # in the mask where an output may end

    def matcher(self) -> Any:
        """An llguidance.LLMatcher at the start of an output."""

    def forget(self) -> None:
        """Recompile it for the next request."""

    def refuse(self, reason: str) -> None:
        """Reject requests with it for a while."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request. The defaults sample from the model's distribution."""

    max_tokens: int = 16  # most new tokens, without the prompt
    min_tokens: int = 0  # suppress stop tokens before this many
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # only the k most likely tokens; 0: all
    top_p: float = 1.0  # the smallest set with this total probability; 0: the most likely token
    min_p: float = 0.0  # only tokens with this fraction of the highest probability
    repetition_penalty: float = 1.0  # of tokens in the prompt or output (as in CTRL)
    presence_penalty: float = 0.0  # subtracted once per distinct output token
    frequency_penalty: float = 0.0  # subtracted per occurrence
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to logits
    stop_token_ids: tuple[int, ...] = ()  # besides eos
    ignore_eos: bool = False  # treat eos as an ordinary token
    seed: int | None = None  # the same seed, prompt and parameters give the same tokens
    logprobs: int | None = None  # top tokens to report per step; None: none
    prompt_logprobs: int | None = None  # the same for prompt tokens
    allowed_token_ids: tuple[int, ...] | None = None  # only these; None: all
    # Token sequences banned from the output: the last token is masked after the others.
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    grammar: OutputGrammar | None = None  # the output must match it; only the engine applies it

    def __post_init__(self) -> None:
        _check(self.max_tokens >= 0, "max_tokens", "0 or more", self.max_tokens)
        _check(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"in [0, max_tokens={self.max_tokens}]",
            self.min_tokens,
        )
        _check(0 <= self.temperature <= 100, "temperature", "in [0, 100]", self.temperature)
        _check(self.top_k >= 0, "top_k", "0 or more", self.top_k)
        _check(0 <= self.top_p <= 1, "top_p", "in [0, 1]", self.top_p)
        _check(0 <= self.min_p <= 1, "min_p", "in [0, 1]", self.min_p)
        _check(
            0.01 <= self.repetition_penalty <= 100,  # so that no logit becomes infinite
            "repetition_penalty",
            "in [0.01, 100]",
            self.repetition_penalty,
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _check(-2 <= getattr(self, name) <= 2, name, "in [-2, 2]", getattr(self, name))
        for token, bias in self.logit_bias.items():
            _check(-100 <= bias <= 100, f"logit_bias of token {token}", "in [-100, 100]", bias)
        _check(self.allowed_token_ids != (), "allowed_token_ids", "one or more", "none")
        _check(all(self.bad_words_ids), "bad_words_ids", "of one or more tokens each", "none")

    @property
    def greedy(self) -> bool:
        """Whether to take the most likely token instead of sampling."""
        return self.temperature < GREEDY_BELOW or self.top_p == 0


def adjust(
    logits_V: Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    stop_ids: Sequence[int],
) -> Tensor:
    """One row's logits after penalties, biases and bans, but not its grammar; a new tensor.

    Raises:
        ValueError: for a token in logit_bias that is not in the vocabulary.
    """
    logits_V = logits_V.clone()
    if params.repetition_penalty != 1 and (prompt or output):
        seen = torch.tensor(sorted({*prompt, *output}), device=logits_V.device)
        scores = logits_V[seen]
        penalty = params.repetition_penalty
        logits_V[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        counts = torch.tensor(output, device=logits_V.device).bincount(minlength=len(logits_V))
        logits_V -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    for token, bias in params.logit_bias.items():
        if not 0 <= token < len(logits_V):
            raise ValueError(f"logit_bias: {token} is not in the vocabulary of {len(logits_V)}")
        logits_V[token] += bias
    if len(output) < params.min_tokens and stop_ids:
        logits_V[torch.tensor(sorted(stop_ids), device=logits_V.device)] = -torch.inf
    if params.allowed_token_ids is not None:
        others = torch.ones_like(logits_V, dtype=torch.bool)
        others[torch.tensor(params.allowed_token_ids, device=logits_V.device)] = False
        logits_V[others] = -torch.inf
    for *before, last in params.bad_words_ids:
        if list(output[len(output) - len(before) :]) == before:
            logits_V[last] = -torch.inf
    return logits_V


def restrict(logits_BV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Apply temperature, top_k, top_p and min_p; masks the other tokens to -inf.

    In Hugging Face's order; greedy rows are unchanged.
    """
    rows = [
        row if each.greedy else _restrict_row(row / each.temperature, each)
        for row, each in zip(logits_BV, params, strict=True)
    ]
    return torch.stack(rows)


def _restrict_row(logits_V: Tensor, params: SamplingParams) -> Tensor:
    if 0 < params.top_k < len(logits_V):
        least = logits_V.topk(params.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    if params.top_p < 1:
        ascending, order = logits_V.sort()
        outside = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - params.top_p
        outside[-1] = False  # always keep the most likely
        logits_V = logits_V.masked_fill(outside.scatter(0, order, outside), -torch.inf)
    if params.min_p > 0:
        probabilities = logits_V.softmax(dim=-1)
        unlikely = probabilities < params.min_p * probabilities.max()
        logits_V = logits_V.masked_fill(unlikely, -torch.inf)
    return logits_V


def choose(
    logits_BV: Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[torch.Generator | None],
) -> Tensor:
    """Each row's next token, (B,) int64: the most likely one, or sampled with its generator.

    Samples argmax(p / e) with e exponentially distributed, which picks i with probability p_i
    without synchronizing with the device.
    """
    restricted = restrict(logits_BV, params)
    scores = restricted.softmax(dim=-1)
    for row, (each, generator) in enumerate(zip(params, generators, strict=True)):
        if each.greedy:
            scores[row] = restricted[row]
        else:
            noise = torch.empty_like(scores[row]).exponential_(generator=generator)
            scores[row] /= noise
    return scores.argmax(dim=-1)


def _check(holds: bool, name: str, range_: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {range_}, got {value}")

"""Continuing token ids (B, L) by a model: greedy, sampled or by beam search; ids (B, L + new) out.

The slow and plain way, one batch from its start to its end: the reference for the engine.
Arguments and results are Hugging Face's `generate`; greedy and beam results equal its results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gptj.config import GPTJConfig
from gptj.kv_cache import KVCache
from gptj.outputs import CausalLMOutput
from gptj.sampling import SamplingParams, adjust, choose

DEFAULT_NEW_TOKENS = 20


class CausalLM(Protocol):
    """What generating needs of a model."""

    config: GPTJConfig

    def __call__(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: KVCache | None,
        use_cache: bool,
        logits_to_keep: int,
        return_dict: bool,
    ) -> CausalLMOutput:
        """Logits (B, logits_to_keep, V) of the tokens that follow (B, L) ids."""


@torch.no_grad()
def generate(
    model: CausalLM,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    num_return_sequences: int = 1,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    min_new_tokens: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue each row of a batch; rows that end early are filled with padding.

    Args:
        input_ids: (B, L) prompts of one length, padded on the left where they are shorter.
        attention_mask: (B, L), 0 on padding; default: pad_token_id is padding if it is not eos.
        do_sample: draw tokens, with temperature, top_k (None or 0: all), top_p and min_p;
            otherwise the likeliest.
        seed: for the draws; default: PyTorch's global generator.
        num_beams: keep so many continuations and return the likeliest; 1 is no beam search.
        length_penalty: beams rank by log-probability / length ** length_penalty.
        early_stopping: end a beam search when num_beams continuations have ended.
        num_return_sequences: rows of the result a prompt; without sampling at most num_beams.
        max_length, max_new_tokens: with and without the prompt; default: 20 new tokens.
        min_new_tokens: no eos before so many.
        eos_token_id, pad_token_id: default: the configuration's, and the first eos for padding.
        use_cache: False computes the whole sequence at each step.

    Returns:
        (B * num_return_sequences, L + new) token ids: prompts with what follows.

    Raises:
        ValueError: with the value and the remedy.
    """
    config = model.config
    _batch, length = input_ids.shape
    if length == 0:
        raise ValueError("the prompt must have at least one token, such as bos_token_id")
    if num_beams < 1 or num_return_sequences < 1:
        raise ValueError(
            f"num_beams and num_return_sequences must be 1 or more, "
            f"got {num_beams} and {num_return_sequences}"
        )
    if num_beams > 1 and do_sample:
        raise ValueError("beam search draws no samples: choose do_sample=True or num_beams > 1")
    if not do_sample and num_return_sequences > num_beams:
        raise ValueError(
            f"num_return_sequences={num_return_sequences} would repeat one result: "
            f"use do_sample=True, or num_beams of as many"
        )
    eos = config.eos_token_id if eos_token_id is None else eos_token_id
    eos_ids = [eos] if isinstance(eos, int) else list(eos or [])
    padding = config.pad_token_id if pad_token_id is None else pad_token_id
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
        if padding is not None and padding not in eos_ids:
            attention_mask = (input_ids != padding).long()
    if padding is None:
        padding = eos_ids[0] if eos_ids else 0
    if do_sample and temperature == 0:
        raise ValueError("temperature=0 draws nothing: use do_sample=False")
    params = SamplingParams(
        max_tokens=_new_tokens(max_length, max_new_tokens, length, config.n_positions),
        min_tokens=min_new_tokens,
        temperature=temperature if do_sample else 0,
        top_k=top_k or 0,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    decoder = Decoder(model, attention_mask.repeat_interleave(num_return_sequences, 0), use_cache)
    if num_beams > 1:
        decoder = Decoder(model, attention_mask, use_cache)
        return beam_search(
            decoder,
            input_ids,
            params,
            num_beams=num_beams,
            eos_ids=eos_ids,
            padding=padding,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            num_return_sequences=num_return_sequences,
        )
    generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
    prompts = input_ids.repeat_interleave(num_return_sequences, dim=0)
    return _one_by_one(decoder, prompts, params, eos_ids, padding, generator)


class Decoder:
    """A model in the middle of a batch: tokens (B, L) in, logits of what follows (B, V) out.

    Keeps the cache, the mask, and each row's positions, which count real tokens only.
    """

    def __init__(self, model: CausalLM, attention_mask: Tensor, use_cache: bool = True) -> None:
        self._model = model
        self._mask = attention_mask  # (B, S), of all positions so far
        self._cache = KVCache() if use_cache else None
        self._ids: Tensor | None = None  # without a cache, everything is computed again

    def real_tokens(self, prompts: Tensor) -> list[list[int]]:
        """The prompts without their padding."""
        return [row[mask.bool()].tolist() for row, mask in zip(prompts, self._mask, strict=True)]

    def advance(self, ids_BL: Tensor) -> Tensor:
        """Logits (B, V), in fp32, of the token after these, which follow those given before."""
        if self._ids is None:
            self._ids = ids_BL
        else:
            self._ids = torch.cat((self._ids, ids_BL), dim=1)
            self._mask = torch.cat((self._mask, self._mask.new_ones(ids_BL.shape)), dim=1)
        positions = (self._mask.cumsum(dim=-1) - 1).clamp(min=0)
        if self._cache is None:
            ids_BL = self._ids
        output = self._model(
            ids_BL,
            attention_mask=self._mask,
            position_ids=positions[:, -ids_BL.shape[1] :],
            past_key_values=self._cache,
            use_cache=self._cache is not None,
            logits_to_keep=1,
            return_dict=True,
        )
        assert output.logits is not None
        return output.logits[:, -1].float()

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; one may come more than once."""
        assert self._ids is not None
        self._mask, self._ids = self._mask[rows], self._ids[rows]
        if self._cache is not None:
            self._cache.select(rows)


def _one_by_one(
    decoder: Decoder,
    prompts: Tensor,
    params: SamplingParams,
    eos_ids: list[int],
    padding: int,
    generator: torch.Generator | None,
) -> Tensor:
    rows = len(prompts)
    real = decoder.real_tokens(prompts)
    outputs: list[list[int]] = [[] for _ in range(rows)]
    ended = [False] * rows
    tokens = prompts
    plain = params.repetition_penalty == 1 and params.min_tokens == 0
    for _ in range(params.max_tokens):
        logits = decoder.advance(tokens)
        if not plain:
            logits = torch.stack(
                [
                    adjust(logits[row], params, real[row], outputs[row], eos_ids)
                    for row in range(rows)
                ]
            )
        chosen = choose(logits, [params] * rows, [generator] * rows).tolist()
        for row, token in enumerate(chosen):
            outputs[row].append(padding if ended[row] else token)
            ended[row] = ended[row] or token in eos_ids
        if all(ended):
            break
        tokens = torch.tensor([output[-1:] for output in outputs], device=prompts.device)
    new = torch.tensor(outputs, dtype=prompts.dtype, device=prompts.device)
    return torch.cat((prompts, new.view(rows, -1)), dim=1)


def beam_search(
    decoder: Decoder,
    input_ids: Tensor,
    params: SamplingParams,
    *,
    num_beams: int,
    eos_ids: list[int],
    padding: int,
    length_penalty: float,
    early_stopping: bool,
    num_return_sequences: int,
) -> Tensor:
    """The likeliest continuations of each row, best first: see `generate`."""
    device = input_ids.device
    searches = [
        Beams(prompt, num_beams, params.max_tokens, set(eos_ids), length_penalty, early_stopping)
        for prompt in decoder.real_tokens(input_ids)
    ]
    tokens = input_ids
    for step in range(params.max_tokens):
        log_probs = decoder.advance(tokens).log_softmax(dim=-1)  # (B or B * beams, V)
        if step == 0:  # one prompt, many beams
            log_probs = log_probs.repeat_interleave(num_beams, dim=0)
            decoder.select(torch.arange(len(searches), device=device).repeat_interleave(num_beams))
        for row, (search, beam) in enumerate((s, b) for s in searches for b in range(num_beams)):
            output = search.running[beam].output
            log_probs[row] = adjust(log_probs[row], params, search.prompt, output, eos_ids)
        vocabulary = log_probs.shape[-1]
        scores = torch.tensor([[b.score for b in s.running] for s in searches], device=device)
        totals = (log_probs.view(len(searches), num_beams, -1) + scores[:, :, None]).flatten(1)
        candidates = totals.topk(min(searches[0].candidates, totals.shape[-1]))
        for search, values, places in zip(
            searches, candidates.values.tolist(), candidates.indices.tolist(), strict=True
        ):
            search.step(
                [(v, *divmod(place, vocabulary)) for v, place in zip(values, places, strict=True)]
            )
        if not any(search.open for search in searches):
            break
        origins = [
            number * num_beams + beam.origin
            for number, search in enumerate(searches)
            for beam in search.running
        ]
        decoder.select(torch.tensor(origins, device=device))
        tokens = torch.tensor(
            [beam.output[-1:] for search in searches for beam in search.running], device=device
        )
    results = [output for search in searches for output in search.best(num_return_sequences)]
    longest = max(map(len, results))
    new = [output + [padding] * (longest - len(output)) for output in results]
    prompts = input_ids.repeat_interleave(num_return_sequences, dim=0)
    return torch.cat((prompts, torch.tensor(new, device=device).view(len(new), -1)), dim=1)


@dataclass(frozen=True)
class Beam:
    """A continuation that a search goes on with."""

    output: list[int]
    score: float  # log-probability
    origin: int  # the beam of the last step that it continues


class Beams:
    """One prompt's search: beams that go on, and the best that have ended."""

    def __init__(
        self,
        prompt: list[int],
        width: int,
        max_tokens: int,
        eos_ids: set[int],
        length_penalty: float,
        early_stopping: bool,
    ) -> None:
        self.prompt = prompt
        self.open = True  # whether a better result may still come
        # All start equal: but for the first, they are kept out by their scores.
        self.running = [Beam([], 0.0 if beam == 0 else -1e9, beam) for beam in range(width)]
        self._width = width
        self._max_tokens = max_tokens
        self._eos_ids = eos_ids
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._ended: list[tuple[float, list[int]]] = []  # best first

    @property
    def candidates(self) -> int:
        """How many continuations a step needs to see."""
        # An eos ends a beam, so that each may take one candidate from those that go on.
        return max(2, 1 + len(self._eos_ids)) * self._width

    def step(self, candidates: list[tuple[float, int, int]]) -> None:
        """Take the (score, beam, token) of the likeliest continuations, best first."""
        going_on = []
        length = len(self.running[0].output) + 1
        for rank, (score, beam, token) in enumerate(candidates):
            output = [*self.running[beam].output, token]
            if token not in self._eos_ids and length < self._max_tokens:
                going_on.append(Beam(output, score, beam))
            elif rank < self._width and self.open:
                self._ended.append((self._ranked(score, length), output))
        self._ended.sort(key=lambda each: -each[0])
        del self._ended[self._width :]
        if len(going_on) < self._width:  # the last step: all have ended
            self.open = False
            return
        self.running = going_on[: self._width]
        if len(self._ended) == self._width:
            improvable = self._ranked(self.running[0].score, length) > self._ended[-1][0]
            self.open = self.open and improvable and not self._early_stopping

    def best(self, count: int) -> list[list[int]]:
        return [output for _, output in self._ended[:count]]

    def _ranked(self, score: float, length: int) -> float:
        return score / float(length**self._length_penalty)


def _new_tokens(
    max_length: int | None, max_new_tokens: int | None, length: int, n_positions: int
) -> int:
    """How many tokens to add at most; ValueError if the model has no positions for them."""
    if max_new_tokens is None and max_length is None:
        new = min(DEFAULT_NEW_TOKENS, n_positions - length)
    elif max_new_tokens is not None:  # the narrower wish, as in Hugging Face
        new = max_new_tokens
    else:
        assert max_length is not None
        new = max_length - length
    if new < 1:
        raise ValueError(
            f"nothing to generate: the prompt has {length} tokens, max_length is {max_length}, "
            f"max_new_tokens is {max_new_tokens} and the model's context {n_positions}"
        )
    if length + new > n_positions:
        raise ValueError(
            f"{length} tokens of the prompt and {new} new ones exceed the model's context of "
            f"{n_positions}: shorten the prompt or lower max_new_tokens"
        )
    return new

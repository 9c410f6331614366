"""`generate`: greedy decoding, sampling or beam search; ids (B, L) in, ids (B, L + new) out.

Simple and slow, one static batch at a time: the reference for the engine. Arguments and results
follow Hugging Face's `generate`; greedy and beam results equal its results.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor

from gptj.config import GPTJConfig
from gptj.kv_cache import KVCache
from gptj.outputs import CausalLMOutput, GenerateOutput
from gptj.sampling import SamplingParams, adjust, choose, restrict
from gptj.tokenizer import GPTJTokenizer

DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True)
class GenerationConfig:
    """A model's own defaults for `generate`, as read by transformers' pipelines."""

    eos_token_id: int | list[int] | None
    pad_token_id: int | None

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}


class CausalLM(Protocol):
    """What generation needs from a model."""

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
        """Next-token logits (B, logits_to_keep, V) for ids (B, L)."""


class Streamer(Protocol):
    """Receives tokens as they are generated, such as transformers' TextStreamer."""

    def put(self, value: Tensor) -> None:
        """First the prompts (B, L), then each step's tokens (B)."""

    def end(self) -> None:
        """Nothing follows."""


@overload
def generate(
    model: CausalLM,
    input_ids: Tensor,
    *,
    return_dict_in_generate: Literal[False] = False,
    **arguments: Any,
) -> Tensor: ...


@overload
def generate(
    model: CausalLM,
    input_ids: Tensor,
    *,
    return_dict_in_generate: Literal[True],
    **arguments: Any,
) -> GenerateOutput: ...


@torch.no_grad()  # type: ignore[misc]  # the overloads leave checking arguments to this
def generate(
    model: CausalLM,
    input_ids: Tensor | None,  # a pipeline's empty prompt is None
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
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: GPTJTokenizer | None = None,
    streamer: Streamer | None = None,
    use_cache: bool = True,
    output_scores: bool = False,
    return_dict_in_generate: bool = False,
) -> Tensor | GenerateOutput:
    """Continue each row of a batch; rows that end early are padded.

        ids = tokenizer("In a shocking finding,", return_tensors="pt").input_ids
        new = model.generate(ids, do_sample=True, temperature=0.9, max_new_tokens=50)
        print(tokenizer.decode(new[0]))

    Arguments and results follow Hugging Face's `generate`; greedy and beam results equal its
    results.

    Args:
        input_ids: (B, L) prompts, padded on the left to one length.
        attention_mask: (B, L), 0 on padding; default: mask pad_token_id, unless it is an eos.
        do_sample: sample tokens; if False, take the most likely.
        temperature, top_k, top_p, min_p: for sampling: divide logits by the temperature, then keep
            the k most likely tokens (None or 0: all), the smallest set with total probability
            top_p, and those with at least min_p times the highest probability.
        repetition_penalty: divides positive and multiplies negative logits of tokens that occur in
            the prompt or output.
        seed: for sampling; default: PyTorch's global generator.
        num_beams: beam width; 1 disables beam search.
        length_penalty: beams are ranked by log-probability / length ** length_penalty.
        early_stopping: end the search once num_beams beams have finished.
        num_return_sequences: rows of the result per prompt; without sampling at most num_beams.
        max_length, max_new_tokens: limits with and without the prompt; default: 20 new tokens.
        min_new_tokens: suppress eos before this many.
        eos_token_id, pad_token_id: default: the configuration's, and the first eos for padding.
        stop_strings: a row ends with the token that completes one of them; requires `tokenizer`.
        streamer: receives the prompts and each step's tokens; not with beams.
        use_cache: False recomputes the whole sequence at each step.
        output_scores: return each step's scores; requires return_dict_in_generate.
        return_dict_in_generate: return a GenerateOutput.

    Returns:
        (B * num_return_sequences, L + new) token ids, including prompts, or a GenerateOutput with
        them as `sequences`.

    Raises:
        ValueError: with the value and the remedy.
    """
    config = model.config
    length = 0 if input_ids is None else input_ids.shape[1]
    if input_ids is None or length == 0:
        raise ValueError("the prompt must have at least one token, such as bos_token_id")
    if num_beams < 1 or num_return_sequences < 1:
        raise ValueError(
            f"num_beams and num_return_sequences must be 1 or more, "
            f"got {num_beams} and {num_return_sequences}"
        )
    if num_beams > 1 and do_sample:
        raise ValueError("beam search does not sample: choose do_sample=True or num_beams > 1")
    if num_beams > 1 and streamer is not None:
        raise ValueError(
            f"a streamer needs num_beams=1, got {num_beams}: beams may change until the end"
        )
    if not do_sample and num_return_sequences > num_beams:
        raise ValueError(
            f"num_return_sequences={num_return_sequences} would repeat one result: "
            f"use do_sample=True, or num_beams of as many"
        )
    if output_scores and not return_dict_in_generate:
        raise ValueError("output_scores=True needs return_dict_in_generate=True")
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
        raise ValueError("temperature=0 cannot be sampled: use do_sample=False")
    params = SamplingParams(
        max_tokens=_new_tokens(max_length, max_new_tokens, length, config.n_positions),
        min_tokens=min_new_tokens,
        temperature=temperature if do_sample else 0,
        top_k=top_k or 0,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    stops = StopStrings.of(stop_strings, tokenizer)
    scores: list[Tensor] | None = [] if output_scores else None
    if num_beams > 1:
        decoder = Decoder(model, attention_mask, use_cache)
        output = beam_search(
            decoder,
            input_ids,
            params,
            num_beams=num_beams,
            eos_ids=eos_ids,
            padding=padding,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            num_return_sequences=num_return_sequences,
            stops=stops,
            scores=scores,
        )
    else:
        if streamer is not None:
            streamer.put(input_ids.cpu())
        repeated = attention_mask.repeat_interleave(num_return_sequences, dim=0)
        decoder = Decoder(model, repeated, use_cache)
        generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
        prompts = input_ids.repeat_interleave(num_return_sequences, dim=0)
        sequences = _one_by_one(
            decoder, prompts, params, eos_ids, padding, generator, stops, streamer, scores
        )
        output = GenerateOutput(sequences)
        if streamer is not None:
            streamer.end()
    if not return_dict_in_generate:
        return output.sequences
    output.scores = None if scores is None else tuple(scores)
    output.past_key_values = decoder.cache
    return output


class StopStrings:
    """Tests whether a row's last token completes a stop string.

    The string may begin in the prompt, and the token may continue past it.
    """

    def __init__(self, strings: Sequence[str], tokenizer: GPTJTokenizer) -> None:
        self._strings = [each.encode() for each in strings]
        self._longest = max(map(len, self._strings))
        self._tokenizer = tokenizer

    @classmethod
    def of(
        cls, strings: str | Sequence[str] | None, tokenizer: GPTJTokenizer | None
    ) -> StopStrings | None:
        """None without strings. ValueError for empty strings or a missing tokenizer."""
        if strings is None:
            return None
        strings = [strings] if isinstance(strings, str) else list(strings)
        if not strings or not all(isinstance(each, str) and each for each in strings):
            raise ValueError(f"stop_strings must be one or more non-empty strings, got {strings!r}")
        if tokenizer is None:
            raise ValueError("stop_strings needs the tokenizer; remedy: tokenizer=tokenizer")
        return cls(strings, tokenizer)

    def complete(self, prompt: Sequence[int], output: Sequence[int]) -> bool:
        last = self._bytes(output[-1])
        text = last
        for token in itertools.chain(reversed(output[:-1]), reversed(prompt)):
            if len(text) >= self._longest - 1 + len(last):
                break
            text = self._bytes(token) + text
        before = len(text) - len(last)
        return any(
            # It must end within the last token: skip earlier matches.
            text.find(each, max(0, before - len(each) + 1)) >= 0
            for each in self._strings
        )

    def _bytes(self, token: int) -> bytes:
        return self._tokenizer.token_bytes(token) if self._tokenizer.has_id(token) else b""


class Decoder:
    """A model's decoding state for a batch: tokens (B, L) in, next-token logits (B, V) out.

    Keeps the KV cache, the mask and each row's positions, which skip padding.
    """

    def __init__(self, model: CausalLM, attention_mask: Tensor, use_cache: bool = True) -> None:
        self._model = model
        self._mask = attention_mask  # (B, S), all positions so far
        self.cache = KVCache() if use_cache else None
        self._ids: Tensor | None = None  # without a cache, everything is recomputed

    def real_tokens(self, prompts: Tensor) -> list[list[int]]:
        """The prompts without padding."""
        return [row[mask.bool()].tolist() for row, mask in zip(prompts, self._mask, strict=True)]

    def advance(self, ids_BL: Tensor) -> Tensor:
        """Append tokens; returns next-token logits (B, V) in fp32."""
        if self._ids is None:
            self._ids = ids_BL
        else:
            self._ids = torch.cat((self._ids, ids_BL), dim=1)
            self._mask = torch.cat((self._mask, self._mask.new_ones(ids_BL.shape)), dim=1)
        positions = (self._mask.cumsum(dim=-1) - 1).clamp(min=0)
        if self.cache is None:
            ids_BL = self._ids
        output = self._model(
            ids_BL,
            attention_mask=self._mask,
            position_ids=positions[:, -ids_BL.shape[1] :],
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=1,
            return_dict=True,
        )
        assert output.logits is not None
        return output.logits[:, -1].float()

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order, perhaps repeated."""
        assert self._ids is not None
        self._mask, self._ids = self._mask[rows], self._ids[rows]
        if self.cache is not None:
            self.cache.select(rows)


def _one_by_one(
    decoder: Decoder,
    prompts: Tensor,
    params: SamplingParams,
    eos_ids: list[int],
    padding: int,
    generator: torch.Generator | None,
    stops: StopStrings | None,
    streamer: Streamer | None,
    scores: list[Tensor] | None,
) -> Tensor:
    """Greedy or sampled ids (B, L + new). Appends each step's scores (B, V) to `scores`."""
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
        if scores is not None:
            scores.append(restrict(logits, [params] * rows))
        chosen = choose(logits, [params] * rows, [generator] * rows).tolist()
        for row, token in enumerate(chosen):
            if ended[row]:
                outputs[row].append(padding)
                continue
            outputs[row].append(token)
            ended[row] = token in eos_ids or (
                stops is not None and stops.complete(real[row], outputs[row])
            )
        tokens = torch.tensor([output[-1:] for output in outputs], device=prompts.device)
        if streamer is not None:
            streamer.put(tokens[:, 0].cpu())
        if all(ended):
            break
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
    stops: StopStrings | None = None,
    scores: list[Tensor] | None = None,
) -> GenerateOutput:
    """The most likely continuations of each row, best first; see `generate`.

    Appends each step's scores (B * num_beams, V) to `scores`, if given.
    """
    device = input_ids.device
    searches = [
        Beams(
            prompt,
            num_beams,
            params.max_tokens,
            set(eos_ids),
            length_penalty,
            early_stopping,
            stops,
        )
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
        if scores is not None:
            scores.append(log_probs)
        vocabulary = log_probs.shape[-1]
        totals = torch.tensor([[b.score for b in s.running] for s in searches], device=device)
        totals = (log_probs.view(len(searches), num_beams, -1) + totals[:, :, None]).flatten(1)
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
    results = [
        (number * num_beams, each)
        for number, search in enumerate(searches)
        for each in search.ended[:num_return_sequences]
    ]
    if len(results) < len(searches) * num_return_sequences:
        raise ValueError(
            f"min_new_tokens={params.min_tokens} and {len(eos_ids)} ids in eos_token_id leave a "
            f"row fewer outputs than num_return_sequences={num_return_sequences}; remedy: "
            f"min_new_tokens=0"
        )
    longest = max(len(each.output) for _, each in results)
    new = torch.full((len(results), longest), padding, device=device)
    indices = torch.full((len(results), longest), -1, dtype=torch.int32, device=device)
    for row, (first, each) in enumerate(results):
        new[row, : len(each.output)] = torch.tensor(each.output)
        indices[row, : len(each.output)] = torch.tensor(each.origins, dtype=torch.int32) + first
    prompts = input_ids.repeat_interleave(num_return_sequences, dim=0)
    ranks = torch.tensor([each.score for _, each in results], device=device)
    return GenerateOutput(
        torch.cat((prompts, new), dim=1),
        sequences_scores=None if scores is None else ranks,
        beam_indices=indices,
    )


@dataclass(frozen=True)
class Beam:
    """A continuation, running or finished."""

    output: list[int]
    score: float  # log-probability; length-penalized once finished
    origins: tuple[int, ...] = ()  # for each token, the beam that it extended

    @property
    def origin(self) -> int:
        """The beam that the last token extended."""
        return self.origins[-1]


class Beams:
    """One prompt's beam search: running beams and the best finished ones."""

    def __init__(
        self,
        prompt: list[int],
        width: int,
        max_tokens: int,
        eos_ids: set[int],
        length_penalty: float,
        early_stopping: bool,
        stops: StopStrings | None = None,
    ) -> None:
        self.prompt = prompt
        self.open = True  # whether a better result is still possible
        # All beams start identical, so only the first may compete.
        self.running = [Beam([], 0.0 if beam == 0 else -1e9) for beam in range(width)]
        self._width = width
        self._max_tokens = max_tokens
        self._eos_ids = eos_ids
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._stops = stops
        self.ended: list[Beam] = []  # best first

    @property
    def candidates(self) -> int:
        """How many candidates a step needs."""
        # Each eos may use up one candidate per beam.
        return max(2, 1 + len(self._eos_ids)) * self._width

    def step(self, candidates: list[tuple[float, int, int]]) -> None:
        """Advance with the best (score, beam, token) candidates, best first."""
        going_on, stopped = [], []
        length = len(self.running[0].output) + 1
        for rank, (score, beam, token) in enumerate(candidates):
            output = [*self.running[beam].output, token]
            origins = (*self.running[beam].origins, beam)
            if length < self._max_tokens and not self._ends(output):
                going_on.append(Beam(output, score, origins))
                continue
            stopped.append(Beam(output, score - 1e9, origins))
            if rank < self._width and self.open and score != -math.inf:
                self.ended.append(Beam(output, self._ranked(score, length), origins))
        self.ended.sort(key=lambda each: -each.score)
        del self.ended[self._width :]
        # Any number may complete a stop string: as in Hugging Face, finished ones then fill the
        # batch, ranked last.
        self.running = (going_on + stopped)[: self._width]
        if not going_on or self.running[0].score == -math.inf:
            self.open = False
        elif len(self.ended) == self._width:
            improvable = self._ranked(self.running[0].score, length) > self.ended[-1].score
            self.open = self.open and improvable and not self._early_stopping

    def best(self, count: int) -> list[list[int]]:
        return [each.output for each in self.ended[:count]]

    def _ends(self, output: list[int]) -> bool:
        if output[-1] in self._eos_ids:
            return True
        return self._stops is not None and self._stops.complete(self.prompt, output)

    def _ranked(self, score: float, length: int) -> float:
        return score / float(length**self._length_penalty)


def _new_tokens(
    max_length: int | None, max_new_tokens: int | None, length: int, n_positions: int
) -> int:
    """Most tokens to generate; ValueError if they exceed the model's context."""
    if max_new_tokens is None and max_length is None:
        new = min(DEFAULT_NEW_TOKENS, n_positions - length)
    elif max_new_tokens is not None:  # takes precedence, as in Hugging Face
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
            f"the prompt's {length} tokens and {new} new ones exceed the model's context of "
            f"{n_positions}: shorten the prompt or lower max_new_tokens"
        )
    return new

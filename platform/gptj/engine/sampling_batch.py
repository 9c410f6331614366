"""The requests of a batch, and their sampling parameters as tensors: logits in, tokens out.

Shape suffixes: R rows of logits, V vocabulary, D rows that draw, C constrained rows or candidates.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptj.engine.constraints.token_mask import TokenMask, Words, unpacked
from gptj.engine.runners.base import Draw
from gptj.engine.runners.transfer import to_device
from gptj.sampling import SamplingParams

CANDIDATES = 1024  # most likely tokens of a row to compute top_p on first
MAX_TOP_K = 2**31 - 1  # as an int32: more than any vocabulary
CANDIDATES_GROWTH = 8  # factor by which to extend them if they do not suffice
NO_DRAFTS: Mapping[int, Sequence[int]] = MappingProxyType({})


class SamplingState:
    """The sampling state of a request."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        stop_ids: Sequence[int],
        output_ids: Sequence[int],
        mask: TokenMask | None,
    ) -> None:
        self.params = params
        self.mask = mask
        self.draws = not params.greedy
        self.seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
        self.length = len(output_ids)  # of the output
        self.candidates = CANDIDATES  # for top_p; see SamplingBatch.widen_candidates
        self.stop_ids = np.array(sorted(stop_ids), np.int64)
        self.repeats = params.repetition_penalty != 1
        self.counts = params.presence_penalty != 0 or params.frequency_penalty != 0
        self.bias_ids = np.array(list(params.logit_bias), np.int64)
        self.biases = np.array(list(params.logit_bias.values()), np.float32)
        self._places: dict[int, int] = {}  # of each token in `_tokens`
        self._tokens = np.zeros(16, np.int64)
        self._times = np.zeros(16, np.float32)  # counts in the output; 0 for prompt tokens
        if self.repeats:
            for token in prompt_ids:
                self._count(token, 0)
        if self.repeats or self.counts:
            for token in output_ids:
                self._count(token, 1)

    @property
    def adjusts(self) -> bool:
        """Whether logits processing applies to this row, now or later."""
        return self.repeats or self.counts or len(self.bias_ids) > 0 or self.holds_back

    @property
    def holds_back(self) -> bool:
        """Whether to mask stop tokens here, because of min_tokens; a TokenMask does so itself."""
        return self.mask is None and self.length < self.params.min_tokens and len(self.stop_ids) > 0

    def advance(self, token: int) -> None:
        self.length += 1
        if self.repeats or self.counts:
            self._count(token, 1)

    def collect_changes(self, row: int, batch: SamplingBatch, before: Sequence[int]) -> None:
        """Add this row's logits changes to the batch's.

        Args:
            before: draft tokens between the output and this row.
        """
        if before:
            known = len(self._places)
            for token in before:
                self.advance(token)
            self.collect_changes(row, batch, ())
            self._retreat(before, known)
            return
        params, size = self.params, len(self._places)
        if size:
            tokens, times = self._tokens[:size], self._times[:size]
            if self.repeats:
                batch.repeats.add(row, tokens, np.full(size, params.repetition_penalty, np.float32))
            if self.counts:
                penalty = params.frequency_penalty * times + params.presence_penalty * (times > 0)
                batch.additions.add(row, tokens, -penalty.astype(np.float32))
        if len(self.bias_ids):
            batch.additions.add(row, self.bias_ids, self.biases)
        if self.holds_back:
            infinities = np.full(len(self.stop_ids), -np.inf, np.float32)
            batch.additions.add(row, self.stop_ids, infinities)

    def _retreat(self, tokens: Sequence[int], known: int) -> None:
        """Undo `advance` for the last tokens; `known` distinct ones were counted before them."""
        self.length -= len(tokens)
        if self.repeats or self.counts:
            for token in tokens:
                self._times[self._places[token]] -= 1
            while len(self._places) > known:
                self._places.popitem()

    def _count(self, token: int, times: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens):
            self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)))
            self._times = np.concatenate((self._times, np.zeros_like(self._times)))
        self._tokens[place] = token
        self._times[place] += times


class LogitChanges:
    """Sparse changes to (R, V) logits in one step: indices and values."""

    def __init__(self) -> None:
        self._places: list[npt.NDArray[np.int64]] = []
        self._values: list[npt.NDArray[np.float32]] = []
        self._rows: list[int] = []

    def add(self, row: int, ids: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> None:
        self._rows.append(row)
        self._places.append(ids)
        self._values.append(values)

    def take(self, logits_RV: Tensor) -> tuple[Tensor, Tensor] | None:
        """Flat indices and values; clears them."""
        if not self._rows:
            return None
        width = logits_RV.shape[-1]
        flat = [ids + row * width for row, ids in zip(self._rows, self._places, strict=True)]
        places = to_device(np.concatenate(flat), logits_RV.device)
        values = to_device(np.concatenate(self._values), logits_RV.device)
        self.__init__()  # type: ignore[misc]
        return places, values


class SamplingBatch:
    """Per-batch tensors of sampling parameters, reused until the requests change.

    Args:
        requests: their states.
        kernel: see Sampler.
        drafts: by index in `requests`; a batch with drafts is used once.
    """

    def __init__(
        self,
        keys: list[int],
        requests: list[SamplingState],
        device: torch.device,
        kernel: Draw | None,
        drafts: Mapping[int, Sequence[int]] = NO_DRAFTS,
    ) -> None:
        self.keys = keys
        self._kernel = kernel
        self.requests = requests
        self.drafts = drafts
        self.starts: list[int] = []  # each request's first row
        self.states: list[SamplingState] = []  # of each row
        self.before: list[Sequence[int]] = []  # draft tokens before each row
        for place, state in enumerate(requests):
            draft = drafts.get(place, ())
            self.starts.append(len(self.states))
            self.states += [state] * (1 + len(draft))
            self.before += [draft[:count] for count in range(1 + len(draft))]
        self.verified = [
            place
            for place, state in enumerate(requests)
            if state.mask is not None or place in drafts
        ]
        self.undrafted = sorted(set(range(len(requests))).difference(self.verified))
        states, rows = self.states, range(len(self.states))
        self.reporting = [row for row in rows if states[row].params.logprobs is not None]
        self.adjusting = [row for row in rows if states[row].adjusts]
        self.drawing = [row for row in rows if states[row].draws]
        self.masked = [row for row in rows if states[row].mask is not None]
        self.asked = [states[row].params.logprobs or 0 for row in self.reporting]
        self.reporting_rows = to_device(np.array(self.reporting, np.int64), device)
        self.drawing_rows = to_device(np.array(self.drawing, np.int64), device)
        self.repeats = LogitChanges()
        self.additions = LogitChanges()
        drawn = [states[row] for row in self.drawing]
        self._drawn = drawn
        self._seeds = np.array([state.seed for state in drawn], np.uint64)
        params = [state.params for state in drawn]
        self._top_k = [min(each.top_k, MAX_TOP_K) for each in params]
        self._temperatures = _column([each.temperature for each in params], device)
        self._restricts_p = any(each.top_p < 1 for each in params)
        # Whether to look for more candidates, which the kernel does without.
        self.may_be_unsure = self._restricts_p and kernel is None
        self._top_p = _column([each.top_p for each in params], device)
        self._restricts_min_p = any(each.min_p > 0 for each in params)
        least = [math.log(each.min_p) if each.min_p > 0 else -math.inf for each in params]
        self._log_min_p = _column(least, device)
        if kernel is not None:
            self._min_p = _column([each.min_p for each in params], device)
            self._top_k_D = to_device(np.array(self._top_k, np.int32), device)

    def adjust(self, logits_RV: Tensor) -> None:
        """Repetition penalties first, then everything additive."""
        flat = logits_RV.view(-1)
        if entries := self.repeats.take(logits_RV):
            places, penalties = entries
            scores = flat[places]
            flat[places] = torch.where(scores < 0, scores * penalties, scores / penalties)
        if entries := self.additions.take(logits_RV):
            flat.index_add_(0, *entries)

    def mask(self, logits_RV: Tensor) -> None:
        """Mask tokens that the rows' constraints do not allow to -inf."""
        words_CW = np.stack(
            [
                mask.words_after(len(self.before[row]))
                for row in self.masked
                if (mask := self.states[row].mask)
            ]
        )
        if logits_RV.device.type == "cpu":
            allowed_CV = unpacked(words_CW, logits_RV.shape[-1])
            for row, allowed_V in zip(self.masked, allowed_CV, strict=True):
                np.putmask(logits_RV[row].numpy(), ~allowed_V, -np.inf)
            return
        rows_C = to_device(np.array(self.masked, np.int64), logits_RV.device)
        excluded_CV = excluded(words_CW, logits_RV.shape[-1], logits_RV.device)
        logits_RV[rows_C] = logits_RV[rows_C].masked_fill(excluded_CV, -torch.inf)

    def uniform(self) -> Tensor:
        """A number in [0, 1) for each row that draws, (D)."""
        lengths = [self.states[row].length + len(self.before[row]) for row in self.drawing]
        numbers = uniforms(self._seeds, np.array(lengths, np.uint64))
        return to_device(numbers, self.drawing_rows.device)

    def draw(self, logits_RV: Tensor, uniform_D: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (D) of the rows that draw, by inverse transform sampling.

        Also whether top_p may keep more than the candidates, (D): if so, call `widen_candidates`
        and draw again. None: it never does.
        """
        if self._kernel is not None:
            columns = (self._temperatures, self._top_k_D, self._top_p, self._min_p)
            tokens_D = self._kernel(logits_RV, self.drawing_rows, *columns, uniform_D)
            return tokens_D, None
        scores_DV, unsure_D = self._restrict(logits_RV[self.drawing_rows] / self._temperatures)
        sums_DV = scores_DV.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        totals_D1 = sums_DV[:, -1:]
        # Below the total, and right of equal sums: tokens of probability 0 are never drawn.
        targets_D1 = torch.minimum(
            uniform_D[:, None] * totals_D1, totals_D1.nextafter(torch.zeros_like(totals_D1))
        )
        tokens_D = torch.searchsorted(sums_DV, targets_D1, right=True)[:, 0]
        # Out of range if nothing is finite.
        return tokens_D.clamp(max=logits_RV.shape[-1] - 1), unsure_D

    def widen_candidates(self, unsure_D: npt.NDArray[np.bool_]) -> None:
        """Use more candidates for top_p as long as these rows' requests run."""
        states = [state for state, unsure in zip(self._drawn, unsure_D, strict=True) if unsure]
        candidates = CANDIDATES_GROWTH * self._candidates
        for state in states:
            state.candidates = candidates

    @property
    def _candidates(self) -> int:
        return max(state.candidates for state in self._drawn)

    def note_advanced(self) -> None:
        """Forget the rows that need no adjustment of their logits."""
        if self.adjusting:
            self.adjusting = [row for row in self.adjusting if self.states[row].adjusts]

    def _restrict(self, scores_DV: Tensor) -> tuple[Tensor, Tensor]:
        """Mask by top_k, top_p and min_p, in Hugging Face's order; ties are kept.

        Also whether top_p may keep more, (D).
        """
        width = scores_DV.shape[-1]
        unsure_D = torch.zeros(len(scores_DV), dtype=torch.bool, device=scores_DV.device)
        limited = [k if 0 < k < width else 0 for k in self._top_k]
        if any(limited):
            values = scores_DV.topk(max(limited)).values
            places = to_device(np.array([[max(k, 1) - 1] for k in limited]), scores_DV.device)
            free = to_device(np.array([[k == 0] for k in limited]), scores_DV.device)
            least = values.gather(1, places).masked_fill(free, -torch.inf)
            scores_DV = scores_DV.masked_fill(scores_DV < least, -torch.inf)
        if self._restricts_p:
            least, unsure_D = self._least_of_top_p(scores_DV)
            scores_DV = scores_DV.masked_fill(scores_DV < least, -torch.inf)
        if self._restricts_min_p:
            least = scores_DV.amax(dim=-1, keepdim=True) + self._log_min_p
            scores_DV = scores_DV.masked_fill(scores_DV < least, -torch.inf)
        return scores_DV, unsure_D

    def _least_of_top_p(self, scores_DV: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest score (D, 1) that top_p keeps: those above it sum to less than top_p.

        Also whether it may keep tokens beyond the candidates, (D).
        """
        totals_D1 = scores_DV.logsumexp(dim=-1, keepdim=True)
        count = min(self._candidates, scores_DV.shape[-1])
        values_DC = scores_DV.topk(count).values
        probabilities = (values_DC - totals_D1).exp()
        above = probabilities.cumsum(dim=-1, dtype=torch.float64) - probabilities
        kept = (above < self._top_p).sum(dim=-1, keepdim=True).clamp(min=1)
        unsure = (kept == count) & (self._top_p < 1) & (count < scores_DV.shape[-1])
        least = values_DC.gather(1, kept - 1)
        return least.masked_fill(self._top_p >= 1, -torch.inf), unsure[:, 0]


def excluded(words_CW: Words, size: int, device: torch.device) -> Tensor:
    """Booleans (C, size) on a device: true for bits that are not set."""
    words = to_device(words_CW.view(np.int32), device)
    bits = words[..., None] >> torch.arange(32, dtype=torch.int32, device=device)
    return (bits & 1 == 0).flatten(1)[:, :size]


def uniforms(
    seeds: npt.NDArray[np.uint64], numbers: npt.NDArray[np.uint64]
) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each seed and draw number: stateless SplitMix64.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seeds) + (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return to_device(np.array(values, np.float32), device)[:, None]

"""Samples the next tokens of a batch: logits (R, V) in, token ids and logprobs out.

Vectorized over rows where `gptj.sampling`, the reference, loops. Penalties, biases and bans touch
only the tokens that they change.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptj.engine.constraints.mask_threads import MaskThreads
from gptj.engine.constraints.token_mask import TokenMask, Words, packed, unpacked
from gptj.engine.events import TokenEvent
from gptj.engine.runners.base import Draw
from gptj.engine.runners.transfer import Arrival, sent
from gptj.sampling import SamplingParams

Top = tuple[tuple[int, float], ...]
Report = tuple[float, Top]  # a token's logprob, and the most likely ones
CANDIDATES = 1024  # most likely tokens of a row to compute top_p on first
MOST_TOP_K = 2**31 - 1  # as an int32: more than any vocabulary
FURTHER = 8  # factor by which to extend them if they do not suffice
ROWS = 128  # of a prompt's logits to process together
NO_DRAFTS: Mapping[int, Sequence[int]] = MappingProxyType({})


@dataclass(frozen=True)
class SamplerOutput:
    """Sampled tokens, per row of the logits or per request."""

    # By row; a request's rows beyond `counts` are meaningless.
    tokens: list[int]
    logprobs: list[float | None]  # the model's own, before penalties; None unless requested
    top: list[Top]  # the most likely (id, logprob), best first
    # By request.
    counts: list[int]  # tokens: one; with a draft, one more than are accepted of it
    finite: list[bool]  # whether its logits are finite; if not, it must fail
    # Requests whose output their grammar completes; False if already before this step's token.
    complete: dict[int, bool]
    errors: dict[int, Exception]  # of failing requests


class Sampler:
    """Samples for the requests that were added, in any composition of the batch.

    A sampled token depends on its request's seed, the output tokens before it, and its row's
    logits; not on other rows, on recomputed steps, nor on drafts.

    Args:
        banned_ids: masked to -inf in every request.
        vocab_size: columns of the logits.
        draw: a kernel that draws tokens; None: PyTorch does.
    """

    def __init__(
        self,
        banned_ids: Sequence[int],
        device: torch.device,
        vocab_size: int,
        draw: Draw | None = None,
    ) -> None:
        self.constrained_tokens = 0  # sampled under a grammar
        self._device = device
        self._vocab_size = vocab_size
        self._free = packed(set(range(vocab_size)).difference(banned_ids), vocab_size)
        self._threads = MaskThreads()
        self._banned = torch.tensor(sorted(banned_ids), dtype=torch.long, device=device)
        self._states: dict[int, _State] = {}
        self._due: dict[int, TokenMask] = {}  # to compute, by request
        self._kernel = draw
        self._batch = _Batch([], [], device, draw)

    def add(
        self,
        key: int,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        stop_ids: Sequence[int],
        output_ids: Sequence[int] = (),
    ) -> None:
        """Start a request, or resume it after the given output; all ids are in the vocabulary."""
        mask = None
        if _is_masked(params):
            mask = TokenMask(params, self._free, stop_ids, output_ids)
            self._threads.start([mask])
        self._states[key] = _State(params, prompt_ids, stop_ids, output_ids, mask)
        self._batch = _Batch([], [], self._device, self._kernel)

    @property
    def mask_wait_seconds(self) -> float:
        """Total seconds that steps waited for masks."""
        return self._threads.wait_seconds

    def close(self) -> None:
        """End its threads."""
        self._threads.close()

    def remove(self, key: int) -> None:
        """Remove a request, if it was added."""
        self._states.pop(key, None)
        self._due.pop(key, None)

    def begin(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """Start computing the masks for the next `sample` while the model computes logits.

        Args:
            drafts: the same as for that call, by request key.
        """
        due, self._due = self._due, {}
        for key, draft in drafts.items():
            if (mask := self._states[key].mask) is not None:
                mask.expect(draft)
                due[key] = mask
        self._threads.start(list(due.values()))

    def sample(
        self,
        logits_RV: Tensor,
        keys: Sequence[int],
        drafts: Mapping[int, Sequence[int]] = NO_DRAFTS,
    ) -> SamplerOutput:
        """Sample for each request, and append the tokens to its state; see `launch`."""
        return self.launch(logits_RV, keys, drafts).result()

    def launch(
        self,
        logits_RV: Tensor,
        keys: Sequence[int],
        drafts: Mapping[int, Sequence[int]] = NO_DRAFTS,
    ) -> PendingOutput:
        """Start to sample for each request. The result, to be taken before the next launch, also
        appends the tokens to its state.

        A request with a draft has a row of logits for its next token and one after each token of
        the draft. Rows yield tokens as long as the tokens before equal the draft's.

        Args:
            logits_RV: fp32; modified in place, until the result.
            keys: of added requests, in row order.
            drafts: of some requests, by their index in `keys`.
        """
        if self._due:
            self.begin({})
        batch = self._plain_batch(keys)
        if drafts:
            batch = _Batch(list(keys), batch.requests, self._device, self._kernel, drafts)
        sums_R = _sums(logits_RV)
        logits_RV.index_fill_(1, self._banned, -torch.inf)
        logprobs_QV = None
        if batch.reporting:
            logprobs_QV = logits_RV[batch.reporting_rows].log_softmax(dim=-1)
        if batch.adjusting:
            for row in batch.adjusting:
                batch.states[row].note_due(row, batch, batch.before[row])
            batch.adjust(logits_RV)
        if batch.masked:
            self._threads.wait()
            batch.mask(logits_RV)
        return PendingOutput(self._finish, batch, logits_RV, sums_R, logprobs_QV)

    def _finish(
        self,
        batch: _Batch,
        tokens: list[int],
        sound: Sequence[bool],
        reports: Sequence[Report],
    ) -> SamplerOutput:
        """Append the tokens to the requests' states.

        Args:
            sound: whether each row's logits are finite.
            reports: of the rows that report logprobs.
        """
        logprobs: list[float | None] = [None] * len(tokens)
        top: list[Top] = [()] * len(tokens)
        for row, report in zip(batch.reporting, reports, strict=True):
            logprobs[row], top[row] = report
        first = [sound[row] for row in batch.starts]
        output = SamplerOutput(tokens, logprobs, top, list(map(int, first)), first, {}, {})
        for place in batch.undrafted:
            batch.requests[place].advance(tokens[batch.starts[place]])
        for place in batch.verified:
            self._verify(batch, place, sound, output)
        batch.note_advanced()
        return output

    def _plain_batch(self, keys: Sequence[int]) -> _Batch:
        """The batch without drafts, reused until the requests change."""
        if self._batch.keys != keys:
            states = [self._states[key] for key in keys]
            self._batch = _Batch(list(keys), states, self._device, self._kernel)
        return self._batch

    def _verify(
        self, batch: _Batch, place: int, sound: Sequence[bool], output: SamplerOutput
    ) -> None:
        """Append a request's tokens as far as its draft and mask allow.

        Args:
            sound: whether each row's logits are finite.
        """
        state, draft = batch.requests[place], batch.drafts.get(place, ())
        mask, changed, count = state.mask, False, 0
        if mask is not None and mask.at_end and mask.error is None:
            output.complete[place] = False
        # A draft is only verified as far as its masks were computed.
        rows = 1 + len(draft) if mask is None else mask.rows(len(draft))
        for row in range(batch.starts[place], batch.starts[place] + rows):
            if not sound[row]:
                output.finite[place] = False
                break
            token = output.tokens[row]
            if mask is not None:
                changed |= mask.advance(token)
                if mask.error is not None:
                    break
                self.constrained_tokens += state.params.grammar is not None
                if mask.at_end:
                    output.complete[place] = True
            state.advance(token)
            count += 1
            if place in output.complete or count > len(draft) or token != draft[count - 1]:
                break
        output.counts[place] = count
        if mask is None:
            return
        if mask.error is not None:
            output.errors[place] = mask.error
        elif changed and not mask.at_end:
            self._due[batch.keys[place]] = mask

    def prompt_logprobs(
        self, logits_LV: Tensor, following: Sequence[int], count: int
    ) -> list[TokenEvent]:
        """Logprobs of the tokens that follow L positions, with the `count` most likely."""
        events = []
        for start in range(0, len(following), ROWS):  # in parts, to bound memory
            tokens = following[start : start + ROWS]
            allowed = logits_LV[start : start + ROWS].index_fill(1, self._banned, -torch.inf)
            chosen = sent(np.array(tokens, np.int64), allowed.device)
            found = _likeliest(allowed.log_softmax(dim=-1), chosen, count)
            reports = _reports(
                tokens, [count] * len(tokens), *(each.numpy(force=True) for each in found)
            )
            events += [
                TokenEvent(token, logprob, top)
                for token, (logprob, top) in zip(tokens, reports, strict=True)
            ]
        return events


class PendingOutput:
    """The output of a `launch`, which the device may still be computing.

    Args:
        finish: makes it from the batch, its tokens, whether each row's logits are finite, and the
            reports of logprobs.
        sums_R: of the logits, before any was masked.
        logprobs_QV: of the rows that report them.
    """

    def __init__(
        self,
        finish: Callable[[_Batch, list[int], list[bool], list[Report]], SamplerOutput],
        batch: _Batch,
        logits_RV: Tensor,
        sums_R: Tensor,
        logprobs_QV: Tensor | None,
    ) -> None:
        self.revised = False  # whether tokens were drawn again: `tokens_R` at launch is outdated
        self._finish = finish
        self._batch = batch
        self._logprobs_QV = logprobs_QV
        self._sums_R = sums_R
        self._likeliest_R = _argmax(logits_RV)
        self._uniform_D = batch.uniform() if batch.drawing else None
        self._logits_RV = logits_RV if batch.may_be_unsure else None  # to draw again
        self._arrival = self._draw(logits_RV)
        if not batch.may_be_unsure:
            self._logprobs_QV = None

    def result(self) -> SamplerOutput:
        """Wait for the tokens, and append them to the requests' states; call this once."""
        batch = self._batch
        tokens_R, sums_R, *rest = self._arrival.numbers()
        while self._logits_RV is not None and (unsure_D := rest.pop(0)).any():
            batch.look_further(unsure_D)
            self.revised = True
            self._arrival = self._draw(self._logits_RV)
            tokens_R, sums_R, *rest = self._arrival.numbers()
        tokens = tokens_R.tolist()
        reports: list[Report] = []
        if rest:
            reports = _reports([tokens[row] for row in batch.reporting], batch.asked, *rest)
        return self._finish(batch, tokens, np.isfinite(sums_R).tolist(), reports)

    def _draw(self, logits_RV: Tensor) -> Arrival:
        """Set `tokens_R`, and send the results to the host, together."""
        batch = self._batch
        self.tokens_R = self._likeliest_R
        results = [self._sums_R]
        if self._uniform_D is not None:
            tokens_D, unsure_D = batch.draw(logits_RV, self._uniform_D)
            self.tokens_R = self._likeliest_R.index_copy(0, batch.drawing_rows, tokens_D)
            if batch.may_be_unsure and unsure_D is not None:
                results.append(unsure_D)
        if self._logprobs_QV is not None:
            chosen_Q = self.tokens_R[batch.reporting_rows]
            results += _likeliest(self._logprobs_QV, chosen_Q, max(batch.asked))
        return Arrival(self.tokens_R, *results)


class _State:
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
        self.candidates = CANDIDATES  # for top_p; see _Batch.look_further
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

    def note_due(self, row: int, batch: _Batch, before: Sequence[int]) -> None:
        """Add this row's logits changes to the batch's.

        Args:
            before: draft tokens between the output and this row.
        """
        if before:
            known = len(self._places)
            for token in before:
                self.advance(token)
            self.note_due(row, batch, ())
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


class _Entries:
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
        places = sent(np.concatenate(flat), logits_RV.device)
        values = sent(np.concatenate(self._values), logits_RV.device)
        self.__init__()  # type: ignore[misc]
        return places, values


class _Batch:
    """Per-batch tensors of sampling parameters, reused until the requests change.

    Args:
        requests: their states.
        kernel: see Sampler.
        drafts: by index in `requests`; a batch with drafts is used once.
    """

    def __init__(
        self,
        keys: list[int],
        requests: list[_State],
        device: torch.device,
        kernel: Draw | None,
        drafts: Mapping[int, Sequence[int]] = NO_DRAFTS,
    ) -> None:
        self.keys = keys
        self._kernel = kernel
        self.requests = requests
        self.drafts = drafts
        self.starts: list[int] = []  # each request's first row
        self.states: list[_State] = []  # of each row
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
        self.reporting_rows = sent(np.array(self.reporting, np.int64), device)
        self.drawing_rows = sent(np.array(self.drawing, np.int64), device)
        self.repeats = _Entries()
        self.additions = _Entries()
        drawn = [states[row] for row in self.drawing]
        self._drawn = drawn
        self._seeds = np.array([state.seed for state in drawn], np.uint64)
        params = [state.params for state in drawn]
        self._top_k = [min(each.top_k, MOST_TOP_K) for each in params]
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
            self._top_k_D = sent(np.array(self._top_k, np.int32), device)

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
        rows_C = sent(np.array(self.masked, np.int64), logits_RV.device)
        excluded_CV = excluded(words_CW, logits_RV.shape[-1], logits_RV.device)
        logits_RV[rows_C] = logits_RV[rows_C].masked_fill(excluded_CV, -torch.inf)

    def uniform(self) -> Tensor:
        """A number in [0, 1) for each row that draws, (D)."""
        lengths = [self.states[row].length + len(self.before[row]) for row in self.drawing]
        numbers = uniforms(self._seeds, np.array(lengths, np.uint64))
        return sent(numbers, self.drawing_rows.device)

    def draw(self, logits_RV: Tensor, uniform_D: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (D) of the rows that draw, by inverse transform sampling.

        Also whether top_p may keep more than the candidates, (D): if so, call `look_further` and
        draw again. None: it never does.
        """
        if self._kernel is not None:
            columns = (self._temperatures, self._top_k_D, self._top_p, self._min_p)
            tokens_D = self._kernel(logits_RV, self.drawing_rows, *columns, uniform_D)
            return tokens_D, None
        scores_DV, unsure_D = self._restrict(logits_RV[self.drawing_rows] / self._temperatures)
        sums_DV = scores_DV.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        totals_D1 = sums_DV[:, -1:]
        # Below the total, and right of equal sums: tokens of probability 0 are never drawn.
        wanted_D1 = torch.minimum(
            uniform_D[:, None] * totals_D1, totals_D1.nextafter(torch.zeros_like(totals_D1))
        )
        tokens_D = torch.searchsorted(sums_DV, wanted_D1, right=True)[:, 0]
        # Out of range if nothing is finite.
        return tokens_D.clamp(max=logits_RV.shape[-1] - 1), unsure_D

    def look_further(self, unsure_D: npt.NDArray[np.bool_]) -> None:
        """Use more candidates for top_p as long as these rows' requests run."""
        states = [state for state, unsure in zip(self._drawn, unsure_D, strict=True) if unsure]
        candidates = FURTHER * self._candidates
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
            places = sent(np.array([[max(k, 1) - 1] for k in limited]), scores_DV.device)
            free = sent(np.array([[k == 0] for k in limited]), scores_DV.device)
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


def _is_masked(params: SamplingParams) -> bool:
    return (
        params.grammar is not None
        or params.allowed_token_ids is not None
        or bool(params.bad_words_ids)
    )


# On a CPU these use NumPy: its argmax is 20 times as fast on one core, and PyTorch's threads would
# keep spinning after a sum, on the cores that the next step's kernels need.


def finite(logits_RV: Tensor) -> Tensor:
    """Whether each row is finite, (R)."""
    return _sums(logits_RV).isfinite()


def _sums(logits_RV: Tensor) -> Tensor:
    """The sum of each row, (R): finite if the row is."""
    # NaN and infinities propagate to the sum; sums of finite logits do not overflow.
    if logits_RV.device.type != "cpu":
        return logits_RV.sum(dim=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        return torch.from_numpy(logits_RV.numpy().sum(axis=-1))


def _argmax(logits_RV: Tensor) -> Tensor:
    """The most likely token of each row, (R); the first among ties."""
    if logits_RV.device.type != "cpu":
        return logits_RV.argmax(dim=-1)
    return torch.from_numpy(logits_RV.numpy().argmax(axis=-1))


def excluded(words_CW: Words, size: int, device: torch.device) -> Tensor:
    """Booleans (C, size) on a device: true for bits that are not set."""
    words = sent(words_CW.view(np.int32), device)
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
    return sent(np.array(values, np.float32), device)[:, None]


def _likeliest(logprobs_QV: Tensor, tokens_Q: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Each row's logprob of its token, followed by the highest (Q, 1 + K), and their ids (Q, K)."""
    best = logprobs_QV.topk(min(count, logprobs_QV.shape[-1]))
    return torch.cat((logprobs_QV.gather(1, tokens_Q[:, None]), best.values), dim=1), best.indices


def _reports(
    tokens: Sequence[int],
    counts: Sequence[int],
    logprobs: npt.NDArray[np.float32],
    ids: npt.NDArray[np.int64],
) -> list[Report]:
    """Each row's logprob of its token, and its `count` most likely tokens, from `_likeliest`."""
    reports = []
    rows = zip(tokens, counts, logprobs.tolist(), ids.tolist(), strict=True)
    for token, count, (logprob, *values), best in rows:
        pairs = [pair for pair in zip(best, values, strict=True) if pair[1] > -math.inf][:count]
        if pairs and logprob == pairs[-1][1] and token not in dict(pairs):
            pairs[-1] = (token, logprob)  # among ties, show the sampled token
        # Among ties, the sampled token comes first.
        pairs.sort(key=lambda pair: (-pair[1], pair[0] != token))
        reports.append((logprob, tuple(pairs)))
    return reports

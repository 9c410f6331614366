"""Samples the next tokens of a batch: logits (R, V) in, token ids and logprobs out.

Vectorized over rows where `gptj.sampling`, the reference, loops. Penalties, biases and bans touch
only the tokens that they change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptj.engine.constraints.mask_threads import MaskThreads
from gptj.engine.constraints.token_mask import TokenMask, packed
from gptj.engine.events import TokenEvent
from gptj.engine.runners.base import Draw
from gptj.engine.runners.transfer import HostCopy, to_device
from gptj.engine.sampling_batch import NO_DRAFTS, SamplingBatch, SamplingState
from gptj.sampling import SamplingParams

Top = tuple[tuple[int, float], ...]
Report = tuple[float, Top]  # a token's logprob, and the most likely ones
ROWS = 128  # of a prompt's logits to process together


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
        self._states: dict[int, SamplingState] = {}
        self._due: dict[int, TokenMask] = {}  # to compute, by request
        self._kernel = draw
        self._batch = SamplingBatch([], [], device, draw)

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
        self._states[key] = SamplingState(params, prompt_ids, stop_ids, output_ids, mask)
        self._batch = SamplingBatch([], [], self._device, self._kernel)

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
            batch = SamplingBatch(list(keys), batch.requests, self._device, self._kernel, drafts)
        sums_R = _sums(logits_RV)
        logits_RV.index_fill_(1, self._banned, -torch.inf)
        logprobs_QV = None
        if batch.reporting:
            logprobs_QV = logits_RV[batch.reporting_rows].log_softmax(dim=-1)
        if batch.adjusting:
            for row in batch.adjusting:
                batch.states[row].collect_changes(row, batch, batch.before[row])
            batch.adjust(logits_RV)
        if batch.masked:
            self._threads.wait()
            batch.mask(logits_RV)
        return PendingOutput(self._finish, batch, logits_RV, sums_R, logprobs_QV)

    def _finish(
        self,
        batch: SamplingBatch,
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

    def _plain_batch(self, keys: Sequence[int]) -> SamplingBatch:
        """The batch without drafts, reused until the requests change."""
        if self._batch.keys != keys:
            states = [self._states[key] for key in keys]
            self._batch = SamplingBatch(list(keys), states, self._device, self._kernel)
        return self._batch

    def _verify(
        self, batch: SamplingBatch, place: int, sound: Sequence[bool], output: SamplerOutput
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
            chosen = to_device(np.array(tokens, np.int64), allowed.device)
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
        finish: Callable[[SamplingBatch, list[int], list[bool], list[Report]], SamplerOutput],
        batch: SamplingBatch,
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
        self._copy = self._draw(logits_RV)
        if not batch.may_be_unsure:
            self._logprobs_QV = None

    def result(self) -> SamplerOutput:
        """Wait for the tokens, and append them to the requests' states; call this once."""
        batch = self._batch
        tokens_R, sums_R, *rest = self._copy.numbers()
        while self._logits_RV is not None and (unsure_D := rest.pop(0)).any():
            batch.widen_candidates(unsure_D)
            self.revised = True
            self._copy = self._draw(self._logits_RV)
            tokens_R, sums_R, *rest = self._copy.numbers()
        tokens = tokens_R.tolist()
        reports: list[Report] = []
        if rest:
            reports = _reports([tokens[row] for row in batch.reporting], batch.asked, *rest)
        return self._finish(batch, tokens, np.isfinite(sums_R).tolist(), reports)

    def _draw(self, logits_RV: Tensor) -> HostCopy:
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
        return HostCopy(self.tokens_R, *results)


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

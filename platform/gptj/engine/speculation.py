"""Prompt lookup decoding: draft a request's continuation for the model to verify.

Outputs often repeat their prompt or themselves: edited text, quoted passages, code. If the last
tokens have occurred before, the draft is what followed them then. A step computes a request's next
token and its draft together, and samples at each position; the draft is accepted up to the first
token that differs from the sample. Drafts thus never change outputs, only the tokens per step.

Saxena, "Prompt Lookup Decoding", 2023; Leviathan et al., "Fast Inference from Transformers via
Speculative Decoding", 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gptj.engine.decode_batch import DecodeBatch
from gptj.engine.request import Request

Drafts = Mapping[int, Sequence[int]]  # by row of the decode batch; not empty

MAX_DRAFT = 15  # tokens; with the one before, as many as CudaRunner computes as decode rows
MAX_ROWS = 64  # of logits, for decoding sequences and drafts; at least max_num_seqs
CANDIDATES = 16  # earlier occurrences to compare, latest first
# Cost of a token relative to a step's fixed cost, which is mostly reading the weights. CPU:
# measured with int8, 1 to 16 tokens and AVX-512 (bf16: 0.1); GPU: an estimate.
TOKEN_COST = {"cpu": 0.15, "cuda": 0.004}
FIRST_RATE = 0.5  # assumed acceptance rate before the first draft
MAX_RATE = 0.98
WEIGHT = 0.3  # of the latest token in the rate
TRIAL_SHARE = 0.015  # share of the steps' cost spent on trials after the first failure
MAX_PAUSE = 256  # steps


@dataclass(frozen=True)
class Speculation:
    """How to propose tokens, with vLLM's names and semantics."""

    method: Literal["ngram"] = "ngram"
    num_speculative_tokens: int = 8  # the longest draft
    prompt_lookup_min: int = 2  # fewest last tokens that must match
    prompt_lookup_max: int = 4  # longer matches, up to this, are preferred

    def __post_init__(self) -> None:
        if self.method != "ngram":
            raise ValueError(f"method must be ngram, got {self.method!r}")
        if not 1 <= self.num_speculative_tokens <= MAX_DRAFT:
            raise ValueError(
                f"num_speculative_tokens must be in [1, {MAX_DRAFT}], "
                f"got {self.num_speculative_tokens}"
            )
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min must be in [1, prompt_lookup_max="
                f"{self.prompt_lookup_max}], got {self.prompt_lookup_min}"
            )


class Speculator:
    """Proposes and counts drafts.

    Args:
        token_cost: see TOKEN_COST.
        max_rows: see MAX_ROWS.
    """

    def __init__(self, settings: Speculation, token_cost: float, max_rows: int) -> None:
        self.drafts = 0
        self.draft_tokens = 0
        self.accepted_tokens = 0
        self._settings = settings
        self._token_cost = token_cost
        self._max_rows = max_rows
        self._drafters: dict[Request, Drafter] = {}

    def propose(self, batch: DecodeBatch, budget: int) -> dict[int, list[int]]:
        """Drafts for rows of the decode batch.

        Args:
            budget: most draft tokens in total.
        """
        drafts: dict[int, list[int]] = {}
        budget = min(budget, self._max_rows - len(batch))
        worth = self._worth(batch)
        for row, request in enumerate(batch.requests):
            # Sampling yields one token more than are accepted.
            most = min(budget, request.max_length - len(request.tokens) - 1)
            if most < 1:
                continue
            drafter = self._drafters.get(request)
            if drafter is None:
                drafter = self._drafters[request] = Drafter(self._settings)
            draft = drafter.propose(request.tokens, most, worth)
            for place, token in enumerate(draft):
                if token in request.stop_ids:  # the output ends there
                    del draft[place:]
                    break
            if draft:
                drafts[row] = draft
                budget -= len(draft)
        return drafts

    def note(self, batch: DecodeBatch, drafts: Drafts, accepted: Sequence[int]) -> None:
        """Learn from a step's drafts.

        Args:
            accepted: number of accepted tokens, per row.
        """
        worth = self._worth(batch)
        for row, draft in drafts.items():
            self._drafters[batch.requests[row]].note(len(draft), accepted[row], worth)
            self.drafts += 1
            self.draft_tokens += len(draft)
            self.accepted_tokens += accepted[row]

    def forget(self, request: Request) -> None:
        self._drafters.pop(request, None)

    def _worth(self, batch: DecodeBatch) -> float:
        """The least acceptance probability at which drafting a token pays off.

        It costs token_cost steps, and a step of this batch yields len(batch) tokens.
        """
        cost = self._token_cost * max(1, len(batch))
        return cost / (1 + cost)


class Drafter:
    """Proposes drafts for one request; fewer and shorter ones as they fail."""

    def __init__(self, settings: Speculation) -> None:
        self._settings = settings
        self._index = NgramIndex(settings.prompt_lookup_min, settings.prompt_lookup_max)
        self._rate = FIRST_RATE  # probability that a token is accepted if those before it are
        self._pause = 0  # steps
        self._failures = 0  # consecutive drafts that did not pay off

    def propose(self, tokens: Sequence[int], most: int, worth: float) -> list[int]:
        """A possibly empty draft that may follow `tokens`.

        Args:
            tokens: those of the last call, extended.
            most: most tokens to draft.
            worth: the least acceptance probability at which a token pays off.
        """
        if self._pause:
            self._pause -= 1
            return []
        if not self._index.extend(tokens):
            return []
        # At least one, to detect when drafts succeed again.
        length = max(1, int(math.log(worth) / math.log(self._rate)))
        return self._index.continuation(
            tokens, min(length, most, self._settings.num_speculative_tokens)
        )

    def note(self, drafted: int, accepted: int, worth: float) -> None:
        """Learn from a verified draft."""
        for _ in range(accepted):
            self._rate += WEIGHT * (MAX_RATE - self._rate)
        if accepted < drafted:
            self._rate -= WEIGHT * self._rate
        if accepted:
            self._failures = 0
        elif self._rate <= worth:
            # Drafting a token in every step would cost the share `worth`.
            self._pause = min(int(worth / TRIAL_SHARE * 2**self._failures), MAX_PAUSE)
            self._failures += 1


class NgramIndex:
    """Finds earlier occurrences of a growing sequence's last tokens.

    Args:
        least: fewest tokens that must match.
        most: most tokens to compare.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least = least
        self._most = most
        # Index after an n-gram of `least` tokens -> that of its previous occurrence, or 0.
        self._before: list[int] = [0] * least
        self._latest: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> bool:
        """Index the new tokens; returns whether the last n-gram has occurred before.

        Called in nearly every step of every request: the usual single token takes a microsecond.
        """
        end = len(tokens)
        if len(self._before) < end:
            self._extend(tokens, end - 1)
        if len(self._before) == end:
            ngram = tuple(tokens[-self._least :])
            self._before.append(self._latest.get(ngram, 0))
            self._latest[ngram] = end
        return self._before[end] > 0

    def continuation(self, tokens: Sequence[int], length: int) -> list[int]:
        """`length` tokens that followed the best earlier occurrence, if there is one.

        Args:
            tokens: those of the last `extend`.
        """
        start = self._best(tokens)
        if start == 0:
            return []
        found = list(tokens[start : start + length])
        while len(found) < length:  # the continuation overlaps itself: repeat it
            found += found[-(len(tokens) - start) :][: length - len(found)]
        return found

    def _extend(self, tokens: Sequence[int], last: int) -> None:
        """Index the n-grams up to the one that ends before index `last`."""
        first = len(self._before)  # the next n-gram's end
        recent = tokens[first - self._least : last]
        for end, ngram in enumerate(
            zip(*(recent[place:] for place in range(self._least)), strict=False), first
        ):
            self._before.append(self._latest.get(ngram, 0))
            self._latest[ngram] = end

    def _best(self, tokens: Sequence[int]) -> int:
        """The index after the latest of the longest earlier occurrences; 0 if there is none."""
        end = len(tokens)
        best, longest = 0, 0
        candidate = self._before[end]
        for _ in range(CANDIDATES):
            if candidate == 0:
                break
            size = self._least
            limit = min(self._most, candidate)
            while size < limit and tokens[candidate - size - 1] == tokens[end - size - 1]:
                size += 1
            if size > longest:
                best, longest = candidate, size
            if longest == self._most:
                break
            candidate = self._before[candidate]
        return best

"""Masks of the tokens that may continue a request's output: one bit per vocabulary entry."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptj.engine.constraints.grammar import GrammarError
from gptj.sampling import SamplingParams

# CPU time allowed for masks, about a small model's step; nearly all take under a millisecond.
MEAN_SECONDS = 0.02  # per token, averaged over COUNTED or more
COUNTED = 16
AHEAD_SECONDS = 0.005  # for a draft's masks; beyond it, only a shorter draft is verified
NO_TOKEN = (
    "the request allows no further token: its grammar, allowed_token_ids, bad_words and "
    "min_tokens contradict each other here"
)

Words = npt.NDArray[np.uint32]


class TokenMask:
    """Follows the output of a request with a grammar, allowed_token_ids or bad_words.

    Args:
        free: bits of all ids that can be sampled.
        stop_ids: ids that end the output.
        output_ids: the output so far.

    Raises:
        GrammarError: if the output does not follow the grammar.
    """

    def __init__(
        self,
        params: SamplingParams,
        free: Words,
        stop_ids: Iterable[int],
        output_ids: Sequence[int],
    ) -> None:
        self.error: Exception | None = None  # the request must fail
        self.at_end = False  # the grammar allows no further token: the output is complete
        self.words: Words = np.zeros_like(free)  # the next token's mask
        self._ahead: list[Words] = []  # masks after each token of a draft
        self._draft: Sequence[int] = ()
        self._params = params
        self._stop_ids = frozenset(stop_ids)
        self._output = list(output_ids)
        size = 32 * len(free)
        self._free = free.copy()
        if params.allowed_token_ids is not None:
            self._free &= packed(params.allowed_token_ids, size)
        self._free &= ~packed((word[0] for word in params.bad_words_ids if len(word) == 1), size)
        # Last tokens of longer words, by their preceding tokens: clients may send hundreds.
        self._endings: dict[tuple[int, ...], list[int]] = {}
        for word in params.bad_words_ids:
            if len(word) > 1:
                self._endings.setdefault(tuple(word[:-1]), []).append(word[-1])
        self._lengths = {len(begin) for begin in self._endings}
        self._stops = packed(self._stop_ids, size)
        self._grammar = params.grammar
        self._matcher: Any = None
        self._seconds, self._count = 0.0, 0
        if self._grammar is not None:
            self._matcher = self._grammar.matcher()
            if params.ignore_eos:
                self._free &= ~packed(self._grammar.eos_ids, size)
            if self._output and not self._matcher.consume_tokens(self._output):
                raise GrammarError("the output so far does not follow the grammar")
            self.at_end = bool(self._matcher.is_stopped())

    def advance(self, token: int) -> bool:
        """Append a sampled token; returns whether the mask must be recomputed."""
        if token in self._stop_ids:
            return False
        changes = (
            self._matcher is not None
            or bool(self._endings)
            or len(self._output) < self._params.min_tokens
        )
        self._output.append(token)
        if self._matcher is not None:
            if not self._matcher.consume_token(token):
                self._fail(self._matcher.get_error())
            self.at_end = bool(self._matcher.is_stopped())
        return changes and not self.at_end and self.error is None

    def expect(self, draft: Sequence[int]) -> None:
        """Have the next `compute` also compute the masks after each token of a draft."""
        self._draft = draft

    def rows(self, draft: int) -> int:
        """How many tokens can be sampled, given a draft of `draft` tokens."""
        if self.at_end or self.error is not None:
            return 0
        return 1 + min(draft, len(self._ahead))

    def words_after(self, count: int) -> Words:
        """The mask after `count` tokens of the draft; meaningless beyond `rows`."""
        return self._ahead[count - 1] if 0 < count <= len(self._ahead) else self.words

    def abandon(self) -> None:
        """Fail the request: its mask was not computed in time."""
        self._refuse("the mask of one token takes seconds")

    def compute(self) -> None:
        """Set `words`, on any thread; errors go to `error`, since they only fail this request."""
        draft, self._draft, self._ahead = self._draft, (), []
        words = self._free.copy()
        if self._matcher is not None and not self._compute_grammar(words):
            return
        self._ban(words, self._output)
        self.words = words
        if words.any():
            if draft:
                self._look_ahead(draft)
            return
        # min_tokens and ignore_eos cannot continue an output that its grammar ends.
        if self._matcher is not None and self._matcher.is_accepting():
            self.at_end = True
        else:
            self.error = GrammarError(NO_TOKEN)

    def _ban(self, words: Words, output: Sequence[int]) -> None:
        """Clear the bits of tokens that bad_words and min_tokens ban after an output."""
        for length in self._lengths:
            for last in self._endings.get(tuple(output[-length:]), ()):
                words[last >> 5] &= ~np.uint32(1 << (last & 31))
        if len(output) < self._params.min_tokens:
            words &= ~self._stops

    def _look_ahead(self, draft: Sequence[int]) -> None:
        """Compute masks after each token of a draft, up to one that is not allowed or ends it.

        Works on a copy, so that the state without the draft is unaffected.
        """
        start = time.thread_time()
        matcher = None if self._matcher is None else self._matcher.deep_copy()
        output, words = list(self._output), self.words
        for token in draft:
            if not words[token >> 5] >> np.uint32(token & 31) & 1:
                return
            output.append(token)
            words = self._free.copy()
            if matcher is not None:
                assert self._grammar is not None
                if not matcher.consume_token(token) or matcher.is_stopped():
                    return
                allowed = np.zeros(self._grammar.words, np.uint32)
                matcher.unsafe_compute_mask_ptr(allowed.ctypes.data, allowed.nbytes)
                if matcher.is_error():
                    return
                words &= allowed[: len(words)]
            self._ban(words, output)
            if not words.any() or time.thread_time() - start > AHEAD_SECONDS:
                return
            self._ahead.append(words)

    def _compute_grammar(self, words: Words) -> bool:
        """Clear bits that the grammar does not allow; False on failure."""
        assert self._grammar is not None
        if self.at_end:
            words[:] = 0
            return True
        start = time.thread_time()
        allowed = np.zeros(self._grammar.words, np.uint32)
        try:
            self._matcher.unsafe_compute_mask_ptr(allowed.ctypes.data, allowed.nbytes)
        except Exception as error:
            return self._fail(str(error))
        if self._matcher.is_error():
            return self._fail(self._matcher.get_error())
        self._seconds += time.thread_time() - start
        self._count += 1
        if self._seconds > MEAN_SECONDS * max(COUNTED, self._count):
            return self._refuse(
                f"its masks take {1000 * self._seconds / self._count:.0f} ms per token, but "
                f"{1000 * MEAN_SECONDS:.0f} are allowed: simplify it"
            )
        words &= allowed[: len(words)]
        return True

    def _fail(self, reason: str) -> bool:
        """Fail this output; the grammar is recompiled for the next."""
        assert self._grammar is not None
        self._grammar.forget()
        reason = reason.partition("<")[0].strip()
        self.error = self.error or GrammarError(f"the grammar failed at this output: {reason}")
        return False

    def _refuse(self, reason: str) -> bool:
        """Fail this output, and reject others with the same grammar."""
        assert self._grammar is not None
        self.error = self.error or GrammarError(reason)
        self._grammar.refuse(reason)
        return False


def packed(ids: Iterable[int], size: int) -> Words:
    """Bit mask of the ids below `size`."""
    bits = np.zeros(-(-size // 32) * 32, dtype=bool)
    bits[np.fromiter((each for each in ids if 0 <= each < size), np.int64)] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


def unpacked(words: Words, size: int) -> npt.NDArray[np.bool_]:
    """Booleans (C, size) of words (C, W)."""
    return np.unpackbits(words.view(np.uint8), axis=1, count=size, bitorder="little").view(bool)

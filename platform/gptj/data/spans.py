"""A question's windows and their logits in, its likeliest answers in the context out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from gptj.data.questions import Offsets
from gptj.data.windows import NO_ANSWER, Window
from gptj.data.words import Words


@dataclass(frozen=True)
class Span:
    """A part of the context, in characters; (0, 0) means no answer."""

    start: int
    end: int
    score: float  # probability


class Candidate(NamedTuple):
    """A span of one window, before its logits are compared with the other windows'."""

    logit: float  # of its start and its end together
    start: int
    end: int


def best_spans(
    windows: Sequence[Window],
    start_logits: Sequence[Tensor],
    end_logits: Sequence[Tensor],
    *,
    top_k: int = 1,
    max_answer_tokens: int = 15,
    handle_impossible_answer: bool = False,
    words: Words | None = None,
) -> list[Span]:
    """The most likely answers over all windows of one question, best first, without duplicates.

    A span's score is the probability of its start times that of its end, by softmax over the
    context; for a single window this equals Hugging Face's pipeline. A place covered by several
    windows counts once, with its highest logit, so that scores sum to at most 1.

    Args:
        start_logits, end_logits: (L) of each window; beyond its tokens is padding.
        top_k: maximum number of answers.
        max_answer_tokens: longest answer.
        handle_impossible_answer: let the empty answer (0, 0) compete, with the first token's
            logits in the window where they are lowest.
        words: the context's; widens each answer to whole words, see candidates.
    """
    if top_k < 1 or max_answer_tokens < 1:
        raise ValueError(
            f"top_k and max_answer_tokens must be 1 or more, got {top_k} and {max_answer_tokens}"
        )
    starts = [_as_array(logits) for logits in start_logits]
    ends = [_as_array(logits) for logits in end_logits]
    parts = list(zip(windows, starts, ends, strict=True))
    found = [
        candidate
        for window, start, end in parts
        for candidate in candidates(window, start, end, max_answer_tokens, top_k, words)
    ]
    totals = [_log_sum_exp(_by_place(windows, logits), null=None) for logits in (starts, ends)]
    if handle_impossible_answer:
        null = min(parts, key=lambda part: null_logit(part[1], part[2]))
        found.append(Candidate(null_logit(null[1], null[2]), 0, 0))
        totals = [
            _log_sum_exp(_by_place(windows, logits), null=float(part[NO_ANSWER]))
            for logits, part in zip((starts, ends), null[1:], strict=True)
        ]
    best: dict[Offsets, float] = {}
    for logit, start_place, end_place in sorted(
        found, key=lambda each: (-each.logit, each.start, each.end)
    ):
        best.setdefault((start_place, end_place), logit)
    return [
        Span(*place, score=float(np.exp(logit - sum(totals))))
        for place, logit in list(best.items())[:top_k]
    ]


def candidates(
    window: Window,
    start_logits: np.ndarray[Any, Any],
    end_logits: np.ndarray[Any, Any],
    max_answer_tokens: int,
    top_k: int,
    words: Words | None = None,
) -> list[Candidate]:
    """The `top_k` spans of a window with the largest sums of logits, best first, each once.

    Args:
        words: the context's; spans are widened to whole words, adding up the probabilities of
            spans that become equal.
    """
    tokens = [token for token, offset in enumerate(window.offsets) if offset is not None]
    if not tokens:
        return []
    first, last = tokens[0], tokens[-1] + 1
    usable = np.array([offset is not None for offset in window.offsets[first:last]])
    start = np.where(usable, start_logits[first:last], -np.inf)
    end = np.where(usable, end_logits[first:last], -np.inf)
    width = min(max_answer_tokens, len(start))
    # Row t: the spans from token t on, of 1 to `width` tokens.
    ends = np.lib.stride_tricks.sliding_window_view(
        np.concatenate([end, np.full(width - 1, -np.inf)]), width
    )
    if words is not None:
        return _whole_words(window.offsets[first:last], start[:, None] + ends, words, top_k)
    sums = (start[:, None] + ends).ravel()
    possible = int((sums > -np.inf).sum())
    found: dict[Offsets, float] = {}
    wanted = top_k
    while True:
        # Tokens can share a character, so several spans can cover the same characters.
        wanted = min(wanted, possible)
        largest = np.argpartition(-sums, wanted - 1)[:wanted]
        for place in largest[np.argsort(-sums[largest], kind="stable")].tolist():
            from_token, more = divmod(place, width)
            begin, end_offset = (
                window.offsets[first + from_token],
                window.offsets[first + from_token + more],
            )
            assert begin is not None
            assert end_offset is not None
            found.setdefault((begin[0], end_offset[1]), float(sums[place]))
        if len(found) >= top_k or wanted == possible:
            break
        wanted *= 2
    return [Candidate(logit, *place) for place, logit in list(found.items())[:top_k]]


def _whole_words(
    offsets: Sequence[Offsets | None], sums: np.ndarray[Any, Any], words: Words, top_k: int
) -> list[Candidate]:
    """The `top_k` best spans of a window as whole words.

    Args:
        sums: (tokens, width), logits of the spans by first token and length; -inf if invalid.
    """
    # A span's words begin by its first token alone, and end by its last.
    starts, start_of = np.unique([0 if o is None else o[0] for o in offsets], return_inverse=True)
    ends, end_of = np.unique([0 if o is None else o[1] for o in offsets], return_inverse=True)
    froms, lengths = np.nonzero(sums > -np.inf)
    # Tokens can share a character: spans of the same characters count once.
    highest = np.full(len(starts) * len(ends), -np.inf)
    spans = start_of[froms] * len(ends) + end_of[froms + lengths]
    np.maximum.at(highest, spans, sums[froms, lengths])
    spans = np.flatnonzero(highest > -np.inf)
    logits = highest[spans]
    begins, begin_of = np.unique([words.start(each) for each in starts], return_inverse=True)
    finishes, finish_of = np.unique([words.end(each) for each in ends], return_inverse=True)
    answers = begin_of[spans // len(ends)] * len(finishes) + finish_of[spans % len(ends)]
    # log-sum-exp for each answer.
    highest = np.full(len(begins) * len(finishes), -np.inf)
    np.maximum.at(highest, answers, logits)
    totals = np.bincount(answers, np.exp(logits - highest[answers]))
    found = np.flatnonzero(totals)
    merged = highest[found] + np.log(totals[found])
    best = np.argsort(-merged, kind="stable")[:top_k]
    return [
        Candidate(
            float(merged[each]),
            int(begins[found[each] // len(finishes)]),
            int(finishes[found[each] % len(finishes)]),
        )
        for each in best
    ]


def null_logit(start_logits: np.ndarray[Any, Any], end_logits: np.ndarray[Any, Any]) -> float:
    """A window's logit for "no answer here"."""
    return float(start_logits[NO_ANSWER] + end_logits[NO_ANSWER])


def _as_array(logits: Tensor) -> np.ndarray[Any, Any]:
    return logits.detach().double().cpu().numpy()


def _by_place(
    windows: Sequence[Window], logits: Sequence[np.ndarray[Any, Any]]
) -> dict[Offsets, float]:
    """The highest logit that any window gives to each place of the context."""
    places: dict[Offsets, float] = {}
    for window, values in zip(windows, logits, strict=True):
        for place, logit in zip(window.offsets, values.tolist(), strict=False):
            if place is not None:
                places[place] = max(logit, places.get(place, -np.inf))
    return places


def _log_sum_exp(places: dict[Offsets, float], null: float | None) -> float:
    values = [*places.values(), *([] if null is None else [null])]
    return float(np.logaddexp.reduce(values))

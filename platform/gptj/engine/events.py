"""Events that the engine reports for a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TokenEvent:
    """A new token. A stop token has no event: it is `Finished.stop_token`."""

    token_id: int
    logprob: float | None = None  # the model's own, before penalties; None unless requested
    top: tuple[tuple[int, float], ...] = ()  # the most likely (id, logprob), best first


@dataclass(frozen=True)
class PromptLogprobs:
    """The prompt's tokens with their logprobs; the first has none."""

    tokens: tuple[TokenEvent, ...]


@dataclass(frozen=True)
class BeamsFound:
    """The outputs of a beam search, best first, each with the stop token that ended it."""

    outputs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Finished:
    """The last event of a request that succeeded or was cancelled."""

    reason: Literal["stop", "length", "cancelled"]
    stop_token: int | None = None
    logprob: float | None = None  # of the stop token; None unless requested
    top: tuple[tuple[int, float], ...] = ()  # the most likely at its position, as in TokenEvent


@dataclass(frozen=True)
class Failed:
    """The last event of a request that failed."""

    error: Exception


Event = TokenEvent | PromptLogprobs | BeamsFound | Finished | Failed

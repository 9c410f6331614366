"""What an engine tells a caller of its request, as plain values; and a beam search's wishes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TokenEvent:
    """A new token. Stop tokens are none: they come as `Finished.stop_token`."""

    token_id: int
    logprob: float | None = None  # by the model alone, before penalties; None if not asked for
    top: tuple[tuple[int, float], ...] = ()  # the likeliest (id, log-probability), best first


@dataclass(frozen=True)
class PromptLogprobs:
    """What the model thought of the prompt's own tokens; it has no opinion on the first."""

    tokens: tuple[TokenEvent, ...]


@dataclass(frozen=True)
class BeamsFound:
    """The continuations of a beam search, best first, with the stop token that ended each."""

    outputs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Finished:
    """The last event of a request that went well, or was cancelled."""

    reason: Literal["stop", "length", "cancelled"]
    stop_token: int | None = None
    logprob: float | None = None  # of the stop token; None if not asked for
    top: tuple[tuple[int, float], ...] = ()  # the likeliest in its place, as TokenEvent has them


@dataclass(frozen=True)
class Failed:
    """The last event of a request that went wrong."""

    error: Exception


Event = TokenEvent | PromptLogprobs | BeamsFound | Finished | Failed
OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class BeamParams:
    num_beams: int  # continuations that are kept at each step
    num_results: int = 1  # of them, how many to return
    length_penalty: float = 1.0  # rank by log-probability / length ** length_penalty
    early_stopping: bool = False  # end when num_beams continuations have ended

    def __post_init__(self) -> None:
        if not 1 <= self.num_results <= self.num_beams:
            raise ValueError(
                f"num_results must be in [1, num_beams={self.num_beams}], got {self.num_results}"
            )

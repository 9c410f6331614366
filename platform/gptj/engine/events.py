"""Events that the engine reports for a request, and the parameters of a beam search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from gptj.engine.request import Ticket


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
# Called once per step with the events of all requests submitted with it.
OnEvents = Callable[[Sequence[tuple["Ticket", Event]]], None]


def one_by_one(on_event: Callable[[Event], None]) -> OnEvents:
    """Adapt a callback for single events; if it raises, it still gets the remaining events."""

    def on_events(events: Sequence[tuple[Ticket, Event]]) -> None:
        errors = []
        for _, event in events:
            try:
                on_event(event)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    return on_events


@dataclass(frozen=True)
class BeamParams:
    num_beams: int  # beams kept at each step
    num_results: int = 1  # of those, how many to return
    length_penalty: float = 1.0  # rank by logprob / length ** length_penalty
    early_stopping: bool = False  # stop once num_beams beams have ended

    def __post_init__(self) -> None:
        if not 1 <= self.num_results <= self.num_beams:
            raise ValueError(
                f"num_results must be in [1, num_beams={self.num_beams}], got {self.num_results}"
            )

"""A request in the engine: parameters, tokens so far, state, and its caller's handle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from gptj.engine.adapter_slots import Adapter
from gptj.engine.events import Event
from gptj.engine.runners.lora import NONE
from gptj.sampling import SamplingParams


def check_ids(name: str, ids: Iterable[int], vocabulary: int) -> None:
    """ValueError, naming the field, if a token id is not in a vocabulary of this size."""
    for token in ids:
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"{name}: {token} is not a token id of this model, which has {vocabulary}"
            )


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


@dataclass(eq=False)
class Request:
    number: int  # in order of arrival
    tokens: list[int]  # the prompt, then the output so far
    prompt_length: int
    max_length: int  # of prompt and output, in tokens
    params: SamplingParams
    stop_ids: frozenset[int]
    on_events: OnEvents
    beams: BeamParams | None = None
    adapter: Adapter | None = None  # held until the end
    group: int | None = None  # shared by samples of one prompt until they decode
    submitted: float = field(default_factory=time.monotonic)  # seconds
    started: float | None = None  # its first step
    cached: int = 0  # tokens of the prompt that its first step found in the prefix cache
    digests: list[bytes] = field(default_factory=list)  # of the tokens' full pages so far
    scored: bool = False  # whether its prompt logprobs have been reported
    ended: bool = False  # its last event has been created
    ticket: Ticket = field(init=False)  # its caller's handle

    @property
    def scores_prompt(self) -> bool:
        """Whether prompt logprobs have yet to be reported."""
        return self.params.prompt_logprobs is not None and not self.scored

    @property
    def slot(self) -> int:
        """Its adapter's slot, or NONE."""
        return NONE if self.adapter is None else self.adapter.slot

    @property
    def salt(self) -> bytes:
        """Salt of its pages' digests: cached pages are specific to an adapter."""
        return b"" if self.adapter is None else self.adapter.digest

    def end(self) -> None:
        """Mark as ended, with its last event; idempotent.

        No step that is launched from now on computes it.
        """
        if not self.ended and self.adapter is not None:
            self.adapter.release()
        self.ended = True

    @property
    def width(self) -> int:
        """Number of sequences that it runs concurrently."""
        return self.beams.num_beams if self.beams is not None else 1


class Ticket:
    """A caller's handle to a request."""

    def __init__(self, request: Request, cancel: Callable[[Request], None]) -> None:
        self._request = request
        self._cancel = cancel

    @property
    def queued_seconds(self) -> float | None:
        """From submission to the request's first step; None before that."""
        request = self._request
        return None if request.started is None else request.started - request.submitted

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were found in the prefix cache."""
        return self._request.cached

    def cancel(self) -> None:
        """End the request: now if waiting, at the next step if running; no-op if ended."""
        self._cancel(self._request)


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

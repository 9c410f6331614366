"""A request as the engine keeps it: its wishes, its tokens so far, and where it stands."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Literal

from gptj.engine.events import BeamParams, Event, Failed, Finished, OnEvent
from gptj.sampling import SamplingParams

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Request:
    number: int  # in order of arrival
    tokens: list[int]  # the prompt, then the output so far
    prompt_length: int
    max_length: int  # tokens, with the last of the output
    params: SamplingParams
    stop_ids: frozenset[int]
    on_event: OnEvent
    beams: BeamParams | None = None
    group: int | None = None  # of outputs that have the same tokens still: see Engine.submit_many
    submitted: float = field(default_factory=time.monotonic)  # seconds
    started: float | None = None  # the first step that worked on it
    digests: list[bytes] = field(default_factory=list)  # of the tokens' full pages, as far as known
    scored: bool = False  # whether the prompt's log-probabilities have been reported
    waiting: bool = False  # changed by the waiting queue only
    ended: bool = False

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are still to be reported."""
        return self.params.prompt_logprobs is not None and not self.scored

    @property
    def width(self) -> int:
        """Sequences that it runs at once."""
        return self.beams.num_beams if self.beams is not None else 1

    def emit(self, event: Event) -> bool:
        """Tell the caller; False if the caller failed at it."""
        try:
            self.on_event(event)
        # A caller that cannot take its events must not stop the others'.
        except Exception:
            logger.exception("a request's on_event failed; the request is cancelled")
            return False
        return True

    def end(self, event: Finished | Failed) -> None:
        """Tell the caller for the last time; harmless if that has been done."""
        if not self.ended:
            self.ended = True
            self.emit(event)

    def finished(
        self,
        reason: Literal["stop", "length", "cancelled"],
        stop_token: int | None = None,
        logprob: float | None = None,
        top: tuple[tuple[int, float], ...] = (),
    ) -> Finished:
        return Finished(reason, stop_token, logprob, top)

"""What tests of the engine share: a tiny model, callers that collect events, watched runners."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gptj import GPTJConfig, GPTJForCausalLM
from gptj.engine.engine import Engine
from gptj.engine.events import BeamsFound, Event, Failed, Finished, PromptLogprobs, TokenEvent
from gptj.engine.request import BeamParams, Ticket, one_by_one
from gptj.engine.runners.base import StepBatch
from gptj.engine.runners.torch_runner import TorchRunner
from gptj.sampling import SamplingParams

EOS = 1
SECONDS = 60  # for what must come


def tiny_model(
    n_positions: int = 256, device: torch.device | str = "cpu", seed: int = 0
) -> GPTJForCausalLM:
    torch.manual_seed(seed)
    config = GPTJConfig(
        vocab_size=97,
        n_positions=n_positions,
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=8,
        bos_token_id=0,
        eos_token_id=EOS,
        initializer_range=0.3,  # wide, so that probabilities differ and eos comes
    )
    return GPTJForCausalLM(config).eval().to(device)


def tokens(count: int, start: int = 2) -> list[int]:
    """A prompt that repeats no page of 16."""
    return [2 + (start * 31 + i * 7 + i * i % 13) % 95 for i in range(count)]


def alone(model: GPTJForCausalLM, prompt: list[int], **arguments: Any) -> list[int]:
    """The slow and plain way: what the engine must equal."""
    prompts = torch.tensor([prompt], device=model.device)
    arguments = {"max_new_tokens": 12, **arguments}
    return model.generate(prompts, **arguments)[0, len(prompt) :].tolist()


class Caller:
    """Collects a request's events."""

    ticket: Ticket  # of what `submit` has submitted

    def __init__(self, then: Callable[[Event], None] | None = None) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()
        self._then = then  # called in the engine's thread, after the event was collected

    def __call__(self, events: Sequence[tuple[Ticket, Event]]) -> None:
        one_by_one(self._take)(events)

    def _take(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.ended.set()
        if self._then is not None:
            self._then(event)

    def wait(self) -> list[Event]:
        assert self.ended.wait(SECONDS), "the request did not end"
        return self.events

    @property
    def ids(self) -> list[int]:
        """All new ids, with the stop token."""
        ids = [event.token_id for event in self.wait() if isinstance(event, TokenEvent)]
        last = self.events[-1]
        assert isinstance(last, Finished), last
        return ids if last.stop_token is None else [*ids, last.stop_token]

    @property
    def error(self) -> Exception:
        last = self.wait()[-1]
        assert isinstance(last, Failed), last
        return last.error

    @property
    def beams(self) -> list[list[int]]:
        self.wait()
        found = self.events[0]
        assert isinstance(found, BeamsFound), found
        return [list(output) for output in found.outputs]

    @property
    def scored(self) -> bool:
        return any(isinstance(event, PromptLogprobs) for event in self.wait())


def submit(engine: Engine, prompt: list[int], **params: Any) -> Caller:
    caller = Caller()
    sampling = SamplingParams(**{"max_tokens": 12, "temperature": 0, **params})
    caller.ticket = engine.submit(prompt, sampling, caller)
    return caller


def submit_many(engine: Engine, prompt: list[int], *params: dict[str, Any]) -> list[Caller]:
    callers = [Caller() for _ in params]
    sampling = [SamplingParams(**{"max_tokens": 12, "temperature": 0, **each}) for each in params]
    engine.submit_many(prompt, sampling, callers)
    return callers


def search(engine: Engine, prompt: list[int], beams: BeamParams, **params: Any) -> Caller:
    caller = Caller()
    sampling = SamplingParams(**{"max_tokens": 12, **params})
    engine.beam_search(prompt, sampling, beams, caller)
    return caller


def assert_same(found: Caller, expected: Caller) -> None:
    """Only the order of summation differs, so logprobs may by a little."""
    ours, theirs = ([_rounded(event) for event in each.wait()] for each in (found, expected))
    assert [key for key, _ in ours] == [key for key, _ in theirs]
    for (_, near), (_, expected_near) in zip(ours, theirs, strict=True):
        assert near == pytest.approx(expected_near, abs=1e-3)


def _rounded(event: Event) -> tuple[Any, list[float]]:
    """What must be equal, and what must be near."""
    if isinstance(event, PromptLogprobs):
        parts = [_rounded(each) for each in event.tokens]
        return [key for key, _ in parts], [number for _, numbers in parts for number in numbers]
    if isinstance(event, Failed):
        return str(event.error), []
    if isinstance(event, BeamsFound):
        return event.outputs, []
    if isinstance(event, TokenEvent):
        token, reason = event.token_id, None
    else:
        assert isinstance(event, Finished)
        token, reason = event.stop_token, event.reason
    logprobs = [] if event.logprob is None else [event.logprob]
    logprobs += [logprob for _, logprob in event.top]
    return (type(event), token, reason, len(event.top)), logprobs


class WatchedRunner(TorchRunner):
    """Notes each step's batch; `before` is called with it and may wait, or raise."""

    def __init__(
        self,
        model: GPTJForCausalLM,
        num_pages: int,
        before: Callable[[StepBatch], None] = lambda batch: None,
    ) -> None:
        self.resets = 0
        self.before = before
        self.lengths: list[list[int]] = []  # new tokens of each sequence, a list a step
        super().__init__(model, num_pages)

    def step(self, batch: StepBatch) -> Tensor:
        self.before(batch)
        self.lengths.append((batch.query_start_loc[1:] - batch.query_start_loc[:-1]).tolist())
        return super().step(batch)

    def reset(self) -> None:
        self.resets += 1
        super().reset()


def assert_written_pages_are_not_shared(batch: StepBatch) -> None:
    """No sequence writes to a page that another of the step reads."""
    seen: list[int] = []
    written: list[int] = []
    for row in range(len(batch.query_start_loc) - 1):
        positions = batch.positions_T[batch.query_start_loc[row] : batch.query_start_loc[row + 1]]
        places = np.unique(positions // 16)
        written += batch.page_table_RP[row, places].tolist()
        seen += batch.page_table_RP[row, : places[-1] + 1].tolist()
    assert all(seen.count(page) == 1 for page in written)


class Gate:
    """Holds a runner in its next step until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._opened = threading.Event()

    def __call__(self, batch: StepBatch) -> None:
        self.reached.set()
        assert self._opened.wait(SECONDS)

    def open(self) -> None:
        self._opened.set()

    def again(self) -> None:
        """Close it for the next steps; the engine must be idle."""
        self.reached.clear()
        self._opened.clear()


def held(engine: Engine, gate: Gate, prompt: Sequence[int] = (5,)) -> Caller:
    """Submit a request, and return when the engine is at its first step."""
    caller = submit(engine, list(prompt), max_tokens=2, ignore_eos=True)
    assert gate.reached.wait(SECONDS)
    return caller

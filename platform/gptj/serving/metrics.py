"""What the services count and time; a deployment decides where the numbers go."""

from __future__ import annotations

from typing import Protocol


class Recorder(Protocol):
    """Takes measurements, from the event loop: each call must be quick."""

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request has been answered, to the last byte; 499 if its client went before."""

    def first_token(self, seconds: float) -> None:
        """An output's first token is there, so long after its request."""

    def token_gap(self, seconds: float) -> None:
        """An output has ended, with so long between two of its tokens, on average."""

    def queued(self, seconds: float) -> None:
        """An output waited so long for the first step that worked on it."""


class NoRecorder:
    """For a service that nobody watches."""

    def request(self, route: str, status: int, seconds: float) -> None: ...

    def first_token(self, seconds: float) -> None: ...

    def token_gap(self, seconds: float) -> None: ...

    def queued(self, seconds: float) -> None: ...

"""The services' metrics; a deployment decides where they go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

MAX_LABELS = 200  # values of a label that clients choose
OTHER = "other"


class Labels:
    """Label values, capped at a maximum: Prometheus never drops a series.

    Args:
        most: the maximum; later values are reported as `other`.
    """

    def __init__(self, most: int = MAX_LABELS) -> None:
        self._most = most
        self._known: set[str] = set()

    def of(self, value: str) -> str:
        if value not in self._known:
            if len(self._known) >= self._most:
                return OTHER
            self._known.add(value)
        return value


class Recorder(Protocol):
    """Records measurements; called on the event loop and on models' threads, so be quick."""

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered, to the last byte; status 499 if the client left before."""

    def first_token(self, seconds: float) -> None:
        """Time from a request to an output's first token."""

    def token_gap(self, seconds: float) -> None:
        """Mean time between tokens of an output that has ended."""

    def queued(self, seconds: float) -> None:
        """Time from a request to an output's first step."""

    def batch(self, queued: Sequence[float], tokens: int, seconds: float) -> None:
        """A batch of whole rows took `seconds`, after each row had waited `queued` seconds."""

    def key_use(self, key: str, tokens: int, *, refused: bool) -> None:
        """A request with a key has ended, or was refused for the key's limits."""

    def grammar(self, result: Literal["compiled", "cached", "refused"], seconds: float) -> None:
        """A request's grammar was compiled, found in the cache, or refused."""

    def adapter_request(self, adapter: str) -> None:
        """A request for an existing adapter."""

    def adapter_load(self, result: Literal["loaded", "refused"], seconds: float) -> None:
        """An adapter was read, for its first request or after a change."""


class NoRecorder:
    """Records nothing."""

    def request(self, route: str, status: int, seconds: float) -> None: ...

    def first_token(self, seconds: float) -> None: ...

    def token_gap(self, seconds: float) -> None: ...

    def queued(self, seconds: float) -> None: ...

    def batch(self, queued: Sequence[float], tokens: int, seconds: float) -> None: ...

    def key_use(self, key: str, tokens: int, *, refused: bool) -> None: ...

    def grammar(self, result: Literal["compiled", "cached", "refused"], seconds: float) -> None: ...

    def adapter_request(self, adapter: str) -> None: ...

    def adapter_load(self, result: Literal["loaded", "refused"], seconds: float) -> None: ...

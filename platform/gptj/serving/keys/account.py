"""A request's account: its share of its key's limits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from gptj.serving.errors import InvalidRequestError, RateLimitError
from gptj.serving.keys.keyring import Key
from gptj.serving.keys.ledger import Ledger, Limits, Standing, headers

_account: ContextVar[Account | None] = ContextVar("account", default=None)


@dataclass
class Account:
    """The account of one request with a key."""

    key: Key
    request: str  # an id, the same for all its tries
    ledger: Ledger
    limits: Limits
    standing: Standing | None = None  # the latest, for the reply's headers
    tokens: int = 0  # reserved; in the end, used

    @classmethod
    def of(cls, key: Key, request: str, ledger: Ledger) -> Account:
        limits = Limits(key.requests_per_minute, key.tokens_per_minute, key.concurrent_requests)
        return cls(key, request, ledger, limits)

    async def begin(self) -> None:
        """Raises RateLimitError."""
        if not self.key.limited:
            return
        try:
            standing = await self.ledger.begin(self.key.name, self.limits, self.request)
        except asyncio.CancelledError:  # the client left; the ledger may have counted it
            await self.end()
            raise
        self._check(standing)

    async def reserve(self, tokens: int) -> None:
        """Raises RateLimitError, or InvalidRequestError for more than the limit per minute."""
        most = self.key.tokens_per_minute
        if most is not None:
            if tokens > most:
                raise InvalidRequestError(
                    f"the request may take {tokens} tokens, but its key has {most} a minute: "
                    f"request fewer",
                    code="tokens_above_limit",
                )
            name = self.key.name
            self._check(await self.ledger.reserve(name, self.limits, self.request, tokens))
        self.tokens = tokens

    async def end(self) -> None:
        if self.key.limited:
            await self.ledger.end(self.key.name, self.request, self.tokens)

    def headers(self) -> dict[str, str]:
        return {} if self.standing is None else headers(self.limits, self.standing)

    def _check(self, standing: Standing) -> None:
        self.standing = standing
        if standing.refused is None:
            return
        limit = {
            "requests": f"{self.limits.requests} requests a minute",
            "tokens": f"{self.limits.tokens} tokens a minute",
            "concurrent": f"{self.limits.concurrent} requests at a time",
        }[standing.refused]
        raise RateLimitError(
            f"this key may have {limit}: try again in {max(0.1, standing.retry_seconds):.1f} s",
            code="rate_limit_exceeded",
            headers=self.headers(),
        )


@contextmanager
def using(account: Account) -> Iterator[None]:
    """Make it the current request's account within the block and tasks started in it."""
    token = _account.set(account)
    try:
        yield
    finally:
        _account.reset(token)


def current_account() -> Account | None:
    """The current request's account; None without a key."""
    return _account.get()


def may_use_model(name: str) -> bool:
    """Whether the current request's key allows a model; always true without a key."""
    account = _account.get()
    return account is None or account.key.opens_model(name)


async def reserve_tokens(tokens: int) -> None:
    """Reserve tokens from the current request's key before any work; no-op without a key.

    Raises RateLimitError or InvalidRequestError.
    """
    if (account := _account.get()) is not None:
        await account.reserve(tokens)

"""A request's account: the tokens that it takes from its key's limit."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from gptj.serving.errors import InvalidRequestError, RateLimitError
from gptj.serving.keys.keyring import Key
from gptj.serving.keys.ledger import Ledger, Limits, Standing, headers

_account: ContextVar[Account | None] = ContextVar("account", default=None)


@dataclass
class Account:
    """Of one request with a key."""

    key: Key
    request: str  # the same for all its tries
    ledger: Ledger
    limits: Limits
    standing: Standing | None = None  # the last, for the reply's headers
    tokens: int = 0  # that were reserved, and at the end used

    @classmethod
    def of(cls, key: Key, request: str, ledger: Ledger) -> Account:
        limits = Limits(key.requests_per_minute, key.tokens_per_minute, key.concurrent_requests)
        return cls(key, request, ledger, limits)

    async def begin(self) -> None:
        """Raises RateLimitError."""
        if self.key.limited:
            self._check(await self.ledger.begin(self.key.name, self.limits, self.request))

    async def reserve(self, tokens: int) -> None:
        """Raises RateLimitError; InvalidRequestError for more than a minute's."""
        most = self.key.tokens_per_minute
        if most is not None:
            if tokens > most:
                raise InvalidRequestError(
                    f"the request may take {tokens} tokens, and its key has {most} a minute: ask "
                    f"for fewer",
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


def use_account(account: Account) -> None:
    """From here on, in this task and those that it starts."""
    _account.set(account)


async def reserve_tokens(tokens: int) -> None:
    """Take so many tokens of the present request's key, before any work; those of no key are free.

    Raises RateLimitError or InvalidRequestError.
    """
    if (account := _account.get()) is not None:
        await account.reserve(tokens)


def note_tokens(tokens: int) -> None:
    """What the present request has used in the end: the rest of its tokens go back."""
    if (account := _account.get()) is not None:
        account.tokens = tokens

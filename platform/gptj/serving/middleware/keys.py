"""API keys: requests need one of GPTJ_API_KEYS, as `Authorization: Bearer KEY`."""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Iterable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from gptj.serving.errors import AuthenticationError, error_response
from gptj.serving.middleware.paths import route_path

logger = logging.getLogger(__name__)

VARIABLE = "GPTJ_API_KEYS"  # comma separated
SCHEME = b"bearer "
OPEN_PATHS = ("/health", "/openapi.json")  # probes have no key, nor has the document's page


class Keys:
    """A set of keys; an empty one allows every request."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Keys:
        """The keys in GPTJ_API_KEYS. Raises ValueError if it is set but empty."""
        text = environment.get(VARIABLE)
        if text is None:
            logger.warning(
                "%s is not set: everyone who can reach this service can use it", VARIABLE
            )
            return cls(())
        keys = [key.strip() for key in text.split(",") if key.strip()]
        if not keys:
            raise ValueError(
                f"{VARIABLE}={text!r} has no keys: set some, or unset it to allow every request"
            )
        return cls(keys)

    def allow(self, authorization: bytes | None) -> bool:
        """Whether a header's value has one of the keys, in constant time."""
        if not self._keys:
            return True
        if authorization is None or not authorization.lower().startswith(SCHEME):
            return False
        given = authorization[len(SCHEME) :].strip()
        # Compare all: stopping at the first match would leak by time which key it was.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return any(matches)


class KeyCheck:
    """Middleware: 401 without a key, except on OPEN_PATHS, before the body is read."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_path(scope) in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        if not self._keys.allow(dict(scope["headers"]).get(b"authorization")):
            error = AuthenticationError(
                "this service needs a key: send the header Authorization: Bearer KEY with a "
                "valid one",
                code="invalid_api_key",
            )
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

"""Who may ask: requests with one of the keys in GPTJ_API_KEYS, as `Authorization: Bearer KEY`."""

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
    """A set of keys; an empty one lets everybody in."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Keys:
        """Those of GPTJ_API_KEYS. ValueError if it is set but names none."""
        text = environment.get(VARIABLE)
        if text is None:
            logger.warning("%s is not set: everybody who reaches this service may use it", VARIABLE)
            return cls(())
        keys = [key.strip() for key in text.split(",") if key.strip()]
        if not keys:
            raise ValueError(
                f"{VARIABLE}={text!r} names no key: unset it to let everybody in, or set keys"
            )
        return cls(keys)

    def allow(self, authorization: bytes | None) -> bool:
        """Whether a header's value has one of the keys; it takes as long for a wrong one."""
        if not self._keys:
            return True
        if authorization is None or not authorization.lower().startswith(SCHEME):
            return False
        given = authorization[len(SCHEME) :].strip()
        # All are compared: stopping at the first that fits would tell by time which one it was.
        matches = [hmac.compare_digest(given, key) for key in self._keys]  # all, whichever fits
        return any(matches)


class KeyCheck:
    """Middleware: 401 for every path but OPEN_PATHS without a key, before the body is read."""

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

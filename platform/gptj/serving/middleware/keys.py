"""Admits requests with a key (`Authorization: Bearer KEY`) within the key's limits."""

from __future__ import annotations

import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj.serving.access_log import current_entry
from gptj.serving.errors import (
    SCOPE,
    APIError,
    AuthenticationError,
    PermissionDeniedError,
    error_response,
)
from gptj.serving.keys.account import Account, using
from gptj.serving.keys.keyring import Key, Keys
from gptj.serving.keys.ledger import Ledger, LocalLedger
from gptj.serving.metrics import NoRecorder, Recorder
from gptj.serving.middleware.observing import SEED
from gptj.serving.middleware.paths import route_path

OPEN_PATHS = ("/health", "/openapi.json")  # probes and the documentation page have no key


class KeyCheck:
    """Middleware, before the body is read: 401 without a key, 403 for another application's key.

    429 beyond the key's limits, which count requests that do work (POST). OPEN_PATHS need no key.

    Args:
        application: the application that keys must allow.
        ledger: counts the keys' use; default: within this process.
        recorder: receives the keys' use.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        application: str = "",
        ledger: Ledger | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._app = app
        self._keys = keys
        self._application = application
        self._ledger = ledger or LocalLedger()
        self._recorder = recorder or NoRecorder()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys or route_path(scope) in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            key = self._key(dict(scope["headers"]).get(b"authorization"))
        except APIError as error:
            await error_response(error)(scope, receive, send)
            return
        current_entry().key = key.name
        if scope["method"] == "POST":
            await self._counted(key, scope, receive, send)
        else:
            # Not counted, but lists depend on the key.
            with using(Account.of(key, "", self._ledger)):
                await self._app(scope, receive, send)

    def _key(self, authorization: bytes | None) -> Key:
        """Raises AuthenticationError or PermissionDeniedError."""
        key = self._keys.find(authorization)
        if key is None:
            raise AuthenticationError(
                "this service needs a key: send the header Authorization: Bearer KEY with a "
                "valid one",
                code="invalid_api_key",
            )
        if not key.opens(self._application):
            raise PermissionDeniedError(
                f"this key is not for {self._application}", code="key_not_allowed"
            )
        return key

    async def _counted(self, key: Key, scope: Scope, receive: Receive, send: Send) -> None:
        # The proxy assigns one seed to all tries of a request. Without our proxy, a client could
        # reuse a seed and be counted once: see deployments.proxy.
        request = dict(scope["headers"]).get(SEED) or uuid.uuid4().hex.encode()
        account = Account.of(key, request.decode("latin-1"), self._ledger)
        try:
            await account.begin()
        except APIError as error:
            self._recorder.key_use(key.name, 0, refused=True)
            await error_response(error)(scope, receive, send)
            return

        refused = False

        async def with_limits(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start":
                if message["status"] in (429, 503):
                    account.tokens = 0  # refused: no work was done, or it was lost
                present = list(message.get("headers", []))
                names = {name.lower() for name, _ in present}
                refused = (SCOPE.encode(), b"key") in present
                ours = account.headers().items()
                present += [
                    (name.encode(), value.encode())
                    for name, value in ours
                    if name.encode() not in names
                ]
                message = {**message, "headers": present}
            await send(message)

        try:
            with using(account):
                await self._app(scope, receive, with_limits)
        finally:
            await account.end()
            self._recorder.key_use(key.name, 0 if refused else account.tokens, refused=refused)

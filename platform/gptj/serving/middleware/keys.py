"""Lets requests in that have a key, as `Authorization: Bearer KEY`, within the key's limits."""

from __future__ import annotations

import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj.serving.errors import (
    APIError,
    AuthenticationError,
    PermissionDeniedError,
    error_response,
)
from gptj.serving.keys.account import Account, use_account
from gptj.serving.keys.keyring import Key, Keys
from gptj.serving.keys.ledger import Ledger, LocalLedger
from gptj.serving.metrics import NoRecorder, Recorder
from gptj.serving.middleware.observing import SEED
from gptj.serving.middleware.paths import route_path

OPEN_PATHS = ("/health", "/openapi.json")  # probes have no key, nor has the document's page


class KeyCheck:
    """Middleware, before the body is read: 401 without a key, 403 for another application's.

    429 beyond its limits, which are for requests that do work (POST). OPEN_PATHS are open.

    Args:
        application: that the keys must be for.
        ledger: counts their use, None: in this process.
        recorder: receives it.
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
        key = self._keys.find(dict(scope["headers"]).get(b"authorization"))
        problem = self._problem(key)
        if problem is not None or key is None:
            assert problem is not None
            await error_response(problem)(scope, receive, send)
            return
        if scope["method"] == "POST":
            await self._counted(key, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _problem(self, key: Key | None) -> APIError | None:
        if key is None:
            return AuthenticationError(
                "this service needs a key: send the header Authorization: Bearer KEY with a "
                "valid one",
                code="invalid_api_key",
            )
        if not key.opens(self._application):
            return PermissionDeniedError(
                f"this key is not for {self._application}", code="key_not_allowed"
            )
        return None

    async def _counted(self, key: Key, scope: Scope, receive: Receive, send: Send) -> None:
        # The proxy gives all tries of a request one seed, which clients cannot choose there.
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
                present = list(message.get("headers", []))
                names = {name.lower() for name, _ in present}
                refused = b"x-ratelimit-scope" in names
                ours = account.headers().items()
                present += [
                    (name.encode(), value.encode())
                    for name, value in ours
                    if name.encode() not in names
                ]
                message = {**message, "headers": present}
            await send(message)

        use_account(account)
        try:
            await self._app(scope, receive, with_limits)
        finally:
            await account.end()
            self._recorder.key_use(key.name, 0 if refused else account.tokens, refused=refused)

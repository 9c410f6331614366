"""The retry policy for S3 requests, so that an outage only delays the work.

botocore's own retries end after seconds, and their quota makes later errors final. Ours last for
minutes, with jittered exponential backoff, but only for a server that has answered before: one that
never has is probably a wrong address, and should fail fast.
"""

from __future__ import annotations

import http.client
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from botocore.awsrequest import AWSRequest
from botocore.exceptions import (
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ResponseStreamingError,
    SSLError,
)
from botocore.parsers import ResponseParserError

from gptj.storage.s3_clock import ServerClock

FIRST_TRIES = 4  # for a server that has not answered yet
PATIENCE_SECONDS = 5 * 60  # for one that has, from a request's first failure
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 20.0
LOG_SECONDS = 10  # between log lines about an outage

logger = logging.getLogger(__name__)

_OUTAGES = (ConnectionError, HTTPClientError, IncompleteReadError, ResponseStreamingError)
_OUTAGE_STATUS = (429, 500, 502, 503, 504)
_OUTAGE_CODES = frozenset(
    """BandwidthLimitExceeded InternalError InternalFailure RequestLimitExceeded RequestTimeout
    RequestTimeoutException ServiceUnavailable SlowDown Throttling ThrottlingException
    ConditionalRequestConflict OperationAborted""".split()
)
# An untrusted certificate, and a missing CA bundle.
_UNTRUSTED = ("CERTIFICATE_VERIFY_FAILED", "Errno 2")
# The content arrived corrupted. If that keeps happening, retrying will not help.
_DAMAGED_CODES = frozenset(
    """BadDigest IncompleteBody XAmzContentChecksumMismatch XAmzContentSHA256Mismatch""".split()
)


class Retries:
    """The retry policy of one client, with the state that its requests share."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.clock = ServerClock()
        self.patient = False  # whether the server has answered
        self._lock = threading.Lock()
        self._logged = 0.0
        self._fence: Callable[[], None] | None = None
        self._checking = threading.local()  # the fence itself sends requests

    @contextmanager
    def fenced(self, fence: Callable[[], None]) -> Iterator[None]:
        """See storage.fenced; an inner fence replaces an outer one."""
        before, self._fence = self._fence, fence
        try:
            yield
        finally:
            self._fence = before

    def check_fence(self, request: AWSRequest, **_: Any) -> None:
        """Handler of botocore's request-created event, which precedes every try."""
        fence = self._fence
        retried = "gptj_failed" in request.context
        if fence is None or not retried or request.method in ("GET", "HEAD"):
            return
        if not getattr(self._checking, "now", False):
            self._checking.now = True
            try:
                fence()
            finally:
                self._checking.now = False

    def needs_retry(
        self,
        response: tuple[http.client.HTTPResponse, dict[str, Any]] | None = None,
        caught_exception: Exception | None = None,
        attempts: int = 1,
        request_dict: dict[str, Any] | None = None,
        **_: Any,
    ) -> float | None:
        """Handler of botocore's needs-retry event: seconds until the next attempt, or None."""
        context = {} if request_dict is None else request_dict["context"]
        if response is not None and self.clock.corrects(response, context):
            return 0.0
        reason, damaged = _reason(response, caught_exception)
        if reason is None:
            self.patient = self.patient or response is not None
            return None
        if damaged and attempts >= FIRST_TRIES:
            return None
        return self.pause(attempts, context.setdefault("gptj_failed", time.monotonic()), reason)

    def pause(self, attempts: int, first_failure: float, reason: str) -> float | None:
        """Seconds until the next attempt, or None to give up.

        Args:
            attempts: number that have failed.
            first_failure: when the first one failed (time.monotonic).
        """
        waited = time.monotonic() - first_failure
        if waited > PATIENCE_SECONDS or (not self.patient and attempts >= FIRST_TRIES):
            self.patient = False  # later requests need not wait as long
            return None
        if attempts > 1:
            self._log(reason, waited)
        longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(attempts - 1, 10))
        return random.uniform(longest / 2, longest)

    def _log(self, reason: str, waited: float) -> None:
        with self._lock:
            if time.monotonic() - self._logged < LOG_SECONDS:
                return
            self._logged = time.monotonic()
        limit = f" for up to {PATIENCE_SECONDS / 60:g} minutes" if self.patient else ""
        logger.warning(
            "S3 at %s has been failing for %.0f s, retrying%s: %s",
            self.endpoint,
            waited,
            limit,
            reason,
        )


def _reason(
    response: tuple[Any, dict[str, Any]] | None, error: Exception | None
) -> tuple[str | None, bool]:
    """Why a request failed, if a retry may succeed; and whether its content was corrupted."""
    if error is not None:
        if isinstance(error, SSLError) and any(each in str(error) for each in _UNTRUSTED):
            return None, False
        passing = isinstance(error, (*_OUTAGES, ResponseParserError))
        return (str(error) or repr(error) if passing else None), False
    assert response is not None
    code = str(response[1].get("Error", {}).get("Code", ""))
    if code in _DAMAGED_CODES:
        return code, True
    status = response[0].status_code if response[0] is not None else 0
    passing = status in _OUTAGE_STATUS or code in _OUTAGE_CODES
    return (f"{status} {code}".strip() if passing else None), False

"""Which requests to S3 are tried again, and for how long: outages cost time, and not the work.

botocore's own retries end after seconds, and have a quota that makes later errors final. Ours go on
for minutes, with growing random pauses; but only at a server that has answered before: one that
never did is more likely to be a wrong address, which should show soon.
"""

from __future__ import annotations

import http.client
import logging
import random
import threading
import time
from typing import Any

from botocore.exceptions import (
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ResponseStreamingError,
    SSLError,
)
from botocore.parsers import ResponseParserError

FIRST_TRIES = 4  # at a server that has not answered yet
PATIENCE_SECONDS = 5 * 60  # at one that has, from the first failure of a request on
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 20.0
LOG_SECONDS = 10  # between two lines about an outage

logger = logging.getLogger(__name__)

_OUTAGES = (ConnectionError, HTTPClientError, IncompleteReadError, ResponseStreamingError)
_OUTAGE_STATUS = (429, 500, 502, 503, 504)
_OUTAGE_CODES = frozenset(
    """BandwidthLimitExceeded InternalError InternalFailure RequestLimitExceeded RequestTimeout
    RequestTimeoutException ServiceUnavailable SlowDown Throttling ThrottlingException
    ConditionalRequestConflict OperationAborted""".split()
)
# Of a certificate that is not trusted, and a bundle of certificates that is not there.
_NOT_SAFE = ("CERTIFICATE_VERIFY_FAILED", "Errno 2")
# What arrived was not what was sent. If that happens again and again, it is no accident.
_DAMAGED_CODES = frozenset(
    """BadDigest IncompleteBody XAmzContentChecksumMismatch XAmzContentSHA256Mismatch""".split()
)


class Retries:
    """What one client's requests have in common."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.patient = False  # whether the server has answered
        self._lock = threading.Lock()
        self._logged = 0.0

    def needs_retry(
        self,
        response: tuple[http.client.HTTPResponse, dict[str, Any]] | None = None,
        caught_exception: Exception | None = None,
        attempts: int = 1,
        request_dict: dict[str, Any] | None = None,
        **_: Any,
    ) -> float | None:
        """botocore's event: seconds to wait before another try, or None."""
        reason, damaged = _reason(response, caught_exception)
        if reason is None:
            self.patient = self.patient or response is not None
            return None
        if damaged and attempts >= FIRST_TRIES:
            return None
        context = {} if request_dict is None else request_dict["context"]
        return self.pause(attempts, context.setdefault("gptj_failed", time.monotonic()), reason)

    def pause(self, attempts: int, first_failure: float, reason: str) -> float | None:
        """Seconds to wait before another try, or None if there were enough.

        Args:
            attempts: that have failed.
            first_failure: when the first of them did (time.monotonic).
        """
        waited = time.monotonic() - first_failure
        if waited > PATIENCE_SECONDS or (not self.patient and attempts >= FIRST_TRIES):
            self.patient = False  # what comes next need not wait as long
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
            "S3 at %s has been failing for %.0f s, trying again%s: %s",
            self.endpoint,
            waited,
            limit,
            reason,
        )


def _reason(
    response: tuple[Any, dict[str, Any]] | None, error: Exception | None
) -> tuple[str | None, bool]:
    """Why a request failed, if another try may succeed; whether its content was damaged."""
    if error is not None:
        if isinstance(error, SSLError) and any(each in str(error) for each in _NOT_SAFE):
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

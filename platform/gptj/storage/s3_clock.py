"""Signs S3 requests by the server's clock if it and this machine's differ.

A server refuses requests whose time is more than 15 minutes from its own, and boto3 signs by this
machine's clock alone: if that jumps, every request fails until it is set right. A refusal has the
server's time in its header Date, with which the request is signed again.
"""

from __future__ import annotations

import http.client
import logging
import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from botocore.auth import AUTH_TYPE_MAPS, SIGV4_TIMESTAMP, S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.hooks import BaseEventHooks

TOLERANCE_SECONDS = 5 * 60  # below the servers' 15 minutes; above what a slow request takes
SKEWED, UNSAID = "RequestTimeTooSkewed", "403"  # codes of errors; a HEAD's reply has none
SIGNATURE = "s3v4"  # boto3's
CORRECTED = "gptj-s3v4"  # ours

logger = logging.getLogger(__name__)


class ServerClock:
    """How far a server's clock is ahead of ours, for the requests of one client."""

    def __init__(self) -> None:
        self.ahead = 0.0  # seconds

    def register(self, events: BaseEventHooks) -> None:
        """Sign a client's requests by this clock."""
        events.register("choose-signer.s3", self._choose_signer)  # type: ignore[arg-type]

    def corrects(
        self, response: tuple[http.client.HTTPResponse, dict[str, Any]], context: dict[str, Any]
    ) -> bool:
        """Whether a request was refused because of its time; the next attempt has the right one.

        A refused HEAD does not say why it was, so the times themselves are compared. If another
        time was of no help, the server's Date was wrong, or the refusal had another reason.

        Args:
            context: the request's, in which botocore keeps the time that it was signed with.
        """
        reply = response[1].get("ResponseMetadata", {})
        code = response[1].get("Error", {}).get("Code")
        if reply.get("HTTPStatusCode") != 403 or code not in (SKEWED, UNSAID):
            return False
        if "gptj_clock_before" in context:  # it was corrected once
            self.ahead = context["gptj_clock_before"]
            return False
        server = _date(reply.get("HTTPHeaders", {}).get("date", ""))
        signed = context.get("timestamp")
        if server is None or signed is None:
            return False
        signed_at = datetime.strptime(signed, SIGV4_TIMESTAMP).replace(tzinfo=UTC)
        if abs((server - signed_at).total_seconds()) < TOLERANCE_SECONDS:
            return False
        context["gptj_clock_before"] = self.ahead
        self.ahead = server.timestamp() - time.time()
        logger.warning(
            "this machine's clock and the S3 server's differ by %.0f s: requests are signed with "
            "the server's time; remedy: set the clocks, for example with NTP",
            abs(self.ahead),
        )
        return True

    def _choose_signer(
        self, signature_version: object, context: dict[str, Any], **_: Any
    ) -> str | None:
        if signature_version != SIGNATURE or not self.ahead:
            return None
        context["gptj_clock_ahead"] = self.ahead
        return CORRECTED


class _CorrectedAuth(S3SigV4Auth):
    def _modify_request_before_signing(self, request: AWSRequest) -> None:
        context = request.context
        signed = datetime.strptime(context["timestamp"], SIGV4_TIMESTAMP)
        signed += timedelta(seconds=context["gptj_clock_ahead"])
        context["timestamp"] = signed.strftime(SIGV4_TIMESTAMP)
        super()._modify_request_before_signing(request)  # type: ignore[misc]


AUTH_TYPE_MAPS[CORRECTED] = _CorrectedAuth


def _date(header: str) -> datetime | None:
    """None without a valid date and its zone."""
    try:
        found = parsedate_to_datetime(header)
    except ValueError:
        return None
    return found if found.tzinfo is not None else None

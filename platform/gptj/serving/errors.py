"""HTTP errors: a status and OpenAI's error body.

{"error": {"message": "…", "type": "invalid_request_error", "param": "n", "code": null}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from starlette.responses import Response

from gptj.serialization.json_object import to_json

# Header of a 429 that names what is full, if not the whole service: `key`, `request`, `grammars`,
# `adapters` or `texts`.
SCOPE = "x-ratelimit-scope"


class APIError(Exception):
    """A failed request. Each subclass has a status and a type.

    InvalidRequestError (400): can never succeed. AuthenticationError (401): missing or wrong key.
    PermissionDeniedError (403): another application's key. NotFoundError (404): unknown model.
    RequestTimeoutError (408). BodyTooLargeError (413). WrongShapeError (422): missing or unknown
    fields, or wrong types. OverloadedError (429): try again later. RateLimitError (429): over the
    key's limits. HeadTooLargeError (431). ModelError (500): our fault. UnavailableError (503): try
    again elsewhere or later.

    Args:
        message: for the client, with the value and the remedy.
        param: the request's invalid field, such as `n` or `stream_options`.
        code: machine-readable, such as `context_length_exceeded`.
        headers: additional headers of the reply.
    """

    status = 500
    type = "server_error"
    default_headers: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.headers = {**self.default_headers, **(headers or {})}

    def body(self) -> dict[str, Any]:
        return error_body(self.message, self.type, self.param, self.code)


class InvalidRequestError(APIError):
    status = 400
    type = "invalid_request_error"


def check_length(which: str, known: str, length: int, context: int, remedy: str) -> None:
    """InvalidRequestError if a text, the field `which`, has more tokens than the context.

    Args:
        known: what is known of the length, such as "at least ".
    """
    if length > context:
        raise InvalidRequestError(
            f"{which} has {known}{length} tokens, but this model's context is {context}: {remedy}",
            param=which,
            code="context_length_exceeded",
        )


class AuthenticationError(APIError):
    status = 401
    type = "authentication_error"
    default_headers: ClassVar[dict[str, str]] = {"WWW-Authenticate": "Bearer"}


class PermissionDeniedError(APIError):
    status = 403
    type = "permission_error"


class NotFoundError(APIError):
    status = 404
    type = "not_found_error"


class RequestTimeoutError(APIError):
    status = 408
    type = "timeout_error"


class BodyTooLargeError(APIError):
    status = 413
    type = "invalid_request_error"


class HeadTooLargeError(APIError):
    status = 431
    type = "invalid_request_error"


class WrongShapeError(APIError):
    status = 422
    type = "invalid_request_error"


class OverloadedError(APIError):
    status = 429
    type = "rate_limit_error"
    default_headers: ClassVar[dict[str, str]] = {"Retry-After": "1"}


class RateLimitError(APIError):
    """One key's limit is reached; the service itself is not full."""

    status = 429
    type = "rate_limit_error"
    default_headers: ClassVar[dict[str, str]] = {SCOPE: "key"}


class ModelError(APIError):
    status = 500
    type = "server_error"


UNEXPECTED = ModelError("an unexpected error of the service: see its log")


class UnavailableError(APIError):
    status = 503
    type = "server_error"
    default_headers: ClassVar[dict[str, str]] = {"Retry-After": "1"}


def error_body(
    message: str, type_: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def error_response(error: APIError) -> Response:
    return json_response(error.status, error.body(), error.headers)


def json_response(status: int, body: dict[str, Any], headers: dict[str, str]) -> Response:
    # ASCII, since quotes from a request may contain lone surrogates.
    content = to_json(body, ensure_ascii=True)
    return Response(content, status, headers, media_type="application/json")

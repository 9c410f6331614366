"""Cross-origin resource sharing (CORS): lets pages of listed origins send requests."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from gptj.serving.errors import InvalidRequestError, error_response

ORIGIN = re.compile(r"https?://[^/\s?#@*]+")


class Cors(CORSMiddleware):
    """Middleware, outside of the key check: browsers send preflights without a key.

    Cookies are never allowed: a page can only do what its key allows.

    Args:
        origins: such as `https://chat.example.org`, or `*`.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("*",),
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        error = InvalidRequestError(
            f"{bytes(response.body).decode()}: see the application's args.cors_origins",
            code="cors_not_allowed",
        )
        return error_response(error)


def check_origin(origin: str) -> str:
    """An origin as browsers send it, or `*`. Raises ValueError for anything else."""
    if origin != "*" and ORIGIN.fullmatch(origin) is None:
        raise ValueError(
            f"an origin is scheme://host or scheme://host:port, without a path, or *; got "
            f"{origin!r}"
        )
    return origin

"""The base of every deployment's HTTP application: errors, API keys and limits, without routes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gptj.serving.errors import (
    SCOPE,
    UNEXPECTED,
    APIError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
    WrongShapeError,
    error_body,
    error_response,
    json_response,
)
from gptj.serving.keys.keyring import Keys
from gptj.serving.keys.ledger import Ledger
from gptj.serving.metrics import NoRecorder, Recorder
from gptj.serving.middleware.cors import Cors
from gptj.serving.middleware.edge import Edge
from gptj.serving.middleware.keys import KeyCheck
from gptj.serving.middleware.limits import MAX_BODY_BYTES, BodyLimit
from gptj.serving.middleware.observing import Observing
from gptj.serving.middleware.paths import Routing
from gptj.serving.middleware.unknown_fields import IgnoreUnknownFields
from gptj.serving.openapi import describe, errors
from gptj.serving.pages import Page, Pages, docs
from gptj.serving.requests import RequestModel
from gptj.workers.errors import ClosedError, QueueFullError

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=RequestModel)


@dataclass(frozen=True)
class HTTPOptions:
    """An application's HTTP settings."""

    cors_origins: tuple[str, ...] = ()  # whose pages may send requests; see middleware.cors
    ignore_unknown_fields: bool = False  # in bodies, with a warning; otherwise they are errors
    max_body_bytes: int = MAX_BODY_BYTES  # larger bodies are rejected


DEFAULTS = HTTPOptions()

MAX_REPORTED = 5  # validation errors of a body: one wrong list can have thousands


def new_app(
    title: str,
    recorder: Recorder | None = None,
    pages: Mapping[str, Page] | None = None,
    *,
    application: str = "",
    ledger: Ledger | None = None,
    options: HTTPOptions = DEFAULTS,
) -> FastAPI:
    """An application whose errors all have OpenAI's body and a documented status.

    This process's GPTJ_API_KEYS and GPTJ_KEYS_FILE control access; raises the ValueError of Keys.
    Keys can be restricted to an `application`, and `ledger` enforces their limits. `pages`, and the
    API's documentation at `/docs`, are public.
    """
    app = FastAPI(
        title=title,
        strict_content_type=False,
        redirect_slashes=False,
        docs_url=None,  # served by Pages: FastAPI's own loads from another host
        redoc_url=None,
    )
    keys = Keys.from_environment()
    describe(app, guarded=bool(keys), open_bodies=options.ignore_unknown_fields)
    # The middleware added last sees a request first.
    if options.ignore_unknown_fields:
        app.add_middleware(IgnoreUnknownFields)
    app.add_middleware(BodyLimit, max_bytes=options.max_body_bytes)
    app.add_middleware(
        KeyCheck, keys=keys, application=application, ledger=ledger, recorder=recorder
    )
    app.add_middleware(Pages, pages={**docs(), **(pages or {})})
    app.add_middleware(Edge)
    if options.cors_origins:
        app.add_middleware(Cors, origins=options.cors_origins)
    app.add_middleware(Observing, recorder=recorder or NoRecorder())
    app.add_middleware(Routing)
    app.add_exception_handler(APIError, _on_api_error)
    app.add_exception_handler(QueueFullError, _on_queue_full)
    app.add_exception_handler(ClosedError, _on_closed)
    app.add_exception_handler(RequestValidationError, _on_wrong_shape)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_unexpected)
    return app


def add_health(app: FastAPI, alive: Callable[[], bool], problem: str) -> None:
    """Add `GET /health`: 200 while `alive()`, otherwise 503 with the problem."""

    @app.get("/health", responses=errors(503))
    async def health() -> dict[str, str]:
        """200 while the model answers."""
        if not alive():
            raise UnavailableError(problem)
        return {"status": "ok"}


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error_response(error)


async def _on_queue_full(request: Request, error: Exception) -> Response:
    assert isinstance(error, QueueFullError)
    # The scope tells that other requests may still fit.
    headers = {} if error.for_one else {SCOPE: "request"}
    return error_response(OverloadedError(str(error), headers=headers))


async def _on_closed(request: Request, error: Exception) -> Response:
    return error_response(UnavailableError(str(error)))


async def _on_wrong_shape(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(shape_error(error.errors()))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's and FastAPI's own errors: unknown route, wrong method, unreadable body."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    if status == HTTPStatus.NOT_FOUND:
        docs = f"{request.scope.get('root_path', '').rstrip('/')}/docs"
        message = f"no route for {request.method} {request.url.path}: see {docs}"
        code = "unknown_url"
    elif status == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{request.url.path} does not take {request.method}"
        code = "method_not_allowed"
    elif status == HTTPStatus.BAD_REQUEST:
        message, code = (
            "the body is not valid JSON in UTF-8, or is nested too deeply",
            "invalid_json",
        )
    else:
        message, code = str(error.detail), None
    type_ = "invalid_request_error" if status < 500 else "server_error"
    body = error_body(message, type_, code=code)
    return json_response(status, body, dict(error.headers or {}))


async def _on_unexpected(request: Request, error: Exception) -> Response:
    # Starlette re-raises it after the reply, so it is logged.
    return error_response(UNEXPECTED)


def validated(model: type[Body], body: Any) -> Body:
    """Validate a body not sent over HTTP. Raises the APIError that HTTP would return."""
    if not isinstance(body, dict):
        raise WrongShapeError("the body must be a JSON object")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise shape_error(found) from error


def shape_error(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """Convert pydantic's validation errors of a body."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return InvalidRequestError(
            f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}",
            code="invalid_json",
        )
    if tuple(first["loc"]) == ("body",) and first["type"] in ("missing", "model_attributes_type"):
        return WrongShapeError(
            "the body must be a JSON object, sent with the header Content-Type: application/json"
        )
    reported = "; ".join(_in_words(each) for each in errors[:MAX_REPORTED])
    more = len(errors) - MAX_REPORTED
    return WrongShapeError(
        reported + (f"; and {more} more" if more > 0 else ""), param=_field(first) or None
    )


def _in_words(error: Mapping[str, Any]) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = "unknown field"
    value = error.get("input")
    told = f", got {value!r:.60}" if isinstance(value, bool | int | float | str) else ""
    return f"{_field(error) or 'body'}: {message}{told}"


def _field(error: Mapping[str, Any]) -> str:
    """The field's path, such as `stream_options.include_usage` or `tokens[3]`; "" for the body."""
    path = ""
    for part in error["loc"][1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{str(part)[:60]}"
    return path.removeprefix(".")

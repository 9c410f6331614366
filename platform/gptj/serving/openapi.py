"""An application's OpenAPI document: routes with all their statuses, bodies and authentication."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from gptj.serving.errors import SCOPE
from gptj.serving.middleware.keys import OPEN_PATHS
from gptj.serving.requests import ONLY_NULL

DESCRIPTIONS = {
    400: "An invalid request: not JSON, a value out of range, contradictory fields, or a text too "
    "long for the model's context. `param` names the field.",
    401: "Missing or wrong key.",
    403: "The key belongs to another application.",
    404: "Unknown model.",
    408: "The request was not sent completely in time, or took longer than the service allows.",
    413: "The body is too large.",
    422: "A field is missing, unknown or of a wrong type. `param` names it.",
    431: "The first line and headers are too large.",
    429: "The queue is full, or the key's limit is reached (`x-ratelimit-scope: key`): try again "
    "after `Retry-After` seconds.",
    500: "The model, or the service itself, failed on this request.",
    503: "Not ready, or about to stop: try again after `Retry-After` seconds.",
}
EXAMPLES = {
    400: ("n must be 1 or more, got 0", "invalid_request_error", "n", None),
    401: (
        "this service needs a key: send the header Authorization: Bearer KEY with a valid one",
        "authentication_error",
        None,
        "invalid_api_key",
    ),
    403: ("this key is not for generation", "permission_error", None, "key_not_allowed"),
    404: (
        "model 'another' does not exist; GET /v1/models lists what this service has",
        "not_found_error",
        "model",
        "model_not_found",
    ),
    408: ("the request took more than 600 seconds", "timeout_error", None, None),
    413: (
        "the request's body is larger than 1048576 bytes: send less at a time",
        "invalid_request_error",
        None,
        None,
    ),
    422: ("n: Input should be a valid integer, got 'x'", "invalid_request_error", "n", None),
    431: (
        "the request's first line and headers are larger than 65536 bytes or have more than 128 "
        "fields",
        "invalid_request_error",
        None,
        None,
    ),
    429: ("1024 requests wait already: try again later", "rate_limit_error", None, None),
    500: ("the model's output is not finite", "server_error", None, None),
    503: ("the model makes no progress", "server_error", None, None),
}
HEADERS = {
    401: {"WWW-Authenticate": {"schema": {"type": "string", "const": "Bearer"}}},
    429: {
        "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."},
        SCOPE: {
            "schema": {"enum": ["key", "request", "adapters", "grammars", "texts"]},
            "description": "What is full, if not the whole service.",
        },
    },
    503: {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}},
}
REQUEST_ID = {
    "X-Request-Id": {
        "schema": {"type": "string"},
        "description": "The request's id in the log: the client's, if it sent one.",
    }
}
COUNT = {"type": "integer", "minimum": 0}
TIME = {"type": "string", "examples": ["1.500s"]}
LIMITS = {  # of a key: see gptj.serving.keys.ledger
    f"x-ratelimit-{name}": {"schema": schema, "description": description}
    for name, schema, description in (
        ("limit-requests", COUNT, "The key's requests a minute, if they are limited."),
        ("remaining-requests", COUNT, "How many of them are left."),
        ("reset-requests", TIME, "Until all of them are."),
        ("limit-tokens", COUNT, "The key's tokens a minute, if they are limited."),
        ("remaining-tokens", COUNT, "How many of them are left."),
        ("reset-tokens", TIME, "Until all of them are."),
        ("limit-concurrent-requests", COUNT, "The key's requests at a time, if they are limited."),
        ("remaining-concurrent-requests", COUNT, "How many more may run now."),
    )
}
WITHOUT_LIMITS = {"401", "408", "431"}  # refused before the key's limits are known
KEY = {"bearer": {"type": "http", "scheme": "bearer", "description": "One of GPTJ_API_KEYS."}}


class ErrorDetail(BaseModel):
    message: str  # with the invalid value and the remedy
    type: str
    param: str | None  # the invalid field
    code: str | None  # machine-readable


class ErrorReply(BaseModel):
    """OpenAI's error body."""

    error: ErrorDetail


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """A route's own `responses`; `describe` adds those common to all routes."""
    return {status: _error(status) for status in statuses}


def describe(app: FastAPI, *, guarded: bool, open_bodies: bool = False) -> None:
    """Make the application's document complete.

    Args:
        guarded: whether it requires a key.
        open_bodies: whether bodies may have unknown fields.
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            whole = get_openapi(title=app.title, version=app.version, routes=app.routes)
            components = whole.setdefault("components", {})
            components["securitySchemes"] = KEY
            components["headers"] = REQUEST_ID | LIMITS
            # FastAPI's own error schemas, which are never used here.
            schemas = components.setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            if open_bodies:
                for schema in schemas.values():
                    if schema.get("additionalProperties") == ONLY_NULL:
                        schema["additionalProperties"] = True
            template = "#/components/schemas/{model}"
            detail = ErrorReply.model_json_schema(ref_template=template)
            schemas.update(detail.pop("$defs"), ErrorReply=detail)
            for path, operations in whole["paths"].items():
                for method, operation in operations.items():
                    _complete(operation, guarded, is_open=path in OPEN_PATHS)
                    _add_headers(operation["responses"], counted=method == "post")
            app.openapi_schema = whole
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _complete(operation: dict[str, Any], guarded: bool, is_open: bool) -> None:
    """Add the statuses of middleware, and the key."""
    responses = operation["responses"]
    responses.pop("422", None)
    # 400: headers that cannot be read. 408, 429, 431 and 503: by the proxy, see gptj.serving.entry.
    statuses = [400, 408, 431, 500, 503]
    if not is_open:
        statuses += [401, 403, 429]
    if "requestBody" in operation:
        statuses += [413, 422]
    responses.update({str(status): _error(status) for status in statuses})
    operation["responses"] = dict(sorted(responses.items()))
    # The empty alternative means that no key is required.
    operation["security"] = [] if is_open else [{"bearer": []}] if guarded else [{"bearer": []}, {}]


def _add_headers(responses: dict[str, Any], counted: bool) -> None:
    """Add those common to all responses, and those of the key's limits to requests they count."""
    for status, response in responses.items():
        common = [*REQUEST_ID, *(LIMITS if counted and status not in WITHOUT_LIMITS else ())]
        references = {name: {"$ref": f"#/components/headers/{name}"} for name in common}
        response["headers"] = references | response.get("headers", {})


def _error(status: int) -> dict[str, Any]:
    message, type_, param, code = EXAMPLES[status]
    example = {"error": {"message": message, "type": type_, "param": param, "code": code}}
    schema = {"$ref": "#/components/schemas/ErrorReply"}
    response = {
        "description": DESCRIPTIONS[status],
        "content": {"application/json": {"schema": schema, "example": example}},
    }
    return response | ({"headers": HEADERS[status]} if status in HEADERS else {})

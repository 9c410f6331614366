"""Base of all services' request bodies: strict fields, their schema, valid Unicode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from gptj.serving.errors import InvalidRequestError

logger = logging.getLogger(__name__)

MAX_WARNINGS = 100  # clients can make up any number of names
_ignored: ContextVar[bool] = ContextVar("ignored", default=False)
_warned: set[str] = set()

Item = TypeVar("Item")


class _FailFast(FailFast):
    __hash__ = object.__hash__  # for unions


# The list type of bodies: the first wrong item ends its validation. A body of 1 MiB has room for
# half a million, whose errors would take seconds of the event loop and a gigabyte.
FailFastList = Annotated[list[Item], _FailFast()]

MAX_FIELDS = 256  # of a body, or of a model in one
MAX_IDS = 2**16  # token ids of a text; contexts have a few thousand
MAX_MESSAGES = 4096  # and most parts of one
MAX_BITS = 1024  # of integers: a float's range; Python cannot print more than 4,300 digits


ONLY_NULL = {"type": "null"}  # the only allowed value of unknown fields


def bounds(**schema: Any) -> Any:
    """Document a field's bounds in the schema; `check` and the engine enforce them.

    `maxItems` is enforced here, before any item is validated.
    """
    return Field(json_schema_extra=schema)


def check_count(name: str, value: list[Any], schema: Mapping[str, Any]) -> None:
    """InvalidRequestError if a list has more items than its schema's `maxItems`.

    In a schema with alternatives, that of the lists with such items as the first is meant. A field
    that takes no items at all says so itself.
    """
    if not value:
        return
    for each in schema.get("anyOf", [schema]):
        items, most = each.get("items", {}), each.get("maxItems")
        if not most or not _may_be(value[0], items):
            continue
        if len(value) > most:
            raise InvalidRequestError(
                f"{name} may have at most {most} items, got {len(value)}", param=name
            )
        if items.get("type") == "array":
            for place, item in enumerate(value):
                if isinstance(item, list):
                    check_count(f"{name}.{place}", item, items)


_JSON_TYPES = {str: "string", int: "integer", float: "integer", list: "array", dict: "object"}


def _may_be(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value may be of a schema's type, if it has one type."""
    return schema.get("type") in (None, _JSON_TYPES.get(type(value)))


def _documented(field: FieldInfo) -> dict[str, Any]:
    """What a field says of its schema."""
    extra = field.json_schema_extra
    found: dict[str, Any] = dict(extra) if isinstance(extra, dict) else {}
    for each in field.metadata:
        if isinstance(each, WithJsonSchema):
            found.update(each.json_schema or {})
    return found


def _nullable(schema: dict[str, Any]) -> None:
    """Allow null in a body's schema for optional fields, where it means the default.

    For unknown fields too: clients send null for fields they do not set.
    """
    schema["additionalProperties"] = dict(ONLY_NULL)
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        variants = field.get("anyOf", ())
        if name in required or {"type": "null"} in variants:
            continue
        own = {key: field.pop(key) for key in list(field) if key not in ("title", "default")}
        field["anyOf"] = [own, {"type": "null"}]


@contextmanager
def ignoring_unknown_fields() -> Iterator[None]:
    """Accept unknown fields in bodies parsed within the block; each is logged once."""
    token = _ignored.set(True)
    try:
        yield
    finally:
        _ignored.reset(token)


def _warn_of(names: set[str]) -> None:
    new = names - _warned
    if new and len(_warned) < MAX_WARNINGS:
        _warned.update(new)
        shown = ", ".join(repr(name[:60]) for name in sorted(new)[:MAX_WARNINGS])
        logger.warning("ignoring unknown fields in request bodies: %s", shown)


def examples(*bodies: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """A body's `json_schema_extra`, with examples for the document."""

    def extra(schema: dict[str, Any]) -> None:
        _nullable(schema)
        schema["examples"] = list(bodies)

    return extra


class RequestModel(BaseModel):
    """A request body: unknown fields and wrong types are errors, null means the default.

    Within `ignoring_unknown_fields`, unknown fields are dropped instead. Integers have at most
    MAX_BITS, so that error messages can print them.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        json_schema_extra=_nullable,
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return given_fields(
            fields, {field.alias or name for name, field in cls.model_fields.items()}
        )

    @field_validator("*", mode="before")
    @classmethod
    def _whole_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """JSON has one kind of number: 2.0 is an integer. ValueError for a huge one.

        InvalidRequestError for a list with too many items.
        """
        assert info.field_name is not None
        if isinstance(value, list):
            field = cls.model_fields[info.field_name]
            check_count(field.alias or info.field_name, value, _documented(field))
        whole = [value]
        left = [whole]
        while left:  # iterative, since clients decide the depth
            values = left.pop()
            if not _to_look_at(values):
                continue
            for index, each in enumerate(values):
                if isinstance(each, int) and each.bit_length() > MAX_BITS:
                    raise ValueError(f"integers may have at most {MAX_BITS} bits")
                if isinstance(each, float) and each.is_integer() and abs(each) < 2**53:
                    values[index] = int(each)
                if isinstance(each, list):
                    left.append(each)
        return whole[0]


def _to_look_at(values: list[Any]) -> bool:
    """Whether a list may have huge or whole numbers, or lists; quick for texts and token ids."""
    kinds = set(map(type, values))
    if kinds == {int}:
        return bool(max(max(values), -min(values)).bit_length() > MAX_BITS)
    return not kinds.isdisjoint((int, float, list))


def given_fields(fields: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    """An object's fields without nulls and, within `ignoring_unknown_fields`, unknown ones.

    Raises ValueError if there are more than MAX_FIELDS.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if _ignored.get() and (unknown := {name for name in given if name not in known}):
        _warn_of(unknown)
        given = {name: value for name, value in given.items() if name in known}
    elif len(given) > MAX_FIELDS:  # each unknown one would be an error
        raise ValueError(f"has {len(given)} fields, more than the limit of {MAX_FIELDS}")
    return given


def checked_text(text: str) -> str:
    """The text. Raises ValueError for lone surrogates, which JSON can express."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"has a lone surrogate at character {error.start}, which is not valid Unicode"
        ) from error
    return text

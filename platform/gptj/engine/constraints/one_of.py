"""`oneOf` in a JSON Schema as `anyOf`, where its branches exclude each other.

The compiler knows such branches only if they are written out, but pydantic's discriminated unions
are references. Branches exclude each other if they have different types or constants, or are
objects in which a property, required by one of them, does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

MAX_STEPS = 20_000  # of comparisons in one schema: 20 ms
MAX_REFERENCES = 16  # one after the other

_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SINGLE = (
    *("items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not"),
    *("if", "then", "else", "unevaluatedItems", "unevaluatedProperties"),
)
_TYPES = {str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}


def without_one_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """An equivalent schema with `anyOf` for each `oneOf` whose branches exclude each other."""
    source = json.dumps(schema)
    if '"oneOf"' not in source or "/oneOf/" in source or source.count('"$id"') > ("$id" in schema):
        return schema  # a reference to a branch, or relative to another place, would break
    rewritten: Mapping[str, Any] = _Rewriting(schema).of(schema)
    return rewritten


class _Rewriting:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._steps = 0

    def of(self, schema: Any) -> Any:
        """A subschema, rewritten."""
        if not isinstance(schema, Mapping):
            return schema
        found = dict(schema)
        for name, value in schema.items():
            if name in _LISTS and isinstance(value, list):
                found[name] = [self.of(each) for each in value]
            elif name in _MAPS and isinstance(value, Mapping):
                found[name] = {key: self.of(each) for key, each in value.items()}
            elif name in _SINGLE and isinstance(value, Mapping):
                found[name] = self.of(value)
        branches = schema.get("oneOf")
        if isinstance(branches, list) and "anyOf" not in schema and self._all_exclude(branches):
            found = {"anyOf" if name == "oneOf" else name: each for name, each in found.items()}
        return found

    def _all_exclude(self, branches: list[Any]) -> bool:
        return all(
            self._exclude(first, second)
            for number, first in enumerate(branches)
            for second in branches[:number]
        )

    def _exclude(self, first: Any, second: Any) -> bool:
        """Whether certainly no value is valid for both."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            return False
        first, second = self._resolved(first), self._resolved(second)
        if first is None or second is None:
            return False
        ours, theirs = _constants(first), _constants(second)
        if ours is not None and theirs is not None and ours.isdisjoint(theirs):
            return True
        types, others = _types(first), _types(second)
        if types is not None and others is not None and types.isdisjoint(others):
            return True
        return types == others == {"object"} and any(
            self._exclude(one, other) for one, other in _shared_properties(first, second)
        )

    def _resolved(self, schema: Any) -> Mapping[str, Any] | None:
        """What a reference within the schema refers to; None if that is not known."""
        for _ in range(MAX_REFERENCES):
            if not isinstance(schema, Mapping):
                return None
            reference = schema.get("$ref")
            if reference is None:
                return schema
            if not isinstance(reference, str) or not reference.startswith("#/"):
                return None
            schema = self._root
            for part in reference[2:].split("/"):
                name = part.replace("~1", "/").replace("~0", "~")
                schema = schema.get(name) if isinstance(schema, Mapping) else None
        return None


def _shared_properties(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[tuple[Any, Any]]:
    """The schemas of properties of both objects that one of them requires."""
    ours, theirs = first.get("properties"), second.get("properties")
    required = [each.get("required", ()) for each in (first, second)]
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for name in ours.keys() & theirs.keys():
            if any(isinstance(names, list) and name in names for names in required):
                yield ours[name], theirs[name]


def _constants(schema: Mapping[str, Any]) -> set[tuple[str, Any]] | None:
    """The only values that a schema may allow, with their types; None: not known."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or not all(type(each) in _TYPES for each in values):
        return None
    return {(_TYPES[type(each)], each) for each in values}


def _types(schema: Mapping[str, Any]) -> set[str] | None:
    """The only types that a schema may allow; None: not known."""
    given = schema.get("type")
    constants = _constants(schema)
    if given is None:
        return None if constants is None else {kind for kind, _ in constants}
    names = given if isinstance(given, list) else [given]
    if not all(isinstance(each, str) for each in names):
        return None
    return {"number" if each == "integer" else each for each in names}

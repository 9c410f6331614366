"""`oneOf` in a JSON Schema as `anyOf`, where its branches exclude each other.

The compiler knows such branches only if they are written out, but pydantic's discriminated unions
are references. Branches exclude each other if they have different types or constants, or are
objects in which a property, required by one of them, does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Of the work for one schema: comparisons, and what they read of it, such as an enum's values.
MAX_STEPS = 20_000  # 20 to 40 ms
MAX_REFERENCES = 16  # one after the other
MAX_DEPTH = 32  # of properties in properties

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


@dataclass(frozen=True)
class _Known:
    """What a schema without a reference is known to require of a value."""

    constants: frozenset[str] | None  # keys of the only values; None: not known
    types: frozenset[str] | None  # the only types; None: not known
    properties: Mapping[str, Any]  # those with constants first, which usually tell branches apart
    required: frozenset[str]


class _Rewriting:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self.steps = 0
        self._root = root
        # Of the schema's parts, by their ids, which are theirs as long as it exists.
        self._known: dict[int, _Known | None] = {}
        self._comparing: set[tuple[int, int]] = set()

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
        """Whether certainly no value is valid for both; False once the steps are spent."""
        self._take(1)
        ours, theirs = self._known_of(first), self._known_of(second)
        if ours is None or theirs is None or ours is theirs:
            return False
        if self._disjoint(ours.constants, theirs.constants):
            return True
        if self._disjoint(ours.types, theirs.types):
            return True
        if not ours.types == theirs.types == frozenset(["object"]):
            return False
        pair = min(id(ours), id(theirs)), max(id(ours), id(theirs))
        if pair in self._comparing or len(self._comparing) >= MAX_DEPTH:
            return False  # what contains itself does not tell
        self._comparing.add(pair)
        found = any(
            self._exclude(one, other) for one, other in self._shared_properties(ours, theirs)
        )
        self._comparing.remove(pair)
        return found

    def _take(self, steps: int) -> bool:
        """Whether so much work may be done."""
        self.steps += steps
        return self.steps <= MAX_STEPS

    def _disjoint(self, ours: frozenset[str] | None, theirs: frozenset[str] | None) -> bool:
        if ours is None or theirs is None or not self._take(min(len(ours), len(theirs)) // 8):
            return False
        return ours.isdisjoint(theirs)

    def _shared_properties(self, ours: _Known, theirs: _Known) -> Iterator[tuple[Any, Any]]:
        """The schemas of properties of both objects that one of them requires."""
        for name, schema in ours.properties.items():
            if not self._take(0):
                return
            if name in theirs.properties and (name in ours.required or name in theirs.required):
                yield schema, theirs.properties[name]
            else:
                self._take(1)

    def _known_of(self, schema: Any, references: int = 0) -> _Known | None:
        """Of a schema, or what it refers to within the whole; None if that is not known."""
        if id(schema) not in self._known:
            known = None
            if isinstance(schema, Mapping) and references <= MAX_REFERENCES:
                if "$ref" in schema:
                    known = self._known_of(self._target(schema["$ref"]), references + 1)
                else:
                    known = self._read(schema)
            self._known[id(schema)] = known
        return self._known[id(schema)]

    def _target(self, reference: Any) -> Any:
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return None
        if not self._take(reference.count("/")):
            return None
        target: Any = self._root
        for part in reference[2:].split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            target = target.get(name) if isinstance(target, Mapping) else None
        return target

    def _read(self, schema: Mapping[str, Any]) -> _Known:
        parts = (schema.get(name) for name in ("enum", "type", "properties", "required"))
        if not self._take(sum(len(each) for each in parts if isinstance(each, list | Mapping))):
            return _Known(None, None, {}, frozenset())
        constants, types = _constants_and_types(schema)
        properties, required = schema.get("properties"), schema.get("required")
        if not isinstance(properties, Mapping):
            properties = {}
        names = required if isinstance(required, list) else []
        return _Known(
            constants,
            types,
            dict(sorted(properties.items(), key=lambda item: not _has_constants(item[1]))),
            frozenset(each for each in names if isinstance(each, str)),
        )


def _has_constants(schema: Any) -> bool:
    return isinstance(schema, Mapping) and ("const" in schema or "enum" in schema)


def _constants_and_types(
    schema: Mapping[str, Any],
) -> tuple[frozenset[str] | None, frozenset[str] | None]:
    """The keys of the only values that a schema may allow, and the only types."""
    constants = types = None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and all(type(each) in _TYPES for each in values):
        constants = frozenset(map(_key, values))
        types = frozenset(_TYPES[type(each)] for each in values)
    given = schema.get("type")
    if given is not None:
        names = given if isinstance(given, list) else [given]
        types = None
        if all(isinstance(each, str) for each in names):
            types = frozenset("number" if each == "integer" else each for each in names)
    return constants, types


def _key(value: Any) -> str:
    """Equal for equal values of the same type.

    A text, since a client may choose numbers with equal hashes, of which a set takes long.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is int:
        return f"number {value:x}"  # any number of digits
    return f"{_TYPES[type(value)]} {value}"

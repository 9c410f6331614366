"""`oneOf` becomes `anyOf` where no value can be valid for two branches, and only there."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, Field
from slow_cases import slow

from gptj import GPTJTokenizer
from gptj.engine.constraints import one_of
from gptj.engine.constraints.compiler import GrammarCompiler
from gptj.engine.constraints.grammar import Grammar, GrammarError
from gptj.engine.constraints.one_of import MAX_STEPS, _Rewriting, without_one_of


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog", "puppy"]


class Bird(BaseModel):
    kind: Literal["bird"] = "bird"  # not required


class Owner(BaseModel):
    pet: Annotated[Cat | Dog | Bird, Field(discriminator="kind")]
    others: list[Annotated[Cat | Dog, Field(discriminator="kind")]]


def kind(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": value}, "required": ["kind"], **more}


EXCLUSIVE = [
    Owner.model_json_schema(),
    {"oneOf": [{"const": 1}, {"const": 2}, {"enum": ["1", True, None]}]},
    {"oneOf": [{"type": "string"}, {"type": ["integer", "null"]}, kind({"const": 1})]},
    {"oneOf": [kind({"const": "a"}), kind({"enum": ["b", "c"]}, required=[])]},
    {"oneOf": [kind(kind({"const": "a"})), kind(kind({"const": "b"}))]},
    {"type": "array", "items": {"oneOf": [{"type": "string"}, {"type": "boolean"}]}},
    {"properties": {"oneOf": {"oneOf": [{"const": "a"}, {"const": "b"}]}}},
]
OVERLAPPING = [
    {"oneOf": [{"const": 1}, {"const": 1.0}]},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    {"oneOf": [{"type": "string"}, {"minLength": 1}]},
    {"oneOf": [kind({"const": "a"}, required=[]), kind({"const": "b"}, required=[])]},
    {"oneOf": [kind({"const": "a"}), {**kind({"const": "b"}), "type": ["object", "string"]}]},
    {"oneOf": [kind({"const": "a"}), {"properties": {"kind": {"const": "b"}}}]},
    {"oneOf": [kind({"const": "a"}), kind({"type": "string"})]},
    {"oneOf": [{"const": [1]}, {"const": [1]}]},
    {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"const": 1}}},
    {"oneOf": [{"$ref": "#/$defs/a"}, {"const": 2}], "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"oneOf": [{"const": 1}, {"const": 2}], "anyOf": [{"type": "integer"}]},
    {"oneOf": [{"const": 1}, {"const": 2}], "not": {"$ref": "#/oneOf/0"}},
    {"const": {"oneOf": [{"const": 1}, {"const": 2}]}},
]


@pytest.mark.parametrize("schema", EXCLUSIVE, ids=lambda each: json.dumps(each)[:60])
def test_exclusive_branches_are_rewritten(schema: dict[str, Any]) -> None:
    found = json.dumps(without_one_of(schema))
    assert '"oneOf": [' not in found and '"anyOf": [' in found


@pytest.mark.parametrize("schema", OVERLAPPING, ids=lambda each: json.dumps(each)[:60])
def test_other_branches_are_not(schema: dict[str, Any]) -> None:
    assert without_one_of(schema) == schema


def values() -> Iterator[Any]:
    """Values of all types, and objects of them."""
    plain = [0, 1, 1.0, 2, 1.5, True, None, "", "1", "a", "b", "cat", "dog", "puppy", "bird"]
    yield from plain
    yield from ([], [1], ["a"], ["a", True], {})
    objects = [{"kind": each} for each in plain]
    objects += [{**each, "lives": 9} for each in objects]
    yield from objects
    yield from ({"kind": each} for each in objects)
    yield from ({"oneOf": each} for each in plain)
    for pet, other in itertools.product(objects, objects):
        yield {"pet": pet, "others": [other]}


@pytest.mark.parametrize("schema", [*EXCLUSIVE[:3], *slow([*EXCLUSIVE[3:], *OVERLAPPING[:-3]])])
def test_the_same_values_are_valid(schema: dict[str, Any]) -> None:
    if "#/$defs/a" in json.dumps(schema.get("$defs")):
        return  # refers to itself
    before = jsonschema.Draft202012Validator(schema)
    after = jsonschema.Draft202012Validator(without_one_of(schema))
    for value in values():
        assert before.is_valid(value) == after.is_valid(value), value


def test_many_branches_take_little_work() -> None:
    schema = {"oneOf": [{"const": number} for number in range(5000)]}
    assert without_one_of(schema) == schema  # too many to compare


def linked(kinds: tuple[Any, Any], required: list[str]) -> dict[str, Any]:
    """A union of two objects that contain each other, as lists do."""
    return {
        "$defs": {
            name: {
                "type": "object",
                "properties": {"next": {"$ref": f"#/$defs/{other}"}, "kind": value},
                "required": required,
            }
            for name, other, value in zip("AB", "BA", kinds, strict=True)
        },
        "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
    }


def test_branches_that_contain_each_other_are_told_apart_by_their_constants() -> None:
    names = [f"property {number}" for number in range(20)]  # as a set, in any order
    schema = linked(({"const": "a"}, {"const": "b"}), ["next", "kind", *names])
    for each in schema["$defs"].values():
        each["properties"] = {**{key: {"$ref": "#"} for key in names}, **each["properties"]}
    assert '"oneOf"' not in json.dumps(without_one_of(schema))


@pytest.mark.parametrize("required", [["next"], ["next", "kind"], ["kind", "next"]])
def test_branches_that_only_contain_each_other_are_not(required: list[str]) -> None:
    schema = linked(({"type": "string"}, {"type": "string"}), required)
    assert without_one_of(schema) == schema


def test_deep_branches_are_not_compared_to_their_end() -> None:
    first, second = {"const": "a"}, {"const": "b"}
    for _ in range(200):
        first, second = kind(first), kind(second)
    schema = {"oneOf": [first, second]}
    assert without_one_of(schema) == schema


def shared_enum(size: int, properties: int) -> dict[str, Any]:
    names = [f"p{number}" for number in range(properties)]

    def branch() -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {name: {"$ref": f"#/$defs/{name[-1]}"} for name in names},
            "required": names,
        }

    return {
        "$defs": {str(digit): {"enum": list(range(size))} for digit in range(10)},
        "oneOf": [branch(), branch()],
    }


@pytest.mark.parametrize(("size", "properties"), [(100, 2000), (8000, 2000), (50_000, 10)])
def test_a_large_enum_is_read_once_within_the_steps(
    size: int, properties: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    key = one_of._key
    monkeypatch.setattr(one_of, "_key", lambda value: read.append(value) or key(value))
    schema = shared_enum(size, properties)
    assert without_one_of(schema) == schema
    assert len(read) <= min(10 * size, MAX_STEPS)


def test_properties_and_references_count_as_work(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bool] = []
    disjoint = _Rewriting._disjoint

    def counted(self: _Rewriting, ours: Any, theirs: Any) -> bool:
        compared.append(True)
        return disjoint(self, ours, theirs)

    monkeypatch.setattr(_Rewriting, "_disjoint", counted)
    names = [f"p{number}" for number in range(MAX_STEPS)]
    wide = [kind({}, properties={key: {} for key in names}, required=names) for _ in range(2)]
    assert without_one_of({"oneOf": wide}) == {"oneOf": wide}
    assert len(compared) <= 2 * MAX_STEPS + 2
    compared.clear()
    far = {"$ref": "#" + "/a" * MAX_STEPS}
    schema = {"oneOf": [{"const": 1}, *({**far} for _ in range(100))]}
    rewriting = _Rewriting(schema)
    assert rewriting.of(schema) == schema and not compared


def test_unions_of_many_branches_are_told_apart() -> None:
    properties = {f"p{number}": {"type": "string"} for number in range(20)}
    branches = [
        kind({}, properties={**properties, "kind": {"const": each}}, required=["p3", "kind"])
        for each in range(100)
    ]
    assert "anyOf" in without_one_of({"oneOf": branches})


@pytest.mark.parametrize("number", [10**4000, 1.5, 1e300])
def test_numbers_of_any_size_are_told_apart(number: float) -> None:
    assert "anyOf" in without_one_of({"oneOf": [{"const": number}, {"const": -number}]})


def test_unions_compile_and_others_are_refused_with_the_remedy() -> None:
    tokenizer = GPTJTokenizer.train(['{"kind": "cat"}'] * 4, 300)
    compiler = GrammarCompiler(tokenizer, len(tokenizer), [0])
    try:
        matcher = compiler.compile(Grammar.of_json_schema(Owner.model_json_schema())).matcher()
        text = '{"pet": {"kind": "cat", "lives": 9}, "others": [{"kind": "puppy"}]}'
        assert matcher.validate_tokens(ids := tokenizer.encode(text)) == len(ids)
        wrong = tokenizer.encode('{"pet": {"kind": "cow"')
        assert matcher.validate_tokens(wrong) < len(wrong)
        with pytest.raises(GrammarError, match=r"oneOf whose branches .* use anyOf"):
            compiler.compile(Grammar.of_json_schema(OVERLAPPING[2]))
    finally:
        compiler.close()

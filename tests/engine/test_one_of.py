"""`oneOf` becomes `anyOf` where no value can be valid for two branches, and only there."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, Field

from gptj import GPTJTokenizer
from gptj.engine.constraints.compiler import GrammarCompiler
from gptj.engine.constraints.grammar import Grammar, GrammarError
from gptj.engine.constraints.one_of import without_one_of


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


@pytest.mark.parametrize("schema", [*EXCLUSIVE, *OVERLAPPING[:-3]])
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

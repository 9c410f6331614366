"""Fifty realistic JSON Schemas by name: tool calls, records, labels, pydantic's output.

Texts, lists and numbers are bounded, so that even random outputs end.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

WORD: Schema = {"type": "string", "minLength": 1, "maxLength": 12}
TEXT: Schema = {"type": "string", "maxLength": 24}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 999}
PRICE: Schema = {"type": "number", "minimum": 0, "maximum": 10000}
DATE: Schema = {"type": "string", "format": "date"}


def record(required: str = "", /, **properties: Schema) -> Schema:
    """A closed object; `required` lists property names separated by blanks."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def whole(**properties: Schema) -> Schema:
    """An object with all properties required, as in OpenAI's strict mode."""
    return {**record(**properties), "required": list(properties)}


def several(items: Schema, most: int, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


ADDRESS = whole(
    street=WORD, city=WORD, postcode={"type": "string", "pattern": "^[0-9]{5}$"}, country=WORD
)
POINT = whole(
    latitude={"type": "number", "minimum": -90, "maximum": 90},
    longitude={"type": "number", "minimum": -180, "maximum": 180},
)

SCHEMAS: dict[str, Schema] = {
    "person": record(
        "name age",
        name=WORD,
        age=COUNT,
        email={"type": "string", "format": "email", "maxLength": 24},
    ),
    "address": ADDRESS,
    "geographic point": POINT,
    "sentiment": whole(label=one_of("positive", "neutral", "negative"), score=PRICE),
    "topics": whole(topics=several(one_of("news", "sport", "science", "art"), 4, 1)),
    "boolean answer": whole(answer={"type": "boolean"}, reason=TEXT),
    "multiple choice": whole(choice=one_of("A", "B", "C", "D"), why=nullable(TEXT)),
    "calendar event": whole(name=WORD, date=DATE, participants=several(WORD, 3)),
    "date and time": whole(
        starts={"type": "string", "format": "date-time", "maxLength": 26}, minutes=COUNT
    ),
    "time of day": whole(time={"type": "string", "format": "time", "maxLength": 14}),
    "uuid": whole(id={"type": "string", "format": "uuid"}),
    "network host": whole(address={"type": "string", "format": "ipv4"}, port=COUNT),
    "color": whole(hex={"type": "string", "pattern": "^#[0-9a-f]{6}$"}),
    "phone": whole(phone={"type": "string", "pattern": r"^\+[1-9][0-9]{6,14}$"}),
    "version": whole(version={"type": "string", "pattern": r"^[0-9]{1,3}(\.[0-9]{1,3}){2}$"}),
    "product": record(
        "sku price",
        sku={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
        price=PRICE,
        tags=several(WORD, 3),
    ),
    "invoice": whole(
        number=COUNT,
        issued=DATE,
        lines=several(whole(item=WORD, quantity=COUNT, price=PRICE), 3, 1),
        paid={"type": "boolean"},
    ),
    "order": whole(customer=whole(name=WORD, address=ADDRESS), total=PRICE),
    "recipe": whole(
        title=WORD, ingredients=several(whole(name=WORD, grams=COUNT), 3), steps=several(TEXT, 3)
    ),
    "weather tool": whole(city=WORD, unit=one_of("celsius", "fahrenheit")),
    "function call": whole(
        name=one_of("search", "open", "quit"), arguments=record(query=TEXT, limit=COUNT)
    ),
    "tool calls": several(
        {
            "anyOf": [
                whole(tool={"const": "search"}, query=TEXT),
                whole(tool={"const": "calculate"}, left=COUNT, right=COUNT),
            ]
        },
        2,
        1,
    ),
    "chain of thought": whole(steps=several(whole(thought=TEXT, output=TEXT), 2, 1), answer=WORD),
    "entities": whole(
        entities=several(whole(text=WORD, type=one_of("PER", "ORG", "LOC"), start=COUNT), 3)
    ),
    "relations": several(whole(subject=WORD, relation=WORD, object=WORD), 2),
    "translation": whole(
        source=one_of("en", "de", "fr"), target=one_of("en", "de", "fr"), text=TEXT
    ),
    "rating": whole(stars={"type": "integer", "minimum": 1, "maximum": 5}, comment=nullable(TEXT)),
    "percentage": whole(share={"type": "number", "minimum": 0, "maximum": 1}),
    "temperature": whole(kelvin={"type": "number", "exclusiveMinimum": 0, "maximum": 10000}),
    "even": whole(even={"type": "integer", "multipleOf": 2, "minimum": 0, "maximum": 1000}),
    "pair": {
        "type": "array",
        "prefixItems": [WORD, COUNT],
        "items": False,
        "minItems": 2,
        "maxItems": 2,
    },
    "matrix": several(several(COUNT, 3, 3), 2, 2),
    "scalar union": {"anyOf": [{"type": "boolean"}, COUNT, {"type": "null"}]},
    "list of types": whole(value={"type": ["boolean", "null"]}),
    "constant": {"const": {"status": "ok", "code": 0, "items": [1, "a", None]}},
    "discriminated": {
        "oneOf": [
            whole(kind={"const": "circle"}, radius=PRICE),
            whole(kind={"const": "square"}, side=PRICE),
        ]
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"id": COUNT}, "required": ["id"]},
            {"type": "object", "properties": {"name": WORD}, "required": ["name"]},
            {"additionalProperties": False, "properties": {"id": {}, "name": {}}},
        ]
    },
    "definitions": {
        "$defs": {"Money": whole(amount=PRICE, currency=one_of("EUR", "USD"))},
        **whole(price={"$ref": "#/$defs/Money"}, discount={"$ref": "#/$defs/Money"}),
    },
    "pydantic": {
        "$defs": {
            "Color": {"enum": ["red", "green"], "title": "Color", "type": "string"},
            "Part": {
                "properties": {"color": {"$ref": "#/$defs/Color"}, "size": {"default": 1, **COUNT}},
                "required": ["color"],
                "title": "Part",
                "type": "object",
                "additionalProperties": False,
            },
        },
        "properties": {
            "parts": {"items": {"$ref": "#/$defs/Part"}, "maxItems": 2, "type": "array"}
        },
        "required": ["parts"],
        "title": "Thing",
        "type": "object",
        "additionalProperties": False,
    },
    "tree": {
        "$defs": {
            "node": whole(
                value=COUNT,
                children={"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2},
            ),
            "leaf": whole(value=COUNT),
        },
        "$ref": "#/$defs/node",
    },
    "linked list": {
        "$defs": {"list": whole(value=COUNT, next=nullable({"$ref": "#/$defs/list"}))},
        "$ref": "#/$defs/list",
    },
    "map of counts": {
        "type": "object",
        "patternProperties": {"^[a-z]{1,4}$": COUNT},
        "additionalProperties": False,
        "maxProperties": 3,
    },
    "map of known keys": {
        "type": "object",
        "properties": {"fixed": COUNT},
        "patternProperties": {"^x-[a-z]{1,6}$": {"type": "boolean"}},
        "additionalProperties": False,
        "required": ["fixed"],
        "maxProperties": 2,
    },
    "settings": record(
        "mode",
        mode=one_of("fast", "safe"),
        retries=COUNT,
        verbose={"type": "boolean"},
        limits=record(memory=COUNT, seconds=COUNT),
    ),
    "openapi parameter": whole(
        name=WORD, **{"in": one_of("query", "path", "header")}, required={"type": "boolean"}
    ),
    "geojson": whole(
        type={"const": "Point"},
        coordinates={
            "type": "array",
            "items": {"type": "number", "minimum": -180, "maximum": 180},
            "minItems": 2,
            "maxItems": 2,
        },
    ),
    "log line": whole(level=one_of("DEBUG", "INFO", "ERROR"), message=TEXT, code=nullable(COUNT)),
    "unicode keys": whole(**{"größe": COUNT, "名前": WORD, 'a "quoted" key': {"type": "boolean"}}),
    "resume": whole(
        name=WORD,
        skills=several(WORD, 3),
        jobs=several(record("employer since", employer=WORD, since=DATE, until=nullable(DATE)), 2),
    ),
    "mixed enum": whole(value=one_of("one", 2, 3.5, None, True, ["list"], {"object": 1})),
}

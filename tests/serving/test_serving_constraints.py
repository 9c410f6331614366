"""Structured output and bans of tokens over HTTP."""

from __future__ import annotations

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any
from unittest.mock import Mock

import httpx
import jsonschema
import openai
import pydantic
import pytest
from serving_client import complete, greedy, streamed, text_of
from serving_models import Models, served_with_adapters
from slow_cases import slow

from gptj.chat import READY, ChatTemplate, read_template
from gptj.serving.completions.constraints import ConstraintFields
from gptj.serving.errors import SCOPE, OverloadedError
from gptj.serving.metrics import NoRecorder
from gptj.workers.errors import QueueFullError

pytest_plugins = ["serving_fixtures"]

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


def test_response_format_by_openais_client(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="generation",
        prompt="The tower",
        max_tokens=900,
        n=3,
        seed=4,
        temperature=1,
        extra_body={"response_format": NAMED},
    )
    for choice in reply.choices:
        jsonschema.validate(json.loads(choice.text), SCHEMA)
        assert choice.finish_reason == "stop"
    assert len({choice.text for choice in reply.choices}) > 1


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": "[0-9]{2}:[0-9]{2}"}, "[0-9]{2}:[0-9]{2}"),
        ({"choice": ["tower", "bridge"]}, "tower|bridge"),
        ({"grammar": 'root ::= "<" [a-z]{3} ">"'}, "<[a-z]{3}>"),
        ({"grammar": 'start: "a" "b"~2'}, "abb"),
    ],
)
def test_structured_outputs_match(service: str, wanted: dict[str, Any], pattern: str) -> None:
    fields = {"prompt": "The tower", "max_tokens": 40, "structured_outputs": wanted}
    for more in ({}, {"temperature": 1, "seed": 3, "presence_penalty": 1, "min_p": 0.01}):
        (choice,) = complete(service, **fields, **more)["choices"]
        assert re.fullmatch(pattern, choice["text"])
        assert choice["finish_reason"] == "stop"
        assert streamed(service, **fields, **more) == [choice]


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)])
def test_structured_outputs_take_a_schema_as_an_object_or_as_text(
    service: str, schema: Any
) -> None:
    reply = complete(
        service, prompt="The", max_tokens=900, structured_outputs={"json": schema}, logprobs=2
    )
    (choice,) = reply["choices"]
    jsonschema.validate(json.loads(choice["text"]), SCHEMA)
    assert reply["usage"]["completion_tokens"] == len(choice["logprobs"]["tokens"])


def test_json_may_be_without_whitespace(service: str, models: Models) -> None:
    """A model that prefers blanks writes none."""
    bias = {str(models.tokenizer.encode(each)[0]): 100 for each in (" ", "\n")}
    for wanted in ({"json": SCHEMA}, {"json_object": True, "json": None}):
        wanted = {**wanted, "disable_any_whitespace": True}
        fields = {"prompt": "The", "max_tokens": 60, "structured_outputs": wanted}
        (choice,) = complete(service, **fields, logit_bias=bias)["choices"]
        assert choice["text"].startswith('{"') or choice["text"] == "{}"


def test_json_objects_and_plain_text(service: str, models: Models) -> None:
    for wanted in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        choice = complete(service, prompt="The", max_tokens=64, **wanted)["choices"][0]
        assert choice["text"].lstrip().startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)
    choice = complete(service, prompt="The", response_format={"type": "text"})["choices"][0]
    assert choice["text"] == text_of(models, greedy(models, "The"))


class Person(pydantic.BaseModel):
    name: Annotated[str, pydantic.Field(max_length=6)]
    age: Annotated[int, pydantic.Field(ge=0, le=150)]


def test_chats_are_parsed_by_openais_client(client: openai.OpenAI, service: str) -> None:
    reply = client.chat.completions.parse(
        model="generation",
        messages=[{"role": "user", "content": "Who?"}],
        response_format=Person,
        max_completion_tokens=900,
        seed=2,
    )
    assert isinstance(reply.choices[0].message.parsed, Person)
    body = {"messages": [{"role": "user", "content": "Who?"}], "bad_words": ["a"], "max_tokens": 4}
    wanted = {"structured_outputs": {"choice": ["yes", "no"]}}
    reply = httpx.post(f"{service}/v1/chat/completions", json=body | wanted, timeout=60)
    assert reply.json()["choices"][0]["message"]["content"] in ("yes", "no")
    wanted = {"structured_outputs": {"regex": "(?=a)"}}
    reply = httpx.post(f"{service}/v1/chat/completions", json=body | wanted, timeout=60)
    assert reply.status_code == 400  # type: ignore[attr-defined]
    assert reply.json()["error"]["param"] == "structured_outputs"


def test_a_stop_string_ends_an_output_before_its_grammar(service: str) -> None:
    choice = complete(
        service, prompt="The", structured_outputs={"regex": "abc-def-ghi"}, stop=["-g"]
    )["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc-def", "stop")


@pytest.mark.parametrize("name", ["dolly", *slow(sorted({*READY} - {"dolly"}))])
def test_a_templates_stop_strings_do_not_cut_structured_output(models: Models, name: str) -> None:
    template = read_template(name)
    stops = ChatTemplate(template).stop
    assert stops
    schema = {"const": f"see {''.join(stops)} of it"}
    named = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    regex = "<" + "".join(map(re.escape, stops)) + ">"
    body = {"messages": [{"role": "user", "content": "Where?"}], "max_tokens": 400}
    with served_with_adapters(models, template=template) as service:

        def choice(**fields: Any) -> dict[str, Any]:
            reply = httpx.post(f"{service}/v1/chat/completions", json={**body, **fields})
            return reply.json()["choices"][0]

        whole = choice(response_format=named)
        assert json.loads(whole["message"]["content"]) == schema["const"]
        assert (whole["finish_reason"], whole["stop_reason"]) == ("stop", None)
        assert choice(structured_outputs={"regex": regex})["message"]["content"].endswith(">")
        cut = choice(response_format=named, stop="of")
        assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", "of")
        assert cut["message"]["content"].endswith(" ")


def test_requests_with_and_without_constraints_run_side_by_side(
    service: str, models: Models
) -> None:
    """Those without get what they get alone, while others compile, fail or are refused."""
    expected = text_of(models, greedy(models, "The tower"))

    def ask(number: int) -> None:
        if number % 3 == 0:
            body = {"prompt": "x", "structured_outputs": {"regex": f"(a)\\{number % 9 + 1}"}}
            reply = httpx.post(f"{service}/v1/completions", json=body, timeout=60)
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["param"] == "structured_outputs"
        elif number % 3 == 1:
            wanted = {"regex": f"n{number}[0-9]{{3}}"}
            text = complete(service, prompt="x", structured_outputs=wanted)["choices"][0]["text"]
            assert re.fullmatch(wanted["regex"], text)
        else:
            assert complete(service, prompt="The tower")["choices"][0]["text"] == expected

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(ask, range(36)))


def test_a_contradiction_found_while_generating_is_a_400(service: str, models: Models) -> None:
    body = {
        "prompt": "The",
        "structured_outputs": {"regex": "[0-9]+"},
        "allowed_token_ids": models.tokenizer.encode("a"),
    }
    reply = httpx.post(f"{service}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 400, reply.text
    assert "allows no further token" in reply.json()["error"]["message"]


def test_bad_words_are_not_in_the_output(service: str, models: Models) -> None:
    fields: dict[str, Any] = {"prompt": "The tower", "max_tokens": 40, "ignore_eos": True}
    fields |= {"temperature": 1, "seed": 3, "logprobs": 0}
    tokens = complete(service, **fields)["choices"][0]["logprobs"]["tokens"]
    words = {each for each in tokens if each.isascii() and each.strip() and ":" not in each}
    assert len(words) > 3
    others = complete(service, **fields, bad_words=sorted(words))["choices"][0]["logprobs"][
        "tokens"
    ]
    assert words.isdisjoint(others)
    # Of several tokens: all but the last may come.
    pair = models.tokenizer.encode("qz")
    assert len(pair) == 2
    bias = {str(token): 100 for token in pair}
    wanted = {"regex": "(qz|qy)q"}
    fields = {"prompt": "The", "structured_outputs": wanted, "logit_bias": bias}
    assert complete(service, **fields)["choices"][0]["text"] == "qzq"
    assert complete(service, **fields, bad_words=["qz"])["choices"][0]["text"] == "qyq"


def test_only_allowed_tokens_are_in_the_output(service: str, models: Models) -> None:
    allowed = models.tokenizer.encode("abc")
    choice = complete(
        service,
        prompt="The",
        allowed_token_ids=allowed,
        temperature=1,
        seed=1,
        logit_bias={str(allowed[0]): 5},
        max_tokens=30,
    )["choices"][0]
    assert set(choice["text"]) <= set("abc")
    assert choice["finish_reason"] == "length"
    beams = complete(service, prompt="The", allowed_token_ids=allowed, use_beam_search=True, n=2)
    assert all(set(choice["text"]) <= set("abc") for choice in beams["choices"])


def test_prompt_logprobs_equal_those_with_echo(service: str, models: Models) -> None:
    echoed = complete(service, prompt="The tower", logprobs=3, echo=True, max_tokens=1)
    theirs = echoed["choices"][0]["logprobs"]
    reply = complete(service, prompt="The tower", prompt_logprobs=3, max_tokens=0)
    (choice,) = reply["choices"]
    assert choice["text"] == "" and choice["logprobs"] is None
    ids = models.tokenizer.encode("The tower")
    assert len(choice["prompt_logprobs"]) == len(ids) == reply["usage"]["prompt_tokens"]
    assert choice["prompt_logprobs"][0] is None
    for place in range(1, len(ids)):
        found = choice["prompt_logprobs"][place]
        own = found[str(ids[place])]
        assert own["logprob"] == pytest.approx(theirs["token_logprobs"][place], abs=1e-5)
        top = {each["decoded_token"]: each["logprob"] for each in found.values()}
        assert top == pytest.approx(theirs["top_logprobs"][place], abs=1e-5)
        ranks = {each["rank"] for each in found.values()} - {None}
        assert ranks == {1, 2, 3}
    both = complete(
        service, prompt="The tower", prompt_logprobs=1, logprobs=3, echo=True, max_tokens=1
    )["choices"][0]
    assert both["logprobs"] == theirs
    assert all(len(each) <= 2 for each in both["prompt_logprobs"][1:])


def test_twenty_logprobs(service: str) -> None:
    choice = complete(service, prompt="The", logprobs=20, max_tokens=2)["choices"][0]
    assert [len(each) for each in choice["logprobs"]["top_logprobs"]] == [20, 20]


def test_a_full_grammar_queue_does_not_block_the_service() -> None:
    compiler = Mock(submit=Mock(side_effect=QueueFullError("32 grammars wait")))
    request = ConstraintFields.model_validate({"structured_outputs": {"regex": "a"}})
    with pytest.raises(OverloadedError, match="32 grammars wait") as error:
        asyncio.run(request.compiled(compiler, NoRecorder()))
    assert error.value.headers[SCOPE] == "grammars"  # so that admission goes on for the others


def test_hostile_bodies_are_refused(service: str) -> None:
    deep = '{"prompt": "x", "structured_outputs": {"json": ' + '{"items": ' * 150 + "{}"
    deep += "}" * 152
    huge = {"enum": [f"value {n} of many" for n in range(20_000)]}
    for body in (deep, json.dumps({"prompt": "x", "structured_outputs": {"json": huge}})):
        reply = httpx.post(
            f"{service}/v1/completions",
            content=body,
            headers={"content-type": "application/json"},
            timeout=60,
        )
        assert reply.status_code in (400, 413, 422), reply.text
        assert reply.json()["error"]["message"]

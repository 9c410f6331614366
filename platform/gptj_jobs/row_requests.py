"""Rows of a data set as requests to a checkpoint's service, and its replies as fields of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deployments.in_process import (
    ANSWERS,
    CHATS,
    CLASSIFICATION,
    COMPLETIONS,
    EMBEDDINGS,
    ServiceName,
    as_json,
    checked_body,
)
from gptj.config import GPTJConfig
from gptj.data.json_rows import parse_json
from gptj.data.rows import Row
from gptj.serving.completions.generation_request import GenerationRequest
from gptj.serving.errors import APIError
from gptj.training.tasks import task_of

BATCH = ("custom_id", "url", "body")  # OpenAI's batch files
METHOD = "method"  # of them; rows without it are POSTs
# Our names of the columns that each service reads, for each kind of rows: training's, without the
# targets.
KINDS: Mapping[ServiceName, tuple[tuple[str, ...], ...]] = {
    "generation": (("text",), ("prompt",), ("messages",)),
    "classification": (("text",), ("text", "text_pair")),
    "question-answering": (("question", "context"),),
    "embeddings": (("text",),),
}
# Fields of result lines, whose names kept columns must not have.
FIELDS = frozenset(
    {"file", "row", "error", "completion", "finish_reason", "stop_reason", "choices", "labels"}
    | {"logprobs", "prompt_logprobs", "token_ids", "prompt_token_ids"}
    | {"answer", "answers", "start", "end", "score", "embedding"}
)
SERVICES: Mapping[str, ServiceName] = {
    "causal-lm": "generation",
    "classification": "classification",
    "question-answering": "question-answering",
}


def service_of(config: GPTJConfig, checkpoint: str) -> ServiceName:
    """The service of a model's head; embeddings for a model without one."""
    if config.architectures == ["GPTJModel"]:
        return "embeddings"
    return SERVICES[task_of(config, checkpoint).name]


def request_of(
    service: ServiceName, row: Row, parameters: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """A row's route and body. DataError if a column's value is invalid."""
    if service == "classification":
        inputs: dict[str, Any] = {"text": row.text("text")}
        if "text_pair" in row.values:
            inputs["text_pair"] = row.text("text_pair")
        return CLASSIFICATION, {"inputs": inputs, "parameters": dict(parameters)}
    if service == "question-answering":
        inputs = {name: row.text(name) for name in ("question", "context")}
        return ANSWERS, {"inputs": inputs, "parameters": dict(parameters)}
    if service == "embeddings":
        return EMBEDDINGS, {**parameters, "input": row.text("text")}
    if "messages" in row.values:
        return CHATS, {**parameters, "messages": _messages(row)}
    column = "text" if "text" in row.values else "prompt"
    return COMPLETIONS, {**parameters, "prompt": row.text(column)}


def check_parameters(
    service: ServiceName, columns: Sequence[str], parameters: Mapping[str, Any]
) -> None:
    """ValueError for parameters that would be wrong in every request."""
    for name in parameters:
        if name in ("inputs", "prompt", "messages", "input"):
            raise ValueError(f"parameters.{name}: the rows have it; leave it out")
    values: dict[str, Any] = dict.fromkeys(columns, "x")
    if "messages" in values:
        values["messages"] = [{"role": "user", "content": "x"}]
    route, body = request_of(service, Row(values, "", 0), parameters)
    try:
        request = checked_body(route, body)
        if isinstance(request, GenerationRequest):
            request.check()
    except APIError as error:
        raise ValueError(f"parameters: {error}") from error


def _messages(row: Row) -> Any:
    messages = row.value("messages")
    if row.typed or not isinstance(messages, str):
        return messages
    try:
        return parse_json(messages)  # CSV has it as text
    except ValueError as error:
        raise row.error("messages", f"is not valid JSON: {error}") from error


def fields_of(route: str, reply: Any) -> dict[str, Any]:
    """A reply as fields of a row. A single completion, label list or answer is not in a list."""
    plain = as_json(reply)
    if route == CLASSIFICATION:
        return {"labels": plain[0]}
    if route == ANSWERS:
        return {"answers": plain} if isinstance(plain, list) else plain
    if route == EMBEDDINGS:
        return {"embedding": plain["data"][0]["embedding"]}
    choices = [_choice(each) for each in plain["choices"]]
    return choices[0] if len(choices) == 1 else {"choices": choices}


def _choice(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message")
    text = choice["text"] if message is None else message["content"]
    left_out = ("index", "text", "message", "finish_reason")
    rest = {name: each for name, each in choice.items() if name not in left_out}
    return {
        "completion": text,
        "finish_reason": choice["finish_reason"],
        **{name: each for name, each in rest.items() if each is not None},
    }

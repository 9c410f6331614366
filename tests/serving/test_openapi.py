"""Each application against its own OpenAPI document, by requests that schemathesis generates.

Valid ones get the documented reply; invalid ones are refused, with a documented status and our
error body. Nothing answers 500.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks
from serving_models import Models, applications, make_models

from gptj.serving.keys.ledger import Limits, Standing, headers

pytest_plugins = ["serving_fixtures"]
pytestmark = pytest.mark.slow

EXAMPLES = 12  # requests of each operation and kind
SHORT = 128  # tokens of context, so that no request takes long
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
# What JSON Schema cannot say of a request: 400 for one that its schema allows has such a reason.
REASONS = re.compile(
    r"context_length_exceeded|model's context|must not be below n|does not work with|needs "
    r"|chat template rejects|set the same limit"
    r"|exceed the limit of \d+ outputs|num_beams|outputs .* wait|token id|not in the vocabulary"
    r"|min_tokens must be in \[0, max_tokens|stop may have|must be in \[\d+, \d+\], got"
    r"|cannot be shortened|may have \d+ (texts|logprobs|items)"
    r"|chat_template_kwargs"
    r"|response_format|structured_outputs|could not be constrained|bad_words must not have"
)


@pytest.fixture(scope="module")
def documents() -> Iterator[dict[str, Any]]:
    """Schemathesis' view of each application by its prefix."""
    with applications(make_models(SHORT)) as apps:
        yield {
            prefix: schemathesis.openapi.from_asgi(
                "/openapi.json", app, config=SchemathesisConfig()
            )
            for prefix, app in apps.items()
        }


OPERATIONS = [
    ("/", "POST", "/v1/completions"),
    ("/", "POST", "/v1/chat/completions"),
    ("/", "POST", "/tokenize"),
    ("/", "POST", "/detokenize"),
    ("/", "GET", "/v1/models"),
    ("/", "GET", "/v1/models/{model_id}"),
    ("/", "GET", "/tokenizer_info"),
    ("/", "GET", "/health"),
    ("/classification", "POST", "/"),
    ("/classification", "GET", "/health"),
    ("/question-answering", "POST", "/"),
    ("/question-answering", "GET", "/health"),
    ("/v1/embeddings", "POST", "/"),
    ("/v1/embeddings", "GET", "/health"),
]
SERVED = {"/": "generation", "/v1/embeddings": "embedder"}  # the models' names by application


def ask(document: Any, method: str, path: str, mode: GenerationMode) -> list[tuple[Case, Any]]:
    """Requests of one kind with their replies, which have been compared with the document."""
    asked: list[tuple[Case, Any]] = []

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    def run(case: Case) -> None:
        reply = case.call()
        case.validate_response(reply, checks=CHECKS)
        asked.append((case, reply))

    run()
    return asked


def status_with_model(case: Case, fields: Any, key: str, name: str) -> int:
    """The status of a request for an unknown model when it names the served one instead."""
    assert fields[key] != name
    fields[key] = name
    reply: Any = case.call()
    case.validate_response(reply, checks=CHECKS)
    return int(reply.status_code)


@pytest.mark.parametrize(("prefix", "method", "path"), OPERATIONS)
def test_no_valid_request_is_refused(
    documents: dict[str, Any], prefix: str, method: str, path: str
) -> None:
    asked = ask(documents[prefix], method, path, GenerationMode.POSITIVE)
    for case, reply in asked:
        if reply.status_code == 400:
            error = reply.json()["error"]
            assert REASONS.search(f"{error['code']} {error['message']}"), (case.body, error)
        else:
            assert reply.status_code in (200, 404), (case.body, reply.text)
            if reply.status_code == 404:  # no generated name is a served one
                named = (case.path_parameters, "model_id") if "/{" in path else (case.body, "model")
                assert status_with_model(case, *named, SERVED[prefix]) in (200, 400), case.body  # type: ignore[call-arg]
    if "/{" not in path:
        assert any(reply.status_code == 200 for _, reply in asked)


@pytest.mark.parametrize(
    ("prefix", "method", "path"), [each for each in OPERATIONS if each[1] == "POST"]
)
def test_invalid_requests_are_refused(
    documents: dict[str, Any], prefix: str, method: str, path: str
) -> None:
    for case, reply in ask(documents[prefix], method, path, GenerationMode.NEGATIVE):
        assert reply.status_code in (400, 404, 405, 413, 422), (case.body, reply.text)
        assert reply.json()["error"]["message"]


def test_every_operation_is_tested(documents: dict[str, Any]) -> None:
    found = {
        (prefix, each.ok().method.upper(), each.ok().path)
        for prefix, document in documents.items()
        for each in document.get_all_operations()
    }
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(
    "prefix", ["/", "/classification", "/question-answering", "/v1/embeddings"]
)
def test_the_examples_are_answered(documents: dict[str, Any], prefix: str) -> None:
    document = documents[prefix]
    examples = 0
    for _, method, path in [each for each in OPERATIONS if each[:2] == (prefix, "POST")]:
        operation = document[path][method]
        content = operation.definition.raw["requestBody"]["content"]["application/json"]
        name = content["schema"]["$ref"].rpartition("/")[2]
        for example in document.raw_schema["components"]["schemas"][name]["examples"]:
            if path != "/detokenize":  # ids of GPT-J's vocabulary, which the tests' has not
                reply = operation.Case(body=example, media_type="application/json").call()
                assert reply.status_code == 200, (example, reply.text)
            examples += 1
    assert examples >= 2


def test_documents_declare_the_headers_and_statuses_that_every_operation_has(
    models: Models,
) -> None:
    whole = Standing("requests", 1.0, 0, 0, 1.0, 1.0, 0)
    limits = headers(Limits(requests=1, tokens=1, concurrent=1), whole).keys() - {"retry-after"}
    with applications(models) as apps:
        documents = [app.openapi() for app in apps.values()]
    for document in documents:
        defined = document["components"]["headers"]
        assert defined.keys() == {"X-Request-Id", *limits}
        for operations in document["paths"].values():
            for method, operation in operations.items():
                responses = operation["responses"]
                assert {"400", "408", "431", "500", "503"} <= responses.keys()
                for status, response in responses.items():
                    declared = response["headers"]
                    assert declared["X-Request-Id"] == {"$ref": "#/components/headers/X-Request-Id"}
                    if method == "post" and status in ("200", "400", "429", "500", "503"):
                        assert limits <= declared.keys()
                    if status in ("429", "503"):
                        assert "Retry-After" in declared
                    assert ("x-ratelimit-scope" in declared) == (status == "429")


def test_documents_declare_key_authentication(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    for keys, needed in ((None, [{"bearer": []}, {}]), ("a-key", [{"bearer": []}])):
        if keys is not None:
            monkeypatch.setenv("GPTJ_API_KEYS", keys)
        with applications(models) as apps:
            for app in apps.values():
                document = app.openapi()
                assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
                assert "HTTPValidationError" not in document["components"]["schemas"]
                for path, operations in document["paths"].items():
                    for operation in operations.values():
                        assert operation["security"] == ([] if path == "/health" else needed)
                        assert ("401" in operation["responses"]) == (path != "/health")
                        if "requestBody" in operation:
                            assert {"400", "413", "422"} <= set(operation["responses"])

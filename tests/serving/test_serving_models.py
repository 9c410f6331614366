"""The list of models, the tokenizer's API, and the meaning of a model's ids."""

from __future__ import annotations

import httpx
import openai
import pytest
from serving_models import CONTEXT, PROMPTS, SENTENCES, UNUSED, Models, applications

from gptj.serving.completions.vocabulary import Vocabulary
from gptj.serving.pages import docs, playground
from gptj_cli.status import WORK_ROUTES

pytest_plugins = ["serving_fixtures"]


def test_the_model_is_listed_under_its_name(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "generation"
    assert model.object == "model"
    assert client.models.retrieve("generation").id == model.id
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("another")
    assert "'another'" in caught.value.message
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="x")


def test_the_tokenizer_api(service: str, models: Models) -> None:
    text = PROMPTS[4]
    ids = models.tokenizer.encode(text)
    url = f"{service}/tokenize"
    assert httpx.post(url, json={"prompt": text, "model": "generation"}).json() == {
        "count": len(ids),
        "max_model_len": CONTEXT,
        "tokens": ids,
    }
    with_texts = httpx.post(url, json={"prompt": text, "return_token_strs": True}).json()
    assert with_texts["token_strs"] == models.tokenizer.convert_ids_to_tokens(ids)
    assert httpx.post(url, json={"prompt": ""}).json()["tokens"] == []
    back = httpx.post(f"{service}/detokenize", json={"tokens": ids})
    assert back.json() == {"prompt": text}
    info = httpx.get(f"{service}/tokenizer_info").json()
    assert info["tokenizer_class"]
    assert info["vocab_size"] == len(models.tokenizer)


def test_embedding_rows_without_text_are_found(models: Models) -> None:
    known = len(models.tokenizer)
    vocabulary = Vocabulary.of(models.tokenizer, known + UNUSED)
    assert vocabulary.unused_ids == tuple(range(known, known + UNUSED))
    assert vocabulary.text_ids == set(range(known))
    for text in SENTENCES:
        assert vocabulary.least_tokens(text) <= len(models.tokenizer.encode(text))


def test_each_service_describes_its_routes(service: str) -> None:
    for prefix, route, field in (
        ("", "/v1/completions", "include_stop_str_in_output"),
        ("/classification", "/", "inputs"),
        ("/question-answering", "/", "inputs"),
    ):
        schema = httpx.get(f"{service}{prefix}/openapi.json", timeout=30).json()
        assert {route, "/health"} <= set(schema["paths"])
        body = schema["paths"][route]["post"]["requestBody"]["content"]["application/json"]
        name = body["schema"]["$ref"].rpartition("/")[2]
        assert field in schema["components"]["schemas"][name]["properties"]


# Routes that do not run the model: `gptj status` does not count them.
OTHER_ROUTES = {
    *("/health", "/openapi.json", "/v1/models", "/v1/models/{model_id}"),
    *("/tokenize", "/detokenize", "/tokenizer_info"),
}


def test_gptj_status_counts_the_routes_that_run_the_model(models: Models) -> None:
    """A new route is to be listed here or there."""
    with applications(models) as apps:
        routes = {route.path_format for app in apps.values() for route in app.routes}  # type: ignore[attr-defined]
    assert routes == WORK_ROUTES | OTHER_ROUTES
    pages = {page.path_format for page in [*playground().values(), *docs().values()]}
    assert pages.isdisjoint(WORK_ROUTES)

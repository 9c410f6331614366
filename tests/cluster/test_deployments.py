"""The three services on a real cluster: what only Serve's proxy and replicas can show.

Everything else about them is tested in this process, see test_serving_*.py. Some of those tests
run here again, with this module's fixture `service`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import yaml
from serve_cluster import SERVE_CONFIG, save_all, serving
from serving_client import complete, greedy, text_of
from serving_models import CONTEXT, KEYS, PROMPTS, Models
from test_serving_classification import (  # noqa: F401
    test_hugging_faces_client_classifies,
)
from test_serving_completions import (  # noqa: F401
    test_concurrent_requests_get_what_they_get_alone,
    test_openais_async_client_reads_several_streams_at_once,
    test_openais_client_reads_a_stream_and_its_usage,
)
from test_serving_edge import (  # noqa: F401
    test_a_body_after_an_upgrade_offer_is_refused,
    test_a_request_without_a_body_may_offer_an_upgrade,
    test_an_unreadable_header_is_refused,
    test_any_bytes_are_allowed_in_other_headers,
    test_any_time_limit_is_accepted,
    test_routes_answer_to_head_and_with_a_slash_at_the_end,
    test_websocket_is_refused_with_the_reason,
)
from test_serving_embeddings import (  # noqa: F401
    embedder,
    test_openais_client_gets_the_reference_vectors,
    test_routes_do_not_collide_with_the_generation_services,
    theirs,
)
from test_serving_http import (  # noqa: F401
    test_a_body_that_is_too_large_is_refused,
    test_a_full_queue_answers_429_with_retry_after_and_takes_requests_again,
    test_each_key_is_valid,
    test_openais_client_succeeds_on_a_full_service_by_retrying,
    test_without_a_valid_key_only_health_answers,
)
from test_serving_question_answering import (  # noqa: F401
    test_hugging_faces_client_gets_the_best_span_over_all_windows,
)

from gptj_local.s3 import LocalS3

pytest_plugins = ["serving_fixtures"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(
    models: Models, s3_server: LocalS3, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of the three services, and of one behind a key (/guarded)."""
    folder = tmp_path_factory.mktemp("services")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        config = yaml.safe_load(SERVE_CONFIG.read_text())
        save_all(config, models, "s3://gptj/test-deployments")
        guarded = json.loads(json.dumps(config["applications"][0]))
        guarded |= {"name": "guarded", "route_prefix": "/guarded"}
        guarded["args"] |= {"max_num_seqs": 1, "max_queued": 1, "model_name": "org/guarded"}
        options = guarded["deployments"][0]["ray_actor_options"]
        options["runtime_env"] = {"env_vars": {"GPTJ_API_KEYS": KEYS}}
        config["applications"] += [guarded, embeddings(config["applications"])]
        with serving(config, folder) as (address, _):
            yield address


def embeddings(applications: list[dict[str, Any]]) -> dict[str, Any]:
    """An application that embeds with the generation application's checkpoint."""
    arguments = {"checkpoint": applications[0]["args"]["checkpoint"], "dtype": "float32"}
    deployment = json.loads(json.dumps(applications[1]["deployments"][0]))
    return {
        "name": "embeddings",
        "route_prefix": "/v1/embeddings",
        "import_path": "deployments.embeddings:build",
        "args": {**arguments, "model_name": "embedder"},
        "deployments": [{**deployment, "name": "embeddings"}],
    }


def test_openais_client_shows_the_raw_reply(client: openai.OpenAI, models: Models) -> None:
    raw = client.completions.with_raw_response.create(
        model="generation", prompt=PROMPTS[0], max_tokens=12, temperature=0
    )
    assert (raw.status_code, raw.retries_taken) == (200, 0)
    assert raw.headers["content-type"] == "application/json"
    reply = raw.parse()
    assert reply.choices[0].text == text_of(models, greedy(models, PROMPTS[0]))
    assert reply._request_id == raw.headers["x-request-id"]
    assert reply.id == f"cmpl-{reply._request_id}"


def test_a_disconnected_client_frees_the_engine(service: str) -> None:
    """The next would wait for two thousand steps, and waits for fewer than six hundred."""
    long: dict[str, Any] = {"prompt": "x", "temperature": 1, "n": 64, "ignore_eos": True}
    started = time.monotonic()
    complete(service, **long, max_tokens=20)
    twenty = time.monotonic() - started
    long["max_tokens"] = CONTEXT - 10
    for stream in (True, False):
        started = time.monotonic()
        if stream:
            url = f"{service}/v1/completions"
            with httpx.stream("POST", url, json={**long, "stream": True}) as reply:
                lines = reply.iter_lines()  # by a name, since its end would be the stream's
                assert next(lines).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{service}/v1/completions", json=long, timeout=1)
        complete(service, prompt="x", max_tokens=1)
        assert time.monotonic() - started < 30 * twenty + 1


def test_every_service_is_still_healthy(service: str) -> None:
    for route in ("/health", "/classification/health", "/question-answering/health"):
        reply = httpx.get(service + route)
        assert (reply.status_code, reply.json()) == (200, {"status": "ok"})

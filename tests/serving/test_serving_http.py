"""Keys, limits, full queues, and the edge of HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from serving_client import ANSWERS, CLASSIFICATION, COMPLETIONS, assert_error
from serving_models import CONTEXT, KEY, Models, applications

from gptj.serving.keys.keyring import Keys
from gptj.serving.middleware.limits import MAX_BODY_BYTES

pytest_plugins = ["serving_fixtures"]


def test_keys_come_from_the_environment_and_an_empty_setting_is_refused() -> None:
    keys = Keys.from_environment({"GPTJ_API_KEYS": "one, two,"})
    assert keys.allow(b"Bearer one")
    assert keys.allow(b"bearer two")
    assert not keys.allow(b"Bearer three")
    assert not keys.allow(b"Bearer ")
    assert not keys.allow(None)
    with pytest.raises(ValueError, match="has no keys"):
        Keys.from_environment({"GPTJ_API_KEYS": " ,"})


def test_without_keys_every_request_is_allowed_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert Keys.from_environment({}).allow(None)
    assert "everyone" in caplog.text


@pytest.mark.parametrize("route", [COMPLETIONS, CLASSIFICATION, ANSWERS])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(service: str, route: str, chunked: bool) -> None:
    body = b'{"prompt": "' + b"x" * MAX_BODY_BYTES + b'"}'

    def parts() -> Iterator[bytes]:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    headers = {"Content-Type": "application/json"}
    content = parts() if chunked else body
    reply = httpx.post(service + route, content=content, headers=headers, timeout=30)
    assert_error(reply, 413, str(MAX_BODY_BYTES))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"Authorization": b"Bearer \xff\xfe"},
    ],
    ids=str,
)
def test_without_a_valid_key_only_health_answers(service: str, headers: dict[str, Any]) -> None:
    for method, route in (("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/nothing")):
        reply = httpx.request(method, f"{service}/guarded{route}", headers=headers)
        assert_error(reply, 401, "Authorization: Bearer")
        assert reply.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{service}/guarded/health").status_code == 200


def test_each_key_is_valid(service: str) -> None:
    for key in (KEY, "another"):
        guarded = openai.OpenAI(base_url=f"{service}/guarded/v1", api_key=key, max_retries=0)
        reply = guarded.completions.create(model="org/guarded", prompt="x", max_tokens=2)
        assert reply.model == "org/guarded"
        assert guarded.models.retrieve("org/guarded").id == "org/guarded"
    wrong = openai.OpenAI(base_url=f"{service}/guarded/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()


@pytest.mark.slow
def test_a_full_queue_answers_429_with_retry_after_and_takes_requests_again(service: str) -> None:
    """This service has room for one request in work and one that waits."""
    url = f"{service}/guarded/v1/completions"
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": "x", "max_tokens": CONTEXT - 10, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url, json=body, headers=headers, timeout=30) as in_work:
        lines = in_work.iter_lines()  # by a name, since its end would be the stream's
        assert next(lines).startswith("data: ")
        with ThreadPoolExecutor(4) as pool:
            small = {"prompt": "x", "max_tokens": 1}
            replies = list(
                pool.map(
                    lambda _: httpx.post(url, json=small, headers=headers, timeout=30), range(4)
                )
            )
    # More than one gets through only if the one in work ends meanwhile.
    assert {reply.status_code for reply in replies} == {200, 429}
    for reply in replies:
        if reply.status_code == 429:
            assert_error(reply, 429, "try again later")
            assert int(reply.headers["retry-after"]) >= 1
    assert httpx.post(url, json=small, headers=headers, timeout=30).status_code == 200
    many = httpx.post(url, json={**small, "n": 5}, headers=headers)
    assert_error(many, 400, "5 outputs exceed")


def test_openais_client_succeeds_on_a_full_service_by_retrying(service: str) -> None:
    """The long request is in work, one more may wait, and the others are refused at first."""
    refused = asyncio.Event()
    waits: list[str] = []

    async def note(reply: Any) -> None:
        if reply.status_code == 429:
            waits.append(reply.headers["retry-after"])
            refused.set()

    async def ask() -> list[Any]:
        http_client = openai.DefaultAsyncHttpxClient(event_hooks={"response": [note]})
        url = f"{service}/guarded/v1"
        async with openai.AsyncOpenAI(
            base_url=url, api_key=KEY, max_retries=8, http_client=http_client
        ) as client:
            model = {"model": "org/guarded", "prompt": "x"}
            long = await client.completions.create(
                **model, max_tokens=CONTEXT - 10, stream=True, extra_body={"ignore_eos": True}
            )
            await anext(long)
            create = client.completions.with_raw_response.create
            asked = [asyncio.create_task(create(**model, max_tokens=1)) for _ in range(3)]
            await asyncio.wait_for(refused.wait(), 30)
            await long.close()
            return await asyncio.gather(*asked)

    replies = asyncio.run(ask())
    assert all(reply.parse().choices for reply in replies)
    assert sum(reply.retries_taken for reply in replies) == len(waits) >= 1
    assert all(int(wait) >= 1 for wait in waits)


def test_a_short_prompts_stream_does_not_wait_for_a_thread(models: Models) -> None:
    """Others' long texts may hold all threads; a thread's turn also takes a busy replica 1 ms."""
    held = threading.Event()

    async def ask(app: Any) -> str:
        pool = ThreadPoolExecutor(1)
        pool.submit(held.wait)
        asyncio.get_running_loop().set_default_executor(pool)
        body = {"prompt": "The tower", "max_tokens": 4, "ignore_eos": True, "stream": True}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            try:
                sent = client.post(COMPLETIONS, json=body)
                return (await asyncio.wait_for(sent, 60)).text
            finally:
                held.set()

    with applications(models) as apps:
        assert asyncio.run(ask(apps["/"])).endswith("data: [DONE]\n\n")

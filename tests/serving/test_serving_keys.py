"""Keys by name: hashed, changed without a restart, each with its limits."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import openai
import pytest
import yaml
from http_server import listening
from serving_client import assert_error
from serving_models import Models, applications, mounted
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from deployments import ledger
from gptj.serving.app import new_app
from gptj.serving.keys import keyring
from gptj.serving.keys.account import Account, reserve_tokens
from gptj.serving.keys.keyring import Key, Keys, digest
from gptj.serving.keys.ledger import (
    LEASE_SECONDS,
    MAX_SECONDS,
    WINDOW_SECONDS,
    Counts,
    Limits,
    LocalLedger,
    Standing,
    headers,
)
from gptj.serving.metrics import NoRecorder
from gptj.workers.errors import QueueFullError

pytest_plugins = ["serving_fixtures"]

BODY: dict[str, Any] = {"prompt": "x", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


def entry(key: str, **fields: Any) -> dict[str, Any]:
    return {"name": key, "sha256": digest(key.encode()), **fields}


class KeyFile:
    """A file of keys, replaced as a mounted secret is: by a link to another."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "keys.yaml"
        self._number = 0

    def write(self, *keys: dict[str, Any], text: str | None = None) -> None:
        self._number += 1
        content = self.path.with_name(f"{self._number}.yaml")
        content.write_text(yaml.safe_dump({"keys": list(keys)}) if text is None else text)
        link = self.path.with_name("new")
        link.symlink_to(content)
        os.replace(link, self.path)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "CHECK_SECONDS", 0.0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    found = KeyFile(tmp_path_factory.mktemp("keys"))
    found.write(entry("first"))
    return found


@pytest.fixture(scope="module")
def guarded(models: Models, file: KeyFile) -> Iterator[str]:
    """The three services behind the file's keys, and one of the environment."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GPTJ_API_KEYS", "fixed")
            patch.setenv("GPTJ_KEYS_FILE", str(file.path))
            apps: dict[str, ASGIApp] = {**stack.enter_context(applications(models))}
        yield stack.enter_context(listening(mounted(apps)))


def ask(service: str, key: str, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(service + path, json=body or BODY, headers=headers, timeout=60)


def test_keys_come_and_go_without_a_restart(guarded: str, file: KeyFile) -> None:
    file.write(entry("first"))
    assert [ask(guarded, key).status_code for key in ("first", "second")] == [200, 401]
    file.write(entry("first"), entry("second"))
    assert [ask(guarded, key).status_code for key in ("first", "second")] == [200, 200]
    file.write(entry("second"))
    assert [ask(guarded, key).status_code for key in ("first", "second")] == [401, 200]
    file.path.unlink()  # nothing is open because of it
    assert [ask(guarded, key).status_code for key in ("second", "fixed", "none")] == [401, 200, 401]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("keys: [\n  a-secret-put-here", "not valid YAML in line"),
        ("keys: [{name: a, sha256: a-secret-put-here}]", "keys.0.sha256"),
        (yaml.safe_dump({"keys": [entry("a", requests_per_minute=0)]}), "requests_per_minute"),
        (yaml.safe_dump({"keys": [entry("a"), entry("a")]}), "several keys named a"),
        ("a-secret-put-here", "valid dictionary"),
        ("", "valid dictionary"),
    ],
)
def test_an_invalid_file_changes_nothing_and_is_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, reason: str
) -> None:
    file = KeyFile(tmp_path)
    file.write(entry("good"))
    keys = Keys.from_environment({"GPTJ_KEYS_FILE": str(file.path)})
    file.write(text=text)
    with caplog.at_level(logging.DEBUG):
        assert keys.allow(b"Bearer good")
        assert not keys.allow(b"Bearer a-wrong-key")
    assert reason in caplog.text
    assert "a-secret-put-here" not in caplog.text
    assert "a-wrong-key" not in caplog.text
    with pytest.raises(ValueError, match=r"cannot be used|several") as error:
        Keys.from_environment({"GPTJ_KEYS_FILE": str(file.path)})
    assert "a-secret-put-here" not in str(error.value)


def test_a_keys_file_without_keys_does_not_open_the_service(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no keys"):
        Keys.from_environment({"GPTJ_KEYS_FILE": str(tmp_path / "missing.yaml")})
    keys = Keys.from_environment(
        {"GPTJ_KEYS_FILE": str(tmp_path / "missing.yaml"), "GPTJ_API_KEYS": "a"}
    )
    assert keys.allow(b"Bearer a")
    assert not keys.allow(None)


@pytest.mark.slow
def test_the_command_creates_a_key_and_shows_it_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gptj.serving.keys", "search-team"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    comment, _, made = printed.partition("\n")
    file = KeyFile(tmp_path)
    file.write(text="keys:\n" + made)
    key = Keys(path=file.path).find(f"Bearer {comment.split()[-1]}".encode())
    assert key is not None
    assert key.name == "search-team"
    assert comment.split()[-1] not in made


def test_a_key_opens_its_applications(guarded: str, file: KeyFile) -> None:
    file.write(entry("one", applications=["classification"]), entry("all"))
    assert ask(guarded, "one", "/classification", inputs="x").status_code == 200
    assert ask(guarded, "all").status_code == 200
    assert_error(ask(guarded, "one"), 403, "not for generation")
    reply = ask(guarded, "one", "/question-answering", inputs={})
    assert_error(reply, 403, "not for question-answering")


def test_requests_per_minute_are_limited_with_the_time_to_wait(guarded: str, file: KeyFile) -> None:
    file.write(entry("minute", requests_per_minute=3), entry("free"))
    replies = [ask(guarded, "minute") for _ in range(4)]
    assert [reply.status_code for reply in replies] == [200, 200, 200, 429]
    left = [reply.headers["x-ratelimit-remaining-requests"] for reply in replies]
    assert left == ["2", "1", "0", "0"]
    assert {reply.headers["x-ratelimit-limit-requests"] for reply in replies} == {"3"}
    assert_error(replies[-1], 429, "3 requests a minute: try again in")
    assert replies[-1].json()["error"]["code"] == "rate_limit_exceeded"
    assert replies[-1].headers["x-ratelimit-scope"] == "key"
    for name in ("retry-after", "x-ratelimit-reset-requests"):
        assert 0 < float(replies[-1].headers[name].rstrip("s")) <= WINDOW_SECONDS
    assert "x-ratelimit-limit-requests" not in ask(guarded, "free").headers
    headers = {"Authorization": "Bearer minute"}
    assert httpx.get(f"{guarded}/v1/models", headers=headers).status_code == 200


def test_tokens_are_reserved_and_unused_ones_returned(guarded: str, file: KeyFile) -> None:
    file.write(entry("tokens", tokens_per_minute=100))
    used = ask(guarded, "tokens").json()["usage"]["total_tokens"]
    # May take 80, and ends at the first token.
    stops = {
        **BODY,
        "max_tokens": 80,
        "stop": [ask(guarded, "tokens").json()["choices"][0]["text"][0]],
    }
    reply = ask(guarded, "tokens", **stops)
    assert reply.status_code == 200
    used = 2 * used + reply.json()["usage"]["total_tokens"]
    assert used < 50
    assert_error(ask(guarded, "tokens", **{**BODY, "max_tokens": 95}), 429, "100 tokens a minute")
    assert_error(ask(guarded, "tokens", **{**BODY, "max_tokens": 200}), 400, "request fewer")
    client = openai.OpenAI(base_url=f"{guarded}/v1", api_key="tokens", max_retries=0)
    raw = client.completions.with_raw_response.create(model="generation", **_openai(BODY))
    before = 100 - used - int(raw.headers["x-ratelimit-remaining-tokens"])
    assert before == raw.parse().usage.total_tokens  # type: ignore[union-attr]


def _openai(body: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": body["prompt"],
        "max_tokens": body["max_tokens"],
        "extra_body": {"ignore_eos": True},
    }


def test_concurrent_requests_of_a_key_are_limited(guarded: str, file: KeyFile) -> None:
    file.write(entry("two", concurrent_requests=2))
    long = {**BODY, "max_tokens": 1500, "stream": True}
    headers = {"Authorization": "Bearer two"}
    url = f"{guarded}/v1/completions"
    limit, left = (f"x-ratelimit-{each}-concurrent-requests" for each in ("limit", "remaining"))
    with ExitStack() as stack:
        for number in (1, 2):
            stream = stack.enter_context(
                httpx.stream("POST", url, json=long, headers=headers, timeout=60)
            )
            assert stream.status_code == 200
            assert stream.headers[limit] == "2" and stream.headers[left] == str(2 - number)
        refused = ask(guarded, "two")
        assert_error(refused, 429, "2 requests at a time")
        assert refused.headers[limit] == "2" and refused.headers[left] == "0"
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-ratelimit-scope"] == "key"
    deadline = time.monotonic() + 30  # those whose client has left do not run any more
    while ask(guarded, "two").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_older_ledgers_standing_has_no_headers_of_concurrency() -> None:
    """The actor lives on when replicas are replaced, and does not know what is new."""
    standing = object.__new__(Standing)
    known = vars(Standing(remaining_requests=1))
    vars(standing).update({name: known[name] for name in known if name != "remaining_concurrent"})
    found = headers(Limits(requests=2, concurrent=2), standing)
    assert found.keys() == {
        f"x-ratelimit-{each}-requests" for each in ("limit", "remaining", "reset")
    }


def test_the_limit_holds_in_every_sliding_minute() -> None:
    now = 0.0
    counts = Counts(lambda: now)
    limits = Limits(requests=10)
    let_in: list[float] = []
    for number in range(1000):
        now = number * 0.5 + (number % 7) * 0.05
        standing = counts.begin("k", limits, str(number))
        if standing.refused is None:
            let_in.append(now)
        else:
            wait = standing.retry_seconds
            assert 0 < wait <= WINDOW_SECONDS
            assert sum(since > now + wait - WINDOW_SECONDS + 1e-6 for since in let_in) < 10
    for start in let_in:
        assert sum(start <= each < start + WINDOW_SECONDS for each in let_in) <= 10
    assert len(let_in) >= 10 * 500 // 60 - 10


def test_a_retried_request_counts_once() -> None:
    counts = Counts(lambda: 0.0)
    limits = Limits(requests=1, tokens=10, concurrent=1)
    for _ in range(3):
        assert counts.begin("k", limits, "same").refused is None
        assert counts.reserve("k", limits, "same", 10).refused is None
    counts.end("k", "same", 4)
    assert counts.begin("k", limits, "other").refused == "requests"
    assert counts.reserve("k", limits, "other", 6).refused is None
    assert counts.reserve("k", limits, "third", 1).refused == "tokens"


def test_a_request_retried_after_its_minute_is_not_charged_twice() -> None:
    now = 0.0
    counts = Counts(lambda: now)
    limits = Limits(tokens=10)
    counts.begin("k", limits, "long")
    assert counts.reserve("k", limits, "long", 10).refused is None
    now = 61.0
    counts.begin("k", limits, "other")
    assert counts.reserve("k", limits, "other", 10).refused is None
    counts.begin("k", limits, "long")
    assert counts.reserve("k", limits, "long", 10).refused is None  # its replica died
    counts.end("k", "long", 10)
    assert counts.reserve("k", limits, "long", 10).refused == "tokens"


@pytest.mark.slow
def test_limits_hold_for_many_clients_at_once(guarded: str, file: KeyFile) -> None:
    file.write(entry("many", requests_per_minute=20))
    with ThreadPoolExecutor(16) as pool:
        statuses = Counter(
            reply.status_code for reply in pool.map(lambda _: ask(guarded, "many"), range(60))
        )
    assert statuses == {200: 20, 429: 40}


def test_beams_reserve_what_they_may_use(guarded: str, file: KeyFile) -> None:
    file.write(entry("beams", tokens_per_minute=50))
    beams = {"prompt": "x", "max_tokens": 16, "n": 4, "best_of": 4, "use_beam_search": True}
    assert_error(ask(guarded, "beams", **beams), 400, "its key has 50 a minute")
    reply = ask(guarded, "beams", **{**beams, "max_tokens": 8})
    assert reply.status_code == 200
    assert reply.json()["usage"]["total_tokens"] <= 50


class Uses(NoRecorder):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def key_use(self, key: str, tokens: int, *, refused: bool) -> None:
        self.tokens.append(tokens)


def test_a_request_that_a_full_service_refuses_costs_no_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = KeyFile(tmp_path)
    file.write(entry("k", tokens_per_minute=100))
    monkeypatch.setenv("GPTJ_KEYS_FILE", str(file.path))
    uses = Uses()
    app = new_app("test", uses)

    @app.post("/v1/work")
    async def work() -> None:
        await reserve_tokens(90)
        raise QueueFullError("full")

    headers = {"Authorization": "Bearer k"}
    for _ in range(2):
        reply = TestClient(app).post("/v1/work", headers=headers)
        assert_error(reply, 429, "full")
    assert uses.tokens == [0, 0]


class SlowLedger(LocalLedger):
    """Answers later than it counts, as one over a network."""

    async def begin(self, key: str, limits: Limits, request: str) -> Standing:
        standing = await super().begin(key, limits, request)
        await asyncio.sleep(3600 if request == "leaves" else 0)
        return standing


def test_a_client_that_disconnects_while_being_counted_is_released() -> None:
    key = Key(name="k", sha256=digest(b"k"), concurrent_requests=1)
    slow = SlowLedger()

    async def leave_and_come_back() -> None:
        leaving = asyncio.ensure_future(Account.of(key, "leaves", slow).begin())
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        await Account.of(key, "stays", slow).begin()

    asyncio.run(leave_and_come_back())


class FakeActor:
    """Counts, behind calls that are answered only while `answers`."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.answers = True

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*arguments: Any) -> Any:
                result = getattr(self.counts, name)(*arguments)
                if result is None:
                    return None  # nobody waits for it
                future = asyncio.get_running_loop().create_future()
                if self.answers:
                    future.set_result(result)
                return future

        return Method


def test_requests_end_in_a_ledger_that_did_not_answer_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    actor = FakeActor()
    monkeypatch.setattr(ledger.ClusterLedger, "_start", lambda self: None)
    monkeypatch.setattr(ledger, "ANSWER_SECONDS", 0.01)
    limits = Limits(concurrent=2)

    async def run() -> None:
        cluster = ledger.ClusterLedger()
        cluster._actor = actor
        await cluster.begin("k", limits, "before")
        actor.answers = False
        await cluster.begin("k", limits, "during")  # counted there, though not in time
        for request in ("before", "during"):
            await cluster.end("k", request, 0)
        actor.answers, cluster._actor = True, actor
        monkeypatch.setattr(cluster, "_without_until", 0.0)
        for request in ("third", "fourth"):
            assert (await cluster.begin("k", limits, request)).refused is None
        assert (await cluster.begin("k", limits, "fifth")).refused == "concurrent"

    asyncio.run(run())


def test_a_dead_replicas_requests_stop_counting_and_a_live_ones_do_not() -> None:
    now = 0.0
    counts = Counts(lambda: now)
    limits = Limits(concurrent=2)
    counts.begin("k", limits, "lost", "dead")
    counts.begin("k", limits, "held", "live")
    while now < 3 * LEASE_SECONDS:
        now += LEASE_SECONDS / 3
        counts.renew("live", [("k", "held")])
        left = counts.begin("k", limits, "held", "live").remaining_concurrent
        assert left == (0 if now < LEASE_SECONDS else 1)
    assert counts.begin("k", limits, "new", "live").refused is None
    assert counts.begin("k", limits, "newer", "live").refused == "concurrent"


def test_a_retry_elsewhere_outlives_the_dead_replicas_lease() -> None:
    now = 0.0
    counts = Counts(lambda: now)
    limits = Limits(concurrent=1)
    counts.begin("k", limits, "retried", "dead")
    now = LEASE_SECONDS - 1
    counts.begin("k", limits, "retried", "live")
    now = LEASE_SECONDS + 1
    assert counts.begin("k", limits, "other", "live").refused == "concurrent"


def test_a_replica_that_could_not_be_heard_gets_its_requests_back() -> None:
    """As after a broken network, or the ledger's own restart."""
    now = 0.0
    counts = Counts(lambda: now)
    limits = Limits(concurrent=1)
    counts.begin("k", limits, "running", "cut off")
    now = LEASE_SECONDS
    assert counts.begin("k", limits, "other", "live").refused is None
    counts.end("k", "other", 0)
    counts.renew("cut off", [("k", "running")])
    assert counts.begin("k", limits, "other", "live").refused == "concurrent"
    counts.end("k", "running", 0)
    assert counts.begin("k", limits, "other", "live").refused is None


def test_a_request_that_its_replica_does_not_have_stops_counting() -> None:
    """It was counted after its replica had given up waiting, or its end was lost."""
    now = 0.0
    counts = Counts(lambda: now)
    limits = Limits(concurrent=2)
    counts.begin("k", limits, "lost", "live")
    counts.begin("k", limits, "long", "live")
    while now < LEASE_SECONDS - 5:
        now += 5
        counts.renew("live", [("k", "long")])
        assert counts.begin("k", limits, "other", "live").refused == "concurrent"
    now = LEASE_SECONDS
    counts.renew("live", [("k", "long")])
    assert counts.begin("k", limits, "other", "live").refused is None
    while now < 2 * MAX_SECONDS:  # a live one counts as long as it runs
        now += LEASE_SECONDS / 2
        counts.renew("live", [("k", "long"), ("k", "other")])
    assert counts.begin("k", limits, "third", "live").refused == "concurrent"


def test_a_replica_renews_its_running_requests_until_they_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    actor = FakeActor()
    renewed: list[list[tuple[str, str]]] = []
    seen = threading.Event()

    def renew(holder: str, running: list[tuple[str, str]]) -> None:
        renewed.append(sorted(running))
        seen.set()
        if len(renewed) == 1:
            raise RuntimeError("not any error that we know")

    monkeypatch.setattr(actor.counts, "renew", renew)
    monkeypatch.setattr(ledger.ClusterLedger, "_start", lambda self: None)
    monkeypatch.setattr(ledger, "RENEW_SECONDS", 0.01)
    limits = Limits(concurrent=2)

    async def next_renewal() -> list[tuple[str, str]]:
        for _ in range(2):  # one may have begun before
            seen.clear()
            assert await asyncio.to_thread(seen.wait, 60)
        return renewed[-1]

    async def run() -> None:
        cluster = ledger.ClusterLedger()
        cluster._actor = actor
        for request in ("first", "second", "refused"):
            await cluster.begin("k", limits, request)
        assert await next_renewal() == [("k", "first"), ("k", "second")]
        await cluster.end("k", "first", 0)
        assert await next_renewal() == [("k", "second")]
        cluster.close()

    asyncio.run(run())


def test_requests_do_not_wait_for_a_ledger_that_cannot_be_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = threading.Event()
    searches = []

    def search(self: ledger.ClusterLedger) -> None:
        searches.append(threading.current_thread())
        if len(searches) > 1:
            found.wait(60)

    monkeypatch.setattr(ledger.ClusterLedger, "_start", search)
    cluster = ledger.ClusterLedger()
    limits = Limits(requests=10)

    async def run() -> list[Standing]:
        begun = (cluster.begin("k", limits, str(number)) for number in range(20))
        return await asyncio.wait_for(asyncio.gather(*begun), 30)

    standings = asyncio.run(run())
    found.set()
    assert sum(standing.refused is None for standing in standings) == 10
    assert len(searches) == 2  # at the start, and one for all requests


def test_a_temporarily_unreadable_file_is_reread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = KeyFile(tmp_path)
    file.write(entry("old"))
    keys = Keys(path=file.path)
    file.write(entry("new"))
    for broken in ("stat", "read_bytes"):
        with monkeypatch.context() as patch:
            error = OSError(errno.EMFILE, "Too many open files")
            patch.setattr(Path, broken, Mock(side_effect=error))
            assert keys.allow(b"Bearer old")
    assert keys.allow(b"Bearer new")
    assert not keys.allow(b"Bearer old")

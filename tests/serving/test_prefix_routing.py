"""Requests that begin alike share keys, by which the router sends them to one replica."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http import auto

from deployments import generation, proxy
from deployments.prefix_router import PrefixRouter, PrefixTable
from gptj.serving.entry.failover import Failover
from gptj.serving.entry.prefix_keys import (
    BLOCK_CHARACTERS,
    BLOCK_IDS,
    MAX_BLOCKS,
    MAX_PARSED_BYTES,
    PrefixKeys,
    keys_of,
    model_key,
)

SECRET = b"of the test"
LONG = "".join(f"Sentence {number} of a long text. " for number in range(100))
SYSTEM = {"role": "system", "content": LONG[: 3 * BLOCK_CHARACTERS]}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def keys(secret: bytes = SECRET, **body: Any) -> list[str]:
    """The model's key, and the prompt's."""
    return keys_of(json.dumps(body).encode(), secret).split(".")


def shared(one: dict[str, Any], other: dict[str, Any]) -> int:
    """How many keys two bodies have in common, the model's not counted."""
    found = [a == b for a, b in zip(keys(**one)[1:], keys(**other)[1:], strict=False)]
    assert found == sorted(found, reverse=True)  # a key depends on all before it
    return sum(found)


@pytest.mark.parametrize(
    ("one", "other", "blocks"),
    [
        ({"prompt": LONG[:1000] + "a" * 500}, {"n": 2, "prompt": LONG[:1000] + "b" * 500}, 7),
        ({"prompt": [LONG[:1000]]}, {"prompt": LONG[:1000]}, 7),
        ({"prompt": LONG[:1000]}, {"prompt": "x" + LONG[:1000]}, 0),
        ({"prompt": "東京 is far 😀" * 60}, {"prompt": "東京 is far 😀" * 60}, 5),
        ({"prompt": [*range(200)]}, {"prompt": [[*range(170), 7, *range(99)]]}, 5),
        ({"prompt": [*range(200)]}, {"prompt": [*range(1, 200)]}, 0),
        ({"messages": [SYSTEM, user("a")]}, {"messages": [SYSTEM, user("b")]}, 3),
        (  # a later turn
            {"messages": [user(LONG[:300])]},
            {"messages": [user(LONG[:300]), {"role": "assistant", "content": LONG}, user("x")]},
            2,
        ),
        (
            {"messages": [user(LONG[:300])]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG[:300]}]}]},
            2,
        ),
        ({"messages": [user(LONG)]}, {"messages": [{"role": "system", "content": LONG}]}, 0),
        ({"messages": [user("a" * 64), user("b")]}, {"messages": [user("a" * 64 + "b")]}, 0),
    ],
)
def test_prompts_that_begin_alike_share_their_first_keys(
    one: dict[str, Any], other: dict[str, Any], blocks: int
) -> None:
    assert shared(one, other) == blocks


def test_keys_are_bounded_and_tell_nothing_without_the_secret() -> None:
    assert len(keys(prompt="x" * 60_000)) == 1 + MAX_BLOCKS
    assert len(keys(prompt=[7] * 20_000)) == 1 + MAX_BLOCKS
    assert len(keys(messages=[user(LONG)] * 15)) == 1 + MAX_BLOCKS
    assert len(keys(prompt=[7] * (BLOCK_IDS - 1), model="m")) == 1
    ours, theirs = keys(prompt=LONG), keys(b"another", prompt=LONG)
    assert not set(ours[1:]) & set(theirs[1:])
    assert "Sentence" not in ".".join(ours)


def test_the_model_has_its_own_key() -> None:
    assert keys(model="a", prompt="x") == [model_key("a")]
    assert keys(model="a", prompt=LONG)[1:] == keys(prompt=LONG)[1:]
    assert keys(prompt=LONG)[0] == ""


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'"x"', b"[" * 60_000, b'{"prompt": "short"}', b'{"prompt": [1, 2]}',
        b'{"prompt": {}}', b'{"messages": "x"}', b'{"messages": [1]}', b'{"prompt": []}',
        b'{"prompt": null}', b"\xff", b'{"model": 7}', b'{"model": ""}',
        b'{"prompt": [%s]}' % b",".join([b"1e3"] * 99), b'{"prompt": [%s]}' % (b"9" * 4000),
        b'{"prompt": [%s 99999999999999999999]}' % (b"1," * 99), b'{"prompt": [[{}]]}',
    ],
)  # fmt: skip
def test_short_and_wrong_bodies_have_none(body: bytes) -> None:
    found = keys_of(body, SECRET)
    assert found in ("", model_key(""))


def test_unusual_texts_are_no_error() -> None:
    assert keys_of(b'{"prompt": "%s", "model": "\\udc00"}' % (rb"\ud800" * 200), SECRET)
    odd = [{"role": [], "content": None}, {}, {"content": [1, {"text": 7}]}, user("x" * 200)]
    assert len(keys(messages=odd)) == 2


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    request = Request(scope, receive)
    names = ("session", "multiplexed")
    sessions = [
        value for name, value in request.headers.items() if any(each in name for each in names)
    ]
    await JSONResponse([sessions, len(await request.body())])(scope, receive, send)


def test_a_clients_own_session_is_replaced() -> None:
    client = TestClient(PrefixKeys(echo, SECRET))
    own = {"X-Session-Id": "mine", "x_session_id": "mine too", "serve_multiplexed_model_id": "m"}
    body = json.dumps({"prompt": LONG}).encode()
    found = keys_of(body, SECRET)
    for route in ("/v1/completions", "/other/v1/chat/completions/"):
        for headers in ({}, own):
            reply = client.post(route, content=body, headers=headers)
            assert reply.json() == [[found], len(body)]
    for route in ("/tokenize", "/v1/embeddings", "/classification"):
        assert client.post(route, content=body, headers=own).json() == [[], len(body)]
    assert client.post("/v1/completions", content=b"{", headers=own).json() == [[], 1]
    assert client.get("/v1/completions", headers=own).json() == [[], 0]
    large = json.dumps({"prompt": "x" * MAX_PARSED_BYTES})
    assert client.post("/v1/completions", content=large).json() == [[], len(large)]


def test_a_retry_has_no_keys_and_so_can_leave_the_replica() -> None:
    tries: list[list[str]] = []

    async def dies_once(scope: Scope, receive: Receive, send: Send) -> None:
        tries.append(Request(scope).headers.getlist("x-session-id"))
        if len(tries) > 1:
            await echo(scope, receive, send)

    client = TestClient(PrefixKeys(Failover(dies_once), SECRET))
    assert client.post("/v1/completions", json={"prompt": LONG}).status_code == 200
    assert [len(each) for each in tries] == [1, 0]


def test_the_layer_is_in_serves_proxy_but_not_behind_haproxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module, name in ((auto, "AutoHTTPProtocol"), (uvicorn.config, "WS_PROTOCOLS")):
        monkeypatch.setattr(module, name, copy.copy(getattr(module, name)))  # which it changes
    monkeypatch.setattr(proxy, "follow_serve", lambda: None)
    assert PrefixKeys in {each.cls for each in proxy.middlewares()}
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert PrefixKeys not in {each.cls for each in proxy.middlewares()}


@pytest.mark.parametrize("haproxy", [False, True])
def test_generation_has_the_router_but_not_behind_haproxy(
    haproxy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HAProxy routes by itself: with any other router Serve would refuse the application."""
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", str(int(haproxy)))
    monkeypatch.setattr(generation, "check_before_deploying", lambda *_: None)
    application: Any = generation.build(generation.Arguments(checkpoint="somewhere"))
    config = application._bound_deployment._deployment_config.request_router_config
    assert config.is_default_request_router() == haproxy
    if not haproxy:
        assert config.get_request_router_class() is PrefixRouter


def replica_id(name: str) -> ReplicaID:
    return ReplicaID(name, DeploymentID("generation", "generation"))


A, B, C = map(replica_id, "abc")


def test_the_table_finds_the_longest_known_beginning() -> None:
    table = PrefixTable()
    table.add(["1", "12", "123"], "a")
    table.add(["1", "14"], "b")
    assert table.known(["1", "12", "125"]) == {"a": 2, "b": 1}
    assert table.known(["2", "12"]) == {}


def test_the_table_is_bounded_and_forgets_ends_before_beginnings() -> None:
    table = PrefixTable(max_keys=4)
    table.add(["1", "12", "123"], "a")
    table.add(["2", "21"], "a")
    assert len(table) == 4
    assert table.known(["1", "12", "123"]) == {"a": 2}
    table.add(["1"], "b")  # in use
    table.add(["3", "31"], "a")
    assert table.known(["1", "12"]) == {"a": 1, "b": 1}
    assert len(table) == 4


def test_the_table_knows_what_is_common() -> None:
    table = PrefixTable()
    for number in range(100):
        table.add(["1", f"1{number}"], "a")
        table.add([f"{number}x"], "a")
    assert table.common(["1", "199"], 0.4) == 1
    assert table.common(["1", "199"], 0.5) == 0
    assert table.common(["2"], 0.0) == 0
    fresh = PrefixTable()
    fresh.add(["1"], "a")
    assert fresh.common(["1"], 0.5) == 0  # one request says little


def test_the_table_forgets_replicas() -> None:
    table = PrefixTable()
    table.add(["1", "12"], "a")
    table.add(["1"], "b")
    table.add(["2"], "a")
    table.forget({"a", "c"})
    assert table.known(["1", "12"]) == {"b": 1}
    assert len(table) == 1
    table.add(["1"], "a")
    table.forget({"a"})
    assert table.known(["1"]) == {"b": 1}


def test_requests_without_keys_do_not_change_what_is_common() -> None:
    """Such as probes: a system prompt is common by its share of prompts."""
    table = PrefixTable()
    for number in range(60):
        table.add(["1", f"1{number}"], "a")
        for _ in range(5):
            table.add([], "a")
    assert table.common(["1"], 0.5) == 1


class Replica:
    """What Serve's router knows of one."""

    max_ongoing_requests = 4000
    node_id = availability_zone = None
    multiplexed_model_ids = frozenset[str]()

    def __init__(self, id_: ReplicaID, model: str | None = "base") -> None:
        self.requests = 0  # that it tells when asked
        self.replica_id = id_
        self.replica_metadata = {} if model is None else {"model": model}

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.requests


class Routing:
    """Serve's own routing with our router: requests in, replicas' names out."""

    def __init__(
        self,
        *ids: ReplicaID,
        model: str | None = "base",
        router: type[RequestRouter] = PrefixRouter,
        **options: int,
    ) -> None:
        self.router: Any = router(
            deployment_id=DeploymentID("generation", "generation"),
            handle_source=DeploymentHandleSource.UNKNOWN,
            use_replica_queue_len_cache=True,
        )
        self.router.initialize_state(**options)
        self.router.update_replicas([Replica(each, model) for each in ids])
        for each in ids:
            self.load(each.unique_id, 0)
        self.number = 0

    async def ask(self, **body: Any) -> str:
        """Route a request, which then stays in progress."""
        self.number += 1
        metadata = RequestMetadata(
            "the same",
            str(self.number),
            session_id=keys_of(json.dumps(body).encode(), SECRET),
        )
        request = PendingRequest([], {}, metadata)
        replica = await asyncio.wait_for(self.router._choose_replica_for_request(request), 5)
        self.router.on_send_request(replica.replica_id)
        self.router.on_request_routed(request, replica.replica_id, None)
        return replica.replica_id.unique_id

    def end(self, name: str, times: int = 1) -> None:
        for _ in range(times):
            self.router.decrement_queue_len_cache(replica_id(name))

    async def answered(self, **body: Any) -> str:
        name = await self.ask(**body)
        self.end(name)
        return name

    def load(self, name: str, requests: int) -> None:
        self.router.on_new_queue_len_info(replica_id(name), requests)


def routed(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())


def test_the_router_follows_the_longest_beginning() -> None:
    async def test() -> None:
        routing = Routing(A, B, C)
        for number in range(30):
            prompt = f"{number} " + LONG[:1000]
            first = await routing.answered(prompt=prompt)
            assert {await routing.answered(prompt=prompt + str(n)) for n in range(4)} == {first}

    routed(test)


def test_a_chat_stays_on_its_replica() -> None:
    async def test() -> None:
        routing = Routing(A, B)
        chats: list[list[dict[str, str]]] = [[SYSTEM, user(f"{n} " * 200)] for n in range(10)]
        homes = [await routing.answered(messages=chat) for chat in chats]
        for _ in range(3):
            for chat, home in zip(chats, homes, strict=True):
                chat += [{"role": "assistant", "content": LONG[:200]}, user("And then?")]
                assert await routing.answered(messages=chat) == home

    routed(test)


def test_a_busy_replica_is_left_and_the_other_remembered_too() -> None:
    async def test() -> None:
        routing = Routing(A, B, characters_per_request=256)
        body = {"prompt": LONG[:1024]}  # worth four requests
        home = await routing.answered(**body)
        other = {"a": "b", "b": "a"}[home]
        routing.load(home, 4)
        assert await routing.answered(**body) == home
        routing.load(home, 5)
        assert await routing.answered(**body) == other
        routing.load(home, 1)
        routing.load(other, 0)
        assert await routing.answered(**body) == other  # of those that know it, the less busy

    routed(test)


def test_a_short_common_beginning_does_not_unbalance() -> None:
    async def test() -> None:
        routing = Routing(A, B)
        system = LONG[:BLOCK_CHARACTERS]
        found = Counter([await routing.ask(prompt=system + f"{n}" * 900) for n in range(40)])
        assert abs(found["a"] - found["b"]) <= 1

    routed(test)


def test_a_system_prompt_does_not_bring_all_chats_to_one_replica() -> None:
    """Even if no replica is busy: each keeps the chats that it has, and new ones are spread."""

    async def test() -> None:
        routing, other = Routing(A, B), Routing(B, A)
        system = {"role": "system", "content": LONG[:1000]}
        for _ in range(20):
            for each in (routing, other):
                await each.answered(messages=[system, user("Hello")])
        chats = [[system, user(f"{n} " * 200)] for n in range(40)]
        homes = [await routing.answered(messages=chat) for chat in chats]
        assert 8 <= homes.count("a") <= 32
        assert homes == [await other.answered(messages=chat) for chat in chats]
        for chat, home in zip(chats, homes, strict=True):
            later = [*chat, {"role": "assistant", "content": LONG}, user("And then?")]
            assert await routing.answered(messages=later) == home

    routed(test)


def test_unknown_prompts_are_balanced() -> None:
    async def test() -> None:
        routing = Routing(A, B, C)
        idle = Counter([await routing.answered(prompt=f"{n} " * 200) for n in range(150)])
        assert min(idle.values()) > 25 and len(idle) == 3
        busy = Counter([await routing.ask(prompt=f"x{n} " * 200) for n in range(60)])
        assert max(busy.values()) - min(busy.values()) <= 4
        for name in "abc":
            routing.load(name, 0)
        short = Counter([await routing.answered(prompt="x") for _ in range(60)])
        assert len(short) == 3

    routed(test)


@pytest.mark.slow
def test_unknown_prompts_take_as_long_as_behind_serves_router() -> None:
    """Simulated: 16 clients, and three replicas that share their time among their requests."""

    async def mean_seconds(router: type[RequestRouter]) -> float:
        routing, work = Routing(A, B, C, router=router), random.Random(0)
        random.seed(0)
        active: dict[str, list[list[float]]] = {"a": [], "b": [], "c": []}  # work left, start
        now, times = 0.0, []
        while len(times) < 2000:
            while sum(map(len, active.values())) < 16:
                name = await routing.ask(prompt=f"{routing.number} " * 100)
                active[name].append([work.expovariate(1), now])
            step, name = min(
                (len(each) * min(each)[0], name) for name, each in active.items() if each
            )
            now += step
            for each in active.values():
                for request in each:
                    request[0] -= step / len(each)
            ended = min(active[name])
            active[name].remove(ended)
            times.append(now - ended[1])
            routing.end(name)
        return sum(times) / len(times)

    async def test() -> None:
        ours, theirs = [
            await mean_seconds(each) for each in (PrefixRouter, PowerOfTwoChoicesRequestRouter)
        ]
        assert ours == pytest.approx(theirs, rel=0.02)

    routed(test)


def test_routers_agree_on_new_prompts() -> None:
    """Two proxies: each sends a prompt that it does not know where the other sent it."""

    async def test() -> None:
        one, other = Routing(A, B), Routing(B, A)
        for number in range(30):
            prompt = f"{number} " + LONG[:500]
            assert await one.answered(prompt=prompt) == await other.answered(prompt=prompt + "x")

    routed(test)


def test_an_adapters_requests_stay_together_but_not_the_base_models() -> None:
    async def test() -> None:
        routing = Routing(A, B)
        homes = set()
        for adapter in "pqrstuvwxyz":
            home = await routing.answered(model=adapter, prompt="x")
            homes.add(home)
            prompts = [f"{n} " * 200 for n in range(5)]
            found = {await routing.answered(model=adapter, prompt=each) for each in prompts}
            assert found == {home}
        assert homes == {"a", "b"}
        for base in ({"model": "base"}, {}):
            found = {await routing.answered(**base, prompt=f"{n} " * 300) for n in range(30)}
            assert found == {"a", "b"}
        home = await routing.answered(model="p", prompt="x")
        routing.load(home, 5)
        assert await routing.answered(model="p", prompt="x") != home

    routed(test)


def test_adapters_have_homes_however_many_replicas_there_are() -> None:
    """Also where an adapter has a large share of all requests: each is loaded a few times only."""

    async def test() -> None:
        names = [f"{number:x}" for number in range(12)]
        routing = Routing(*map(replica_id, names))
        loaded: dict[str, list[str]] = {name: [] for name in names}  # the last used last
        loads = 0
        numbers = random.Random(0)
        for _ in range(600):
            adapter = f"adapter-{numbers.randrange(8)}"
            home = loaded[await routing.answered(model=adapter, prompt="x")]
            loads += adapter not in home
            home[:] = [*[each for each in home if each != adapter][-3:], adapter]
        assert loads <= 16

    routed(test)


def test_a_load_that_serve_has_forgotten_is_asked_for() -> None:
    """A busy replica is not taken for an idle one, although it has the prefix."""

    async def test() -> None:
        routing = Routing(A, B)
        home = await routing.answered(prompt=LONG)
        replicas = routing.router.curr_replicas.values()
        for requests, expected in ((0, home), (300, {"a": "b", "b": "a"}[home])):
            for replica in replicas:
                replica.requests = requests if replica.replica_id.unique_id == home else 0
                routing.router.replica_queue_len_cache.invalidate_key(replica.replica_id)
            assert await routing.answered(prompt=LONG[:700]) == expected

    routed(test)


def test_a_full_replica_is_not_insisted_on() -> None:
    async def test() -> None:
        routing = Routing(A, B, characters_per_request=1)
        home = await routing.answered(prompt=LONG)
        routing.load(home, Replica.max_ongoing_requests)
        assert await routing.answered(prompt=LONG) != home

    routed(test)


def test_beginnings_are_known_by_adapter() -> None:
    """An adapter's keys and values are its own; the base model's need no name."""

    async def test() -> None:
        routing = Routing(A, B, adapter_requests=0)
        home = await routing.answered(prompt=LONG)
        routing.load(home, 1)
        assert await routing.answered(model="base", prompt=LONG) == home
        assert await routing.answered(model="p", prompt=LONG) != home

    routed(test)


def test_replicas_that_are_gone_are_forgotten() -> None:
    async def test() -> None:
        for lose in ("update_replicas", "on_replica_actor_died", "on_replica_actor_unavailable"):
            routing = Routing(A, B)
            home = replica_id(await routing.answered(prompt=LONG))
            left = B if home == A else A
            gone = [Replica(left)] if lose == "update_replicas" else home
            getattr(routing.router, lose)(gone)
            assert len(routing.router._table) == 0
            if lose != "on_replica_actor_unavailable":
                late = RequestMetadata("x", "x", session_id=".late")
                routing.router.on_request_routed(PendingRequest([], {}, late), home, None)
                assert len(routing.router._table) == 0
                assert await routing.answered(prompt=LONG) == left.unique_id
        routing.router.update_replicas([Replica(A), Replica(C)])
        assert await routing.answered(prompt=LONG) in "ac"

    routed(test)


def test_requests_that_wait_together_each_get_their_own_replica() -> None:
    """Serve's default gives a replica to the oldest request, whatever it was chosen for."""

    async def test() -> None:
        routing = Routing(A, B)
        prompts = [f"{n} " + LONG for n in range(16)]
        homes = [await routing.answered(prompt=each) for each in prompts]
        assert set(homes) == {"a", "b"}
        found = await asyncio.gather(*(routing.answered(prompt=each) for each in prompts))
        assert found == homes

    routed(test)


@pytest.mark.parametrize("model", [None, "base"])
def test_sessions_of_other_origins_are_no_error(model: str | None) -> None:
    """Without our layer in the proxy, a client's own header arrives."""

    async def test() -> None:
        routing = Routing(A, B, model=model)
        for session in ("", ".", "...", "x" * 5000, "é.ü", model_key("base")):
            metadata = RequestMetadata("x", session, session_id=session)
            request = PendingRequest([], {}, metadata)
            replica = await routing.router._choose_replica_for_request(request)
            routing.router.on_request_routed(request, replica.replica_id, None)

    routed(test)


@pytest.mark.parametrize(
    "options",
    [{"characters_per_request": 0}, {"adapter_requests": -1}, {"adapter_requests": 0.5}, {"x": 1}],
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    async def test() -> None:
        with pytest.raises((ValueError, TypeError), match=next(iter(options))):
            Routing(A, **options)

    routed(test)

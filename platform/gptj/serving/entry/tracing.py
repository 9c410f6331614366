"""A span of each request in Serve's proxy, by OpenTelemetry."""

from __future__ import annotations

from opentelemetry import context, trace
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptj.serving.middleware.observing import HEADER
from gptj.serving.tracing import PARENT, STATE, enabled, parent_of, propagator, tracer


class Tracing:
    """Middleware of Serve's proxy: a span from the request's head to its reply's last byte.

    It continues the client's trace (`traceparent`) and includes all tries on replicas. The
    provider's sampling ratio always applies: clients can opt out of sampling, but not in.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not enabled():
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        attributes = {
            "http.request.method": scope["method"],
            "url.path": scope["path"][:200],
            "url.scheme": scope.get("scheme", "http"),
            "http.request.header.x-request-id": headers.get(HEADER, b"")[:128].decode("latin-1"),
        }
        span = tracer.start_span(
            scope["method"], _bounded(parent_of(scope)), SpanKind.SERVER, attributes=attributes
        )
        carrier: dict[str, str] = {}
        propagator.inject(carrier, trace.set_span_in_context(span, context.Context()))
        ours = [(name.encode(), value.encode()) for name, value in carrier.items()]
        theirs = [each for each in scope["headers"] if each[0] not in (PARENT, STATE)]
        scope = {**scope, "headers": [*theirs, *ours]}

        async def observe(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(Status(StatusCode.ERROR))
            await send(message)

        with trace.use_span(span, end_on_exit=True):
            await self._app(scope, receive, observe)


def _bounded(parent: context.Context) -> context.Context:
    """The client's context, sampled only if a new trace would be as well."""
    theirs = trace.get_current_span(parent).get_span_context()
    if not theirs.is_valid or not theirs.trace_flags.sampled:
        return parent
    # The provider samples by trace id, which the client has chosen: decide by a new id instead. The
    # span is never ended, so it is not exported.
    drawn = tracer.start_span("draw", context.Context())
    if drawn.get_span_context().trace_flags.sampled:
        return parent
    ours = SpanContext(
        theirs.trace_id, theirs.span_id, True, TraceFlags(TraceFlags.DEFAULT), theirs.trace_state
    )
    return trace.set_span_in_context(NonRecordingSpan(ours), parent)

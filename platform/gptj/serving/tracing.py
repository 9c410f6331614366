"""OpenTelemetry spans of requests to the engine; see also gptj.serving.entry.tracing.

Nothing is recorded unless the process has a tracer provider: see deployments.tracing. Names and
attributes follow OpenTelemetry's semantic conventions for HTTP and generative AI, and never include
texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

PARENT, STATE = b"traceparent", b"tracestate"
tracer = trace.get_tracer("gptj.serving")
propagator = TraceContextTextMapPropagator()


def enabled() -> bool:
    """Whether this process has a tracer provider."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


@contextmanager
def continued(scope: Scope) -> Iterator[None]:
    """Make spans in the block children of Serve's span, or of the trace in the headers."""
    if not enabled() or trace.get_current_span().get_span_context().is_valid:
        yield
        return
    token = context.attach(parent_of(scope))
    try:
        yield
    finally:
        context.detach(token)


def parent_of(scope: Scope) -> context.Context:
    """The trace context in the request's headers."""
    carrier = {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in scope["headers"]
        if name in (PARENT, STATE)
    }
    return propagator.extract(carrier, context.Context())


def note(event: str, **attributes: str | int) -> None:
    """Add an event to the current span."""
    trace.get_current_span().add_event(event, attributes)

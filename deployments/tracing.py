"""Exports Serve's spans and ours as OpenTelemetry's variables say.

In serve.yaml

    tracing_config:
      enabled: true
      exporter_import_path: deployments.tracing:exporter
      sampling_ratio: 0.1  # of all requests; none whose client says that it is not sampled

or RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH=deployments.tracing:exporter and
RAY_SERVE_TRACING_SAMPLING_RATIO where Ray starts. The replicas' and proxies' environment says where
to: OTEL_EXPORTER_OTLP_ENDPOINT (default http://localhost:4318), OTEL_EXPORTER_OTLP_HEADERS,
OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES and so on. OTEL_TRACES_EXPORTER=console prints them.
"""

from __future__ import annotations

import os

from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    ConsoleSpanExporter,
    SimpleSpanProcessor,
)

from gptj.environment.extras import require

HTTP = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def exporter() -> list[SpanProcessor]:
    """For Serve's `exporter_import_path`; called before it makes the process's tracer provider.

    Raises:
        MissingPackageError: without the exporter's package.
        ValueError: for an exporter or a protocol that this platform does not support.
    """
    os.environ.setdefault("OTEL_SERVICE_NAME", "gptj")
    kind = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    if kind == "console":
        return [SimpleSpanProcessor(ConsoleSpanExporter())]
    if kind != "otlp":
        raise ValueError(f"OTEL_TRACES_EXPORTER must be otlp or console, got {kind!r}")
    for name in PROTOCOLS:
        if (protocol := os.environ.get(name, "http/protobuf")) != "http/protobuf":
            raise ValueError(
                f"{name} must be http/protobuf, got {protocol!r}; collectors take that on port 4318"
            )
    package = "opentelemetry-exporter-otlp-proto-http"
    module = require(HTTP, "tracing (deployments.tracing)", package)
    return [BatchSpanProcessor(module.OTLPSpanExporter())]

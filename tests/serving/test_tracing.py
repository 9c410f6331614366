"""Spans of requests: the client's trace, the proxy, tries, and the engine's stages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from peft_adapters import make_adapter
from serving_client import COMPLETIONS
from serving_models import Models, served_with_adapters
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from deployments import tracing as deployed
from gptj.environment.extras import MissingPackageError
from gptj.serving import tracing
from gptj.serving.completions import request_trace
from gptj.serving.entry import tracing as entry
from gptj.serving.entry.failover import Failover
from gptj.serving.entry.request_ids import RequestIds

pytest_plugins = ["serving_fixtures"]
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CANARY = "quixotic canary"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What this process traces; OpenTelemetry lets a process have one provider for good."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    monkeypatch.setattr(request_trace, "tracer", tracer)
    for module in (tracing, entry):
        monkeypatch.setattr(module, "tracer", tracer)
        monkeypatch.setattr(module, "enabled", lambda: True)
    yield exporter
    provider.shutdown()


def traceparent(sampled: bool = True) -> dict[str, str]:
    return {"traceparent": f"00-{TRACE}-{PARENT}-0{int(sampled)}"}


def parent(span: ReadableSpan) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def own(span: ReadableSpan) -> str:
    return f"{span.context.span_id:016x}"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_to_the_engine_has_a_span_for_each_stage_of_each_output(
    service: str, spans: InMemorySpanExporter, stream: bool
) -> None:
    body = {"prompt": CANARY, "max_tokens": 5, "n": 2, "ignore_eos": True, "stream": stream}
    httpx.post(service + COMPLETIONS, json=body, headers=traceparent(), timeout=60)
    found = spans.get_finished_spans()
    assert {f"{each.context.trace_id:032x}" for each in found} == {TRACE}
    (whole,) = [each for each in found if each.name.startswith("text_completion ")]
    assert parent(whole) == PARENT
    stages = [each for each in found if each is not whole]
    assert sorted(each.name for each in stages) == sorted(["queue", "prefill", "decode"] * 2)
    assert {parent(each) for each in stages} == {own(whole)}
    attributes = dict(whole.attributes or {})
    assert attributes["gen_ai.operation.name"] == "text_completion"
    assert attributes["gen_ai.request.max_tokens"] == 5
    assert attributes["gen_ai.request.choice.count"] == 2
    assert attributes["gen_ai.usage.output_tokens"] == 10
    assert attributes["gen_ai.usage.input_tokens"] > 0
    assert attributes["gen_ai.response.finish_reasons"] == ("length", "length")
    for index in (0, 1):
        queue, prefill, decode = (
            next(
                each
                for each in stages
                if each.name == name and (each.attributes or {})["gptj.output"] == index
            )
            for name in ("queue", "prefill", "decode")
        )
        assert whole.start_time <= queue.start_time <= queue.end_time == prefill.start_time
        assert prefill.end_time == decode.start_time <= decode.end_time <= whole.end_time
    assert CANARY not in "".join(each.to_json() for each in found)


def test_a_beam_search_that_fails_ends_its_span(
    models: Models, spans: InMemorySpanExporter
) -> None:
    with served_with_adapters(models) as service:
        body = {"prompt": CANARY, "max_tokens": 4, "use_beam_search": True, "n": 100}
        reply = httpx.post(service + COMPLETIONS, json=body, headers=traceparent(), timeout=60)
    assert reply.status_code == 400, reply.text
    (whole,) = spans.get_finished_spans()
    assert (whole.attributes or {})["gen_ai.response.finish_reasons"] == ("error",)


def test_a_span_names_the_adapter(
    models: Models, spans: InMemorySpanExporter, tmp_path: Path
) -> None:
    folder = make_adapter(models.generation, tmp_path, 1).folder
    with served_with_adapters(models, named={"mine": str(folder)}) as service:
        body = {"model": "mine", "prompt": CANARY, "max_tokens": 2}
        httpx.post(service + COMPLETIONS, json=body, headers=traceparent(), timeout=60)
    whole = next(each for each in spans.get_finished_spans() if "_completion" in each.name)
    assert whole.name == "text_completion mine"
    assert (whole.attributes or {})["gen_ai.request.model"] == "mine"


def test_an_unsampled_trace_records_nothing(service: str, spans: InMemorySpanExporter) -> None:
    body = {"prompt": "x", "max_tokens": 2}
    httpx.post(service + COMPLETIONS, json=body, headers=traceparent(sampled=False), timeout=60)
    assert spans.get_finished_spans() == ()


def test_the_proxys_span_continues_the_clients_and_notes_each_retry(
    spans: InMemorySpanExporter,
) -> None:
    tries: list[str] = []

    async def replicas(scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        tries.append(headers[b"traceparent"].decode())
        if len(tries) > 1:  # the first has died
            await JSONResponse({})(scope, receive, send)

    async def ask() -> None:
        app = RequestIds(entry.Tracing(Failover(replicas)))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            headers = {**traceparent(), "X-Request-Id": "mine"}
            assert (await client.post("http://x/v1/completions", headers=headers)).is_success

    asyncio.run(ask())
    (span,) = spans.get_finished_spans()
    assert (span.name, parent(span)) == ("POST", PARENT)
    assert tries == [f"00-{TRACE}-{own(span)}-01"] * 2
    (event,) = span.events
    assert event.name == "retry" and dict(event.attributes or {}) == {"reason": "died", "tries": 1}
    assert span.kind == trace.SpanKind.SERVER
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST",
        "http.request.header.x-request-id": "mine",
        "http.response.status_code": 200,
        "url.path": "/v1/completions",
        "url.scheme": "http",
    }


def test_a_client_cannot_bring_its_request_into_the_sample(
    spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even by an id that the ratio would choose."""
    flags: list[bytes] = []

    async def replicas(scope: Scope, receive: Receive, send: Send) -> None:
        flags.append(dict(scope["headers"])[b"traceparent"][-2:])
        await JSONResponse({})(scope, receive, send)

    async def ask(count: int) -> None:
        transport = httpx.ASGITransport(entry.Tracing(replicas))
        async with httpx.AsyncClient(transport=transport) as client:
            for _ in range(count):
                headers = {"traceparent": f"00-{1:032x}-{PARENT}-01"}
                assert (await client.get("http://x/", headers=headers)).is_success

    for ratio, sampled in ((0.0, range(1)), (1.0, range(20, 21)), (0.5, range(1, 20))):
        provider = TracerProvider(sampler=ParentBasedTraceIdRatio(ratio))
        provider.add_span_processor(SimpleSpanProcessor(spans))
        monkeypatch.setattr(entry, "tracer", provider.get_tracer("test"))
        spans.clear()
        flags.clear()
        asyncio.run(ask(20))
        assert flags.count(b"01") == len(spans.get_finished_spans()) in sampled
        assert {each.name for each in spans.get_finished_spans()} <= {"GET"}


def test_without_a_provider_headers_and_requests_are_untouched() -> None:
    seen: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope["headers"])[b"traceparent"])
        await JSONResponse({})(scope, receive, send)

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(entry.Tracing(app))) as client:
            await client.get("http://x/", headers=traceparent())

    asyncio.run(ask())
    assert seen == [traceparent()["traceparent"].encode()]


def test_opentelemetrys_variables_select_the_exporter_or_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    (processor,) = deployed.exporter()
    assert type(processor).__name__ == "BatchSpanProcessor"
    processor.shutdown()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ValueError, match="must be http/protobuf, got 'grpc'"):
        deployed.exporter()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(ValueError, match="must be otlp or console, got 'zipkin'"):
        deployed.exporter()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    (processor,) = deployed.exporter()
    assert isinstance(processor.span_exporter, ConsoleSpanExporter)  # type: ignore[attr-defined]
    monkeypatch.delenv("OTEL_TRACES_EXPORTER")
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_PROTOCOL")
    monkeypatch.setattr(deployed, "HTTP", "opentelemetry.exporter.absent")
    with pytest.raises(MissingPackageError, match=r"gptj-platform\[tracing\]"):
        deployed.exporter()

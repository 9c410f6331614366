"""OpenTelemetry spans of a completions or chat request: see gptj.serving.tracing."""

from __future__ import annotations

import time

from opentelemetry import trace

from gptj.sampling import SamplingParams
from gptj.serving.completions.generation_request import Usage
from gptj.serving.tracing import tracer


class RequestTrace:
    """Spans of a request to the engine: the whole, and each output's stages.

    Args:
        operation: OpenTelemetry's name: chat or text_completion.
        params: of its first output.
        start: when the request arrived, by time.perf_counter.
    """

    def __init__(
        self, operation: str, model: str, params: SamplingParams, outputs: int, start: float
    ) -> None:
        # Perf counters to nanoseconds since 1970.
        self._epoch = time.time_ns() - int(1e9 * time.perf_counter())
        self._ended = False
        attributes: dict[str, str | int | float] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "gptj",
            "gen_ai.request.model": model,
            "gen_ai.request.choice.count": outputs,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
        }
        self._span = tracer.start_span(
            f"{operation} {model}", attributes=attributes, start_time=self._at(start)
        )

    def output(
        self, index: int, *, start: float, queued: float, first: float, end: float, tokens: int
    ) -> None:
        """Record an output that has ended.

        Args:
            start, first, end: when it was submitted, had its first token, and ended; by
                time.perf_counter.
            queued: seconds until its first step.
        """
        if not self._span.is_recording():
            return
        parent = trace.set_span_in_context(self._span)
        begun = min(start + queued, first)
        stages = (("queue", start, begun), ("prefill", begun, first), ("decode", first, end))
        for name, since, until in stages:
            attributes: dict[str, str | int] = {"gptj.output": index}
            if name == "decode":
                attributes["gen_ai.usage.output_tokens"] = tokens
            stage = tracer.start_span(
                name, parent, attributes=attributes, start_time=self._at(since)
            )
            stage.end(self._at(until))

    def end(self, usage: Usage, reasons: list[str]) -> None:
        """End the request's span, once it has finished or its client has left."""
        if self._ended:
            return
        self._ended = True
        self._span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
        self._span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
        self._span.set_attribute("gen_ai.response.finish_reasons", reasons)
        self._span.end()

    def _at(self, seconds: float) -> int:
        return self._epoch + int(1e9 * seconds)

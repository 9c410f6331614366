"""Streaming load on any `POST /v1/completions`: tokens/s and latencies."""

from __future__ import annotations

import json
import random
import statistics
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class Load:
    url: str
    model: str
    rounds: int  # requests per client
    prompt_tokens: int
    new_tokens: int
    vocabulary: int  # prompts are random ids below this
    headers: dict[str, str] = field(default_factory=dict)

    def run(self, concurrency: int) -> dict[str, Any]:
        """Run `concurrency` clients, each with one request at a time."""
        numbers = random.Random(concurrency)
        prompts = [
            [numbers.randrange(self.vocabulary) for _ in range(self.prompt_tokens)]
            for _ in range(concurrency * self.rounds)
        ]
        measured: list[_Reply] = []
        failures: list[str] = []
        lock = threading.Lock()

        def client() -> None:
            while True:
                with lock:
                    if not prompts:
                        return
                    prompt = prompts.pop()
                try:
                    reply = self._ask(prompt)
                except (OSError, ValueError) as error:  # counted and reported, but not timed
                    with lock:
                        failures.append(repr(error))
                else:
                    with lock:
                        measured.append(reply)

        start = time.perf_counter()
        threads = [threading.Thread(target=client) for _ in range(concurrency)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
        first = [reply.first for reply in measured]
        gaps = [(reply.end - reply.first) / max(reply.tokens - 1, 1) for reply in measured]
        between = [gap for reply in measured for gap in reply.gaps]
        return {
            "concurrency": concurrency,
            "requests": len(measured),
            "failed": len(failures),
            "failures": failures[:3],
            "tokens_per_s": round(sum(reply.tokens for reply in measured) / seconds, 1),
            "ttft_p50_ms": milliseconds(first, 0.5),
            "ttft_p99_ms": milliseconds(first, 0.99),
            "tpot_p50_ms": milliseconds(gaps, 0.5),
            "tpot_p99_ms": milliseconds(gaps, 0.99),
            "gap_p50_ms": milliseconds(between, 0.5),
            "gap_p99_ms": milliseconds(between, 0.99),
        }

    def _ask(self, prompt: list[int]) -> _Reply:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"content-type": "application/json", **self.headers}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        start = time.perf_counter()
        arrived: list[float] = []  # of the events with text
        tokens = 0
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as lines:
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(event["error"])
                if event["choices"]:
                    arrived.append(time.perf_counter() - start)
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
        if not arrived or tokens != self.new_tokens:
            raise ValueError(f"got {tokens} of {self.new_tokens} tokens")
        gaps = [later - earlier for earlier, later in pairwise(arrived)]
        return _Reply(arrived[0], time.perf_counter() - start, tokens, gaps)


@dataclass(frozen=True)
class _Reply:
    first: float  # seconds to the first token
    end: float
    tokens: int
    gaps: list[float]  # seconds between its events; one may have several tokens


def milliseconds(values: list[float], share: float) -> float | None:
    """A percentile of seconds, in ms; 0.5 is the median. None without values."""
    if not values:
        return None
    values = sorted(values)
    if share == 0.5:
        return round(statistics.median(values) * 1e3, 1)
    return round(values[min(len(values) - 1, int(share * len(values)))] * 1e3, 1)

"""Drive `POST /v1/completions` with MLPerf's load generator: settings in, verdict out."""

from __future__ import annotations

import http.client
import json
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

MIN_TOKENS, MAX_TOKENS = 30, 128
REQUEST: Mapping[str, Any] = {
    "use_beam_search": True,
    "best_of": 4,
    "n": 1,
    "length_penalty": 1.0,
    "early_stopping": True,
    "temperature": 0,
    "min_tokens": MIN_TOKENS,
    "max_tokens": MAX_TOKENS,
}
FAILURES = (OSError, http.client.HTTPException, ValueError)  # of a request
TIMEOUT_SECONDS = 600  # as our service's own limit
WARM_UP_REQUESTS = 2

Scenario = Literal["offline", "server"]
Row = dict[str, Any]


@dataclass(frozen=True)
class MLPerf:
    url: str  # of POST /v1/completions
    prompts: Sequence[Sequence[int]]
    samples: int  # at least
    target_qps: float  # samples/s: the server scenario's rate, and the expected offline rate
    min_duration: float  # seconds
    concurrency: int  # requests in flight; others wait in the client, which counts as latency
    folder: Path  # for the load generator's logs and replies.jsonl
    headers: Mapping[str, str]

    def run(self, scenario: Scenario) -> Row:
        """Offline, all samples arrive at once; server, one at a time at random intervals."""
        client = Client(self.url, self.headers)
        for prompt in self.prompts[:WARM_UP_REQUESTS]:
            try:
                client.ask(prompt)
            except FAILURES as error:
                raise RuntimeError(f"{self.url} does not answer: {error}") from error
        settings, changed = self._settings(scenario)
        folder = self.folder / scenario
        folder.mkdir(parents=True, exist_ok=True)
        answers = self._test(client, settings, folder)
        with (folder / "replies.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(answer)) + "\n" for answer in answers)
        return {
            "engine": "gptj",
            "benchmark": "mlperf",
            "scenario": scenario,
            **_measured(read_log(folder), answers),
            "prompt_tokens": round(statistics.mean(map(len, self.prompts)), 1),
            "changed": changed,
            "logs": str(folder),
        }

    def _test(self, client: Client, settings: Any, folder: Path) -> list[Answer]:
        """Run the load generator until all its queries are answered."""
        loadgen = load_generator()
        answers: list[Future[Answer]] = []

        def answer(query: int, sample: int) -> Answer:
            start = time.perf_counter()
            tokens = 0
            try:
                reply = client.ask(self.prompts[sample])
                tokens = reply.tokens
                return Answer(query, sample, time.perf_counter() - start, reply)
            except FAILURES as error:  # counted and reported
                return Answer(query, sample, time.perf_counter() - start, error=repr(error))
            finally:  # otherwise the load generator would hang
                done = loadgen.QuerySampleResponse(query, 0, 0, tokens)
                loadgen.QuerySamplesComplete([done])

        with ThreadPoolExecutor(self.concurrency) as pool:

            def issue(queries: Sequence[Any]) -> None:
                answers.extend(pool.submit(answer, each.id, each.index) for each in queries)

            count = len(self.prompts)
            sut = loadgen.ConstructSUT(issue, lambda: None)
            qsl = loadgen.ConstructQSL(count, count, lambda samples: None, lambda samples: None)
            # An audit.config overrides the settings; by default the one in the current folder.
            audit = str(folder / "audit.config")
            try:
                loadgen.StartTestWithLogSettings(sut, qsl, settings, _log_settings(folder), audit)
            finally:
                loadgen.DestroyQSL(qsl)
                loadgen.DestroySUT(sut)
        return [future.result() for future in answers]

    def _settings(self, scenario: Scenario) -> tuple[Any, Row]:
        """The load generator's settings, and deviations from MLPerf's as [MLPerf's, ours]."""
        loadgen = load_generator()
        settings = loadgen.TestSettings()
        name = scenario.capitalize()
        # Kind 0 is the built-in mlperf.conf; kind 1 would be read only once per process.
        settings.FromConfig("", "gptj", name, 0)
        settings.scenario = getattr(loadgen.TestScenario, name)
        settings.mode = loadgen.TestMode.PerformanceOnly
        rate = "server_target_qps" if scenario == "server" else "offline_expected_qps"
        setattr(settings, rate, self.target_qps)
        changed = {}
        for field, value in (
            ("min_query_count", self.samples),
            ("min_duration_ms", round(self.min_duration * 1000)),
            ("performance_sample_count_override", len(self.prompts)),
        ):
            theirs = getattr(settings, field)
            if theirs != value:
                changed[field] = [theirs, value]
                setattr(settings, field, value)
        return settings, changed


@dataclass(frozen=True)
class Reply:
    text: str
    tokens: int  # of the best beam
    finish_reason: str


@dataclass(frozen=True)
class Answer:
    """The outcome of one query."""

    query: int  # the load generator's id
    sample: int  # index of the prompt
    seconds: float  # excluding the wait in the client
    reply: Reply | None = None
    error: str | None = None


class Client:
    """Sends prompts to `POST /v1/completions`, with MLPerf's settings."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._url = url
        self._headers = {"content-type": "application/json", **headers}

    def ask(self, prompt: Sequence[int]) -> Reply:
        """The best continuation. Retries when a full service says to.

        Raises FAILURES: the first two if there is no reply, ValueError for an invalid one.
        """
        content = json.dumps({**REQUEST, "prompt": list(prompt)}).encode()
        request = urllib.request.Request(self._url, content, self._headers)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as body:
                    return _checked(json.load(body))
            except urllib.error.HTTPError as error:
                wait = error.headers.get("Retry-After") if error.code in (429, 503) else None
                if wait is None or time.monotonic() > deadline:
                    raise ValueError(f"{error.code}: {error.read().decode()[:500]}") from error
                time.sleep(float(wait))


def _checked(body: Mapping[str, Any]) -> Reply:
    (choice,) = body["choices"]
    tokens = body["usage"]["completion_tokens"]
    if not MIN_TOKENS <= tokens <= MAX_TOKENS:
        raise ValueError(f"got {tokens} tokens instead of {MIN_TOKENS} to {MAX_TOKENS}")
    return Reply(choice["text"], tokens, choice["finish_reason"])


def read_log(folder: Path) -> Row:
    """Settings and results from the load generator's log, by name."""
    lines = (folder / "mlperf_log_detail.txt").read_text(encoding="utf-8").splitlines()
    entries = (json.loads(line.removeprefix(":::MLLOG ")) for line in lines)
    return {entry["key"]: entry["value"] for entry in entries}


def _measured(log: Row, answers: Sequence[Answer]) -> Row:
    replies = [answer.reply for answer in answers if answer.reply is not None]
    errors = [answer.error for answer in answers if answer.error is not None]
    rates = ("result_samples_per_second", "result_completed_samples_per_sec")
    samples_per_s: float = log[next((name for name in rates if name in log), rates[0])]
    tokens = sum(reply.tokens for reply in replies) / len(answers)
    conditions = {
        "performance": "result_perf_constraints_met",
        "min_duration": "result_min_duration_met",
        "min_queries": "result_min_queries_met",
        "early_stopping": "early_stopping_met",
    }
    latencies = {
        "latency_mean_ms": "result_mean_latency_ns",
        "latency_p50_ms": "result_50.00_percentile_latency_ns",
        "latency_p90_ms": "result_90.00_percentile_latency_ns",
        "latency_p99_ms": "result_99.00_percentile_latency_ns",
    }
    return {
        # The load generator only counts replies.
        "valid": log["result_validity"] == "VALID" and not errors,
        "verdict": log["result_validity"],
        "met": {name: log[key] for name, key in conditions.items() if key in log},
        "samples": len(answers),
        "failed": len(errors),
        "failures": errors[:3],
        "samples_per_s": samples_per_s,
        "tokens_per_s": round(samples_per_s * tokens, 1),
        "tokens_a_sample": round(tokens, 1),
        **{name: round(log[key] / 1e6, 1) for name, key in latencies.items()},
        "settings": {
            key.removeprefix("effective_"): value
            for key, value in log.items()
            if key.startswith("effective_")
        },
        "loadgen": log["loadgen_version"],
    }


def _log_settings(folder: Path) -> Any:
    settings = load_generator().LogSettings()
    settings.log_output.outdir = str(folder)
    settings.log_output.copy_summary_to_stdout = False
    settings.enable_trace = False
    return settings


def load_generator() -> Any:
    """Import the load generator, which only this benchmark needs."""
    try:
        import mlperf_loadgen
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the mlperf benchmark needs MLPerf's load generator: pip install mlcommons-loadgen"
        ) from error
    return mlperf_loadgen

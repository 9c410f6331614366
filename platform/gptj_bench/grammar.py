"""The cost of constrained output: compiling and masking, by library, and in the engine's steps.

The schemas are schemas.py's. Each library compiles them and follows random outputs with GPT-J's
vocabulary, in CPU time; xgrammar, which the project does not need, is measured if installed.
Then a model decodes batches with no or half of their rows constrained: the difference is
the cost of constraints to the other requests.
"""

from __future__ import annotations

import json
import random
import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gptj import GPTJTokenizer
from gptj.engine.constraints.compiler import JSON_OPTIONS, LIMITS, GrammarCompiler
from gptj.engine.constraints.grammar import Grammar
from gptj.engine.constraints.token_mask import unpacked
from gptj.engine.engine import Engine
from gptj.engine.events import Event, Failed, Finished
from gptj.engine.request import one_by_one
from gptj.engine.runners.base import Runner
from gptj.environment.extras import Extra
from gptj.sampling import SamplingParams
from gptj_bench.machine import installed
from gptj_bench.schemas import SCHEMAS, whole

Row = dict[str, Any]
llguidance = Extra("llguidance", "constrained output")
xgrammar = Extra("xgrammar", "the comparison with it")

WALK_TOKENS = 64  # of each random output
PROMPT = 16  # tokens
# Does not end within a measurement.
ENDLESS = {
    "type": "array",
    "items": whole(name={"type": "string", "maxLength": 12}, age={"type": "integer"}),
    "minItems": 1000,
}


class Library(ABC):
    """A library's compiler, and its matchers as functions."""

    name: str

    @abstractmethod
    def compile(self, schema: str) -> Any:
        """Raises an exception for a schema that is not supported."""

    @abstractmethod
    def matcher(self, compiled: Any) -> tuple[Callable[[], Any], Callable[[int], bool]]:
        """Functions that compute the next mask, in 32-bit words, and accept a token."""


class LLGuidance(Library):
    name = "llguidance"

    def __init__(self, tokenizer: GPTJTokenizer, rows: int) -> None:
        content = tokenizer.files()["tokenizer.json"].decode()
        self._tokenizer = llguidance.LLTokenizer(
            content, n_vocab=rows, eos_token=tokenizer.eos_token_id
        )
        self._words = np.zeros(-(-self._tokenizer.vocab_size // 32), np.uint32)

    def compile(self, schema: str) -> Any:
        text = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def matcher(self, compiled: Any) -> tuple[Callable[[], Any], Callable[[int], bool]]:
        matcher, words = compiled.deep_copy(), self._words

        def fill() -> Any:
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            return words

        def take(token: int) -> bool:
            return bool(matcher.consume_token(token)) and not matcher.is_stopped()

        return fill, take


class XGrammar(Library):
    name = "xgrammar"

    def __init__(self, tokenizer: GPTJTokenizer, rows: int) -> None:
        unused = set(tokenizer.unused_ids)
        tokens = [
            tokenizer.token_bytes(token) if token not in unused and tokenizer.has_id(token) else b""
            for token in range(rows)
        ]
        info = xgrammar.TokenizerInfo(
            tokens,
            vocab_type=xgrammar.VocabType.RAW,
            vocab_size=rows,
            stop_token_ids=[tokenizer.eos_token_id],
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._words = xgrammar.allocate_token_bitmask(1, rows)

    def compile(self, schema: str) -> Any:
        return self._compiler.compile_json_schema(schema)

    def matcher(self, compiled: Any) -> tuple[Callable[[], Any], Callable[[int], bool]]:
        matcher, words = xgrammar.GrammarMatcher(compiled), self._words

        def fill() -> Any:
            matcher.fill_next_token_bitmask(words)
            return words.numpy()[0].view(np.uint32)

        def take(token: int) -> bool:
            return bool(matcher.accept_token(token)) and not matcher.is_terminated()

        return fill, take


def libraries(tokenizer: GPTJTokenizer, rows: int, outputs: int) -> Iterator[Row]:
    """A row per installed library."""
    for kind in (LLGuidance, XGrammar):
        if installed(kind.name) is None:
            continue
        start = time.process_time()
        library = kind(tokenizer, rows)
        ready = time.process_time() - start
        compiling: list[float] = []
        masks: list[float] = []
        refused: list[str] = []
        for name, schema in SCHEMAS.items():
            start = time.process_time()
            try:
                compiled = library.compile(json.dumps(schema))
            except Exception as error:
                refused.append(f"{name}: {error}"[:100])
                continue
            compiling.append(time.process_time() - start)
            for seed in range(outputs):
                masks += _walk(library, compiled, rows, random.Random(seed))
        yield {
            "library": library.name,
            "version": installed(library.name),
            "tokenizer_s": round(ready, 2),
            "schemas": len(compiling),
            "refused": refused,
            **_milliseconds("compile", compiling),
            **_milliseconds("mask", masks),
            "masks": len(masks),
        }


def steps(
    runner: Runner, tokenizer: GPTJTokenizer, batch: int, tokens: int, repeats: int
) -> Iterator[Row]:
    """Milliseconds per step, alternately with all rows free and with half of them constrained."""
    eos = tokenizer.eos_token_id
    assert eos is not None
    compiler = GrammarCompiler(tokenizer, runner.config.vocab_size, [eos])
    engine = Engine(
        runner,
        eos_ids=[eos],
        banned_ids=tokenizer.unused_ids,
        max_num_seqs=batch,
        prefix_caching=False,
    )
    grammar = compiler.compile(Grammar.of_json_schema(ENDLESS))
    free = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=1)
    bound = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=1, grammar=grammar)
    kinds = {
        "free": [free] * batch,
        "half constrained": [free, bound] * (batch // 2),
    }
    try:
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        for repeat in range(repeats + 1):
            for kind, params in kinds.items():
                milliseconds = _decode(engine, params)
                if repeat:  # the first is a warm-up
                    found[kind].append(milliseconds)
        medians = {kind: statistics.median(each) for kind, each in found.items()}
        ratios = [
            bound_ / free_ for free_, bound_ in zip(*found.values(), strict=True)
        ]  # adjacent runs, since a machine's speed varies
        yield {
            "batch": batch,
            **{f"step_ms_{kind.replace(' ', '_')}": round(ms, 3) for kind, ms in medians.items()},
            "cost": round(statistics.median(ratios) - 1, 4),
            "costs": [round(ratio - 1, 3) for ratio in ratios],
            "mask_wait_ms": round(engine.stats().mask_wait_ms / ((repeats + 1) * tokens), 3),
        }
    finally:
        engine.close()
        compiler.close()


class _Caller:
    """Waits for the end of a request."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._error: Exception | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Failed):
            self._error = event.error
        if isinstance(event, Failed | Finished):
            self._ended.set()

    def wait(self) -> None:
        self._ended.wait()
        if self._error is not None:
            raise self._error


def _decode(engine: Engine, params: Sequence[SamplingParams]) -> float:
    """Milliseconds per step."""
    before = engine.stats().steps
    start = time.perf_counter()
    callers = [_Caller() for _ in params]
    for number, (caller, each) in enumerate(zip(callers, params, strict=True)):
        prompt = [(number * 7 + place) % 1000 for place in range(PROMPT)]
        engine.submit(prompt, each, one_by_one(caller))
    for caller in callers:
        caller.wait()
    return 1000 * (time.perf_counter() - start) / (engine.stats().steps - before)


def _walk(library: Library, compiled: Any, rows: int, chooser: random.Random) -> list[float]:
    """Seconds to compute the masks of a random output."""
    fill, take = library.matcher(compiled)
    seconds = []
    for _ in range(WALK_TOKENS):
        start = time.thread_time()
        words = fill()
        seconds.append(time.thread_time() - start)
        allowed = np.flatnonzero(unpacked(words[None], rows)[0])
        if not len(allowed) or not take(int(chooser.choice(allowed))):
            break
    return seconds


def _milliseconds(name: str, seconds: Sequence[float]) -> Row:
    if not seconds:
        return {}
    ordered = sorted(seconds)
    return {
        f"{name}_ms_mean": round(1000 * statistics.mean(ordered), 3),
        f"{name}_ms_p99": round(1000 * ordered[int(0.99 * (len(ordered) - 1))], 3),
        f"{name}_ms_worst": round(1000 * ordered[-1], 3),
    }

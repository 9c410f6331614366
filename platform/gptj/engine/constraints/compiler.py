"""Compiles grammars for a tokenizer, off the engine's thread, and caches the most recent.

Each is first tried in a separate process (process.py); if that crashes or hangs, it is rejected.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from gptj.engine.constraints.grammar import Grammar, GrammarError
from gptj.engine.constraints.trial import Trial
from gptj.extras import Extra
from gptj.tokenizer import GPTJTokenizer
from gptj.workers.errors import ClosedError, QueueFullError

MAX_CACHED = 64  # grammars, compiled or rejected
# Rejected grammars are retried after this: the machine may have been busy or out of memory.
REFUSED_SECONDS = 600.0
MAX_WAITING = 32  # grammars waiting to be compiled
CPU_SECONDS = 3  # to compile one
MASK_SECONDS = 0.05  # CPU time for one token's mask
# Stricter than llguidance's defaults, since a mask delays other requests.
LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_lexer_states": 100_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
# Models not tuned for JSON may generate whitespace forever where it is allowed.
JSON_OPTIONS: dict[str, Any] = {"whitespace_pattern": r"[ \t\r\n]{0,32}", "lenient": False}

llguidance = Extra("llguidance", "constrained output")


class CompiledGrammar:
    """A grammar for one tokenizer; its matchers follow outputs."""

    def __init__(
        self, matcher: Any, words: int, eos_ids: Sequence[int], owner: GrammarCompiler, key: bytes
    ) -> None:
        self.words = words  # 32-bit words in a mask
        self.eos_ids = tuple(eos_ids)  # in the mask where an output may end
        self._matcher = matcher
        self._owner = owner
        self._key = key

    def matcher(self) -> Any:
        """An llguidance.LLMatcher at the start of an output."""
        return self._matcher.deep_copy()

    def forget(self) -> None:
        """Recompile it for the next request, for example if its automaton has grown too large."""
        self._owner.forget(self._key)

    def refuse(self, reason: str) -> None:
        """Reject requests with it for REFUSED_SECONDS."""
        self._owner.refuse(self._key, reason)


class GrammarCompiler:
    """Thread-safe.

    Args:
        rows: of the model's embedding, possibly more than the tokenizer has ids.
        eos_ids: ids that end an output, possibly none.
    """

    def __init__(self, tokenizer: GPTJTokenizer, rows: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._rows = rows
        self._eos_ids = tuple(eos_ids)
        self._lock = threading.Lock()
        self._cache: OrderedDict[bytes, Future[CompiledGrammar]] = OrderedDict()
        self._refused: dict[bytes, float] = {}  # when, by keys of the cache
        self._waiting = 0
        self._closed = False
        self._thread = ThreadPoolExecutor(1, "grammars")  # idle threads end with the interpreter
        self._ready: tuple[Trial, Any] | None = None  # with llguidance's tokenizer

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Wait until it is compiled.

        Raises:
            GrammarError: if it cannot be compiled, is too large, or takes too long.
            QueueFullError, ClosedError, MissingPackageError
        """
        return self.submit(grammar).result()

    def submit(self, grammar: Grammar) -> Future[CompiledGrammar]:
        """Like compile, without waiting. Raises QueueFullError and ClosedError immediately."""
        key = grammar.key
        with self._lock:
            if self._closed:
                raise ClosedError("the grammar compiler was closed")
            if time.monotonic() - self._refused.get(key, math.inf) >= REFUSED_SECONDS:
                self._drop(key)
            known = self._cache.get(key)
            if known is not None:
                self._cache.move_to_end(key)
                return known
            if self._waiting >= MAX_WAITING:
                raise QueueFullError(
                    f"{self._waiting} grammars are waiting to be compiled, which is the limit: "
                    f"try again later"
                )
            self._waiting += 1
            future = self._cache[key] = self._thread.submit(self._compile, grammar, key)
            while len(self._cache) > MAX_CACHED:
                self._drop(next(iter(self._cache)))
        # Outside the lock: a finished future calls back immediately.
        future.add_done_callback(lambda done: self._note(key, done))
        return future

    def forget(self, key: bytes) -> None:
        """Recompile a grammar for the next request."""
        with self._lock:
            self._drop(key)

    def refuse(self, key: bytes, reason: str) -> None:
        """Reject a grammar for REFUSED_SECONDS."""
        refused: Future[CompiledGrammar] = Future()
        refused.set_exception(GrammarError(reason))
        with self._lock:
            self._cache[key] = refused
            self._refused[key] = time.monotonic()

    def knows(self, grammar: Grammar) -> bool:
        """Whether it is already compiled, or being compiled."""
        with self._lock:
            return grammar.key in self._cache

    def close(self) -> None:
        """Reject new grammars, and end the trial process after its current one."""
        with self._lock:
            self._closed = True
        self._thread.shutdown(cancel_futures=True)
        if self._ready is not None:
            self._ready[0].close()

    def _note(self, key: bytes, done: Future[CompiledGrammar]) -> None:
        """Cache rejections for a while; other failures are not the grammar's fault."""
        with self._lock:
            self._waiting -= 1
            if self._cache.get(key) is not done:
                return
            error = None if done.cancelled() else done.exception()
            if isinstance(error, GrammarError):
                self._refused[key] = time.monotonic()
            elif done.cancelled() or error is not None:
                self._drop(key)

    def _drop(self, key: bytes) -> None:
        """Call with the lock held."""
        self._cache.pop(key, None)
        self._refused.pop(key, None)

    def _compile(self, grammar: Grammar, key: bytes) -> CompiledGrammar:
        trial, tokenizer = self._ready = self._ready or self._prepare()
        text = trial.run(grammar)
        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=limits)
        if matcher.is_error():  # although the trial succeeded
            raise GrammarError(f"it cannot be compiled: {matcher.get_error()[:500]}")
        words = -(-tokenizer.vocab_size // 32)
        return CompiledGrammar(matcher, words, self._eos_ids, self, key)

    def _prepare(self) -> tuple[Trial, Any]:
        """Takes a second for GPT-J's vocabulary."""
        rows = max(self._rows, len(self._tokenizer), *(each + 1 for each in self._eos_ids), 0)
        # Without eos, use an id beyond the model's: outputs end only with their grammar.
        eos_ids = list(self._eos_ids) or [rows]
        rows = max(rows, *(each + 1 for each in eos_ids))
        settings = {
            "tokenizer": _text_only(self._tokenizer, rows, eos_ids),
            "n_vocab": rows,
            "eos_ids": eos_ids,
        }
        tokenizer = llguidance.LLTokenizer(
            settings["tokenizer"], n_vocab=settings["n_vocab"], eos_token=settings["eos_ids"]
        )
        trial = Trial(
            {
                **settings,
                "limits": LIMITS,
                "json_options": JSON_OPTIONS,
                "cpu_seconds": CPU_SECONDS,
                "mask_seconds": MASK_SECONDS,
            }
        )
        return trial, tokenizer


def _text_only(tokenizer: GPTJTokenizer, rows: int, eos_ids: Sequence[int]) -> str:
    """A tokenizer.json with ids 0 to rows - 1, and placeholder names for ids without text.

    So `<|endoftext|>` in a grammar is plain text, and no text maps to an id that is never sampled.
    """
    content = json.loads(tokenizer.files()["tokenizer.json"])
    added = {token["content"] for token in content["added_tokens"]}
    text = {
        token: number
        for token, number in content["model"]["vocab"].items()
        if token not in added and number not in eos_ids
    }
    names = {f"<|\ue000{n}|>": n for n in sorted(set(range(rows)).difference(text.values()))}
    content["model"]["vocab"] = text | names
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"] = [
        {"id": number, "content": name, "special": True, **flags} for name, number in names.items()
    ]
    return json.dumps(content)

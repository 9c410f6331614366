"""Compiles grammars for a tokenizer, off the engine's thread, and caches the most recent.

Each is first tried in a separate process (process.py); if that crashes or hangs, it is rejected.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from gptj.engine.constraints.grammar import Grammar, GrammarError
from gptj.engine.constraints.trial import TimeoutGrammarError, Trial
from gptj.environment.extras import Extra, MissingPackageError
from gptj.tokenizer import GPTJTokenizer
from gptj.workers.errors import ClosedError, QueueFullError

logger = logging.getLogger(__name__)

MAX_CACHED = 64  # compiled grammars
MAX_REFUSED = 1024  # remembered rejections
# Rejected grammars are retried after this: the machine may have been busy or out of memory.
REFUSED_SECONDS = 600.0
MAX_WAITING = 32  # grammars waiting to be compiled
MAX_SLOW = 8  # of those that take longer than QUICK_SECONDS
# Of CPU time: usual grammars take milliseconds, an enum of 10,000 texts 0.05 s.
QUICK_SECONDS = 0.15
MAX_KNOWN_SLOW = 4096  # remembered, so that retries take no more time of the quick lane
CPU_SECONDS = 3  # of CPU time, to compile a grammar
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
# Models not tuned for JSON may generate whitespace forever where it is allowed. So between JSON's
# tokens there is what json.dumps writes: nothing, a space, or a new line with its indentation, up
# to five levels by four spaces (ten by two); llama.cpp has the same bound.
JSON_OPTIONS: dict[str, Any] = {
    "whitespace_pattern": r"(?: |\r?\n[ \t]{0,20})?",
    "lenient": False,
}
COMPACT_JSON_OPTIONS: dict[str, Any] = {"whitespace_flexible": False, "lenient": False}

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

    A grammar that takes longer than QUICK_SECONDS moves to a lane of its own, and so delays others
    by no more than that.

    Args:
        rows: of the model's embedding, possibly more than the tokenizer has ids.
        eos_ids: ids that end an output, possibly none.
    """

    def __init__(self, tokenizer: GPTJTokenizer, rows: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._rows = rows
        self._eos_ids = tuple(eos_ids)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[bytes, CompiledGrammar] = OrderedDict()
        # When and why. Apart from the others: refused sources, of which one client may send any
        # number, must not evict good ones.
        self._refused: OrderedDict[bytes, tuple[float, str]] = OrderedDict()
        self._pending: dict[bytes, Future[CompiledGrammar]] = {}
        self._slow: set[bytes] = set()  # of the pending
        self._known_slow: OrderedDict[bytes, None] = OrderedDict()
        self._closed = False
        # Idle threads end with the interpreter.
        self._quick_lane = ThreadPoolExecutor(1, "grammars")
        self._slow_lane = ThreadPoolExecutor(1, "slow grammars")
        self._ready: Ready | None = None

    def prepare(self) -> None:
        """Do what the first grammar would wait for; it takes a second for GPT-J's vocabulary.

        Never fails: without llguidance there is nothing to prepare, and other causes may pass.
        """
        try:
            self._quick_lane.submit(self._prepared).result()
        except MissingPackageError:
            logger.info("llguidance is not installed: requests with a format will be refused")
        except Exception as error:
            logger.warning("the first request with a format will have to wait: %s", error)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Wait until it is compiled.

        Raises:
            GrammarError: if it cannot be compiled, is too large, or takes too long.
            QueueFullError, ClosedError, MissingPackageError
        """
        return self.submit(grammar).result()

    def submit(self, grammar: Grammar) -> Future[CompiledGrammar]:
        """Like compile, without waiting. Raises QueueFullError and ClosedError immediately.

        The future has a QueueFullError if the grammar turns out to be slow, and too many of these
        wait already.
        """
        key = grammar.key
        future: Future[CompiledGrammar] = Future()
        future.set_running_or_notify_cancel()  # others may wait for it too
        with self._lock:
            if self._closed:
                raise ClosedError("the grammar compiler was closed")
            if (refusal := self._refusal(key)) is not None:
                future.set_exception(GrammarError(refusal))
                return future
            if (compiled := self._compiled.get(key)) is not None:
                self._compiled.move_to_end(key)
                future.set_result(compiled)
                return future
            if (pending := self._pending.get(key)) is not None:
                return pending
            if key in self._known_slow:
                if len(self._slow) >= MAX_SLOW:
                    raise _too_many(MAX_SLOW)
                self._pending[key] = future
                self._move(grammar, key)
                return future
            if len(self._pending) - len(self._slow) >= MAX_WAITING:
                raise _too_many(MAX_WAITING)
            self._pending[key] = future
            self._quick_lane.submit(self._try_quickly, grammar, key)
        return future

    def _move(self, grammar: Grammar, key: bytes) -> None:
        """To the slow lane. Call with the lock held."""
        self._slow.add(key)
        self._slow_lane.submit(self._try_slowly, grammar, key)

    def forget(self, key: bytes) -> None:
        """Recompile a grammar for the next request."""
        with self._lock:
            self._compiled.pop(key, None)

    def refuse(self, key: bytes, reason: str) -> None:
        """Reject a grammar for REFUSED_SECONDS."""
        with self._lock:
            self._compiled.pop(key, None)
            self._refused[key] = time.monotonic(), reason
            self._refused.move_to_end(key)
            if len(self._refused) > MAX_REFUSED:
                self._refused.popitem(last=False)

    def knows(self, grammar: Grammar) -> bool:
        """Whether it is already compiled or refused, or being compiled."""
        key = grammar.key
        with self._lock:
            return key in self._compiled or key in self._pending or self._refusal(key) is not None

    def close(self) -> None:
        """Reject new grammars, and end the trial processes after their current ones."""
        with self._lock:
            self._closed = True
        for lane in (self._quick_lane, self._slow_lane):
            lane.shutdown(cancel_futures=True)
        for key in list(self._pending):
            self._finish(key, ClosedError("the grammar compiler was closed"))
        if self._ready is not None:
            self._ready.quick.close()
            self._ready.slow.close()

    def _refusal(self, key: bytes) -> str | None:
        """Why it was refused, if recently. Call with the lock held."""
        when, reason = self._refused.get(key, (-math.inf, ""))
        if time.monotonic() - when < REFUSED_SECONDS:
            return reason
        self._refused.pop(key, None)
        return None

    def _try_quickly(self, grammar: Grammar, key: bytes) -> None:
        """Compile, or move a slow grammar to its lane; on the quick lane's thread."""
        try:
            self._finish(key, self._compile(grammar, key, self._prepared().quick, QUICK_SECONDS))
        except TimeoutGrammarError:
            with self._lock:
                self._known_slow[key] = None
                if len(self._known_slow) > MAX_KNOWN_SLOW:
                    self._known_slow.popitem(last=False)
                moves = len(self._slow) < MAX_SLOW and not self._closed
                if moves:
                    self._move(grammar, key)
            if not moves:
                self._finish(key, _too_many(MAX_SLOW))
        except BaseException as error:  # Rust panics are not Exceptions
            self._finish(key, error)

    def _try_slowly(self, grammar: Grammar, key: bytes) -> None:
        """On the slow lane's thread."""
        try:
            self._finish(key, self._compile(grammar, key, self._prepared().slow, CPU_SECONDS))
        except BaseException as error:  # Rust panics are not Exceptions
            self._finish(key, error)

    def _finish(self, key: bytes, result: CompiledGrammar | BaseException) -> None:
        """Report a result. Rejections are remembered; others are not the grammar's fault."""
        if isinstance(result, GrammarError):
            self.refuse(key, str(result))
        with self._lock:
            future = self._pending.pop(key)
            self._slow.discard(key)
            if isinstance(result, CompiledGrammar):
                self._compiled[key] = result
                if len(self._compiled) > MAX_CACHED:
                    self._compiled.popitem(last=False)
        # Outside the lock: callbacks run immediately.
        if isinstance(result, CompiledGrammar):
            future.set_result(result)
        else:
            future.set_exception(result)

    def _compile(
        self, grammar: Grammar, key: bytes, trial: Trial, cpu_seconds: float
    ) -> CompiledGrammar:
        text = trial.run(grammar, cpu_seconds)
        tokenizer = self._prepared().tokenizer
        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=limits)
        if matcher.is_error():  # although the trial succeeded
            raise GrammarError(f"it cannot be compiled: {matcher.get_error()[:500]}")
        words = -(-tokenizer.vocab_size // 32)
        return CompiledGrammar(matcher, words, self._eos_ids, self, key)

    def _prepared(self) -> Ready:
        """First called on the quick lane's thread."""
        if self._ready is not None:
            return self._ready
        ends = (each + 1 for each in self._eos_ids)
        rows = max(self._rows, self._tokenizer.rows_needed, *ends)
        # Without eos, use an id beyond the model's: outputs end only with their grammar.
        eos_ids = list(self._eos_ids) or [rows]
        rows = max(rows, *(each + 1 for each in eos_ids))
        content = _text_only(self._tokenizer, rows, eos_ids)
        tokenizer = llguidance.LLTokenizer(content, n_vocab=rows, eos_token=eos_ids)
        settings = {
            "tokenizer": content,
            "n_vocab": rows,
            "eos_ids": eos_ids,
            "limits": LIMITS,
            "json_options": JSON_OPTIONS,
            "compact_json_options": COMPACT_JSON_OPTIONS,
            "mask_seconds": MASK_SECONDS,
        }
        ready = Ready(tokenizer, Trial(settings), Trial(settings))
        ready.quick.start()
        self._ready = ready
        return ready


@dataclass(frozen=True)
class Ready:
    """What compiling needs: llguidance's tokenizer, and each lane's process."""

    tokenizer: Any
    quick: Trial
    slow: Trial  # started when needed


def _too_many(count: int) -> QueueFullError:
    return QueueFullError(
        f"{count} grammars are waiting to be compiled, which is the limit: try again later"
    )


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

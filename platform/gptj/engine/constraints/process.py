"""A program that tries grammars in a separate process, which its parent can kill.

The compiler is a Rust library: some inputs overflow its stack or keep it busy for hours. So each
is tried in a fork, which is cheap to lose. The protocol is one JSON object per line: first the
settings in, `{}` out; then for each grammar in, llguidance's form of it, an error, that its time
is up, or the fork's exit status out. A grammar passes if it compiles within limits on stack, memory
and time, and masks of some random outputs are fast.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import signal
import sys
import threading
import time
from typing import Any

import llguidance

STACK = 2**20  # bytes; the parent's threads have more
MEMORY = 2 * 2**30  # bytes of address space besides the tokenizer's
OUTPUTS, TOKENS = 3, 16  # number of random outputs to compute masks for, and tokens of each


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    tokenizer = llguidance.LLTokenizer(
        setup["tokenizer"], n_vocab=setup["n_vocab"], eos_token=setup["eos_ids"]
    )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory()
    threading.stack_size(STACK)
    print("{}", flush=True)
    for line in sys.stdin:
        reply = _in_fork(tokenizer, setup, json.loads(line))
        print(json.dumps(reply), flush=True)


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, most))


def _in_fork(tokenizer: Any, setup: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # The parent's parent must see the end of these when the parent dies.
        os.close(0)
        os.close(1)
        # Counts CPU time, and ends the process even if nobody kills it.
        signal.setitimer(signal.ITIMER_PROF, task["cpu_seconds"])
        reply: dict[str, Any] = {}
        thread = threading.Thread(target=_try, args=(tokenizer, setup, task, reply))
        thread.start()
        thread.join()
        with open(writer, "w") as file:
            json.dump(reply, file)
        os._exit(0)
    os.close(writer)
    killed = False
    with open(reader) as file:
        if not select.select([file], [], [], task["seconds"])[0]:
            os.kill(child, signal.SIGKILL)
            killed = True
        content = file.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if killed or code == -signal.SIGPROF:
        return {"timeout": True}
    return {"status": code} if code else json.loads(content)


def _try(
    tokenizer: Any, setup: dict[str, Any], task: dict[str, Any], reply: dict[str, Any]
) -> None:
    try:
        options = setup["compact_json_options" if task["compact"] else "json_options"]
        grammar = _grammar(task["kind"], task["source"], options)
        limits = llguidance.LLParserLimits(**setup["limits"])
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        error = matcher.get_error() or _probe(matcher, setup["mask_seconds"])
    # Rust panics are BaseExceptions, and converting a grammar may raise anything.
    except BaseException as caught:
        error = f"{type(caught).__name__}: {caught}"
    if error:
        reply["error"] = error
    else:
        reply["grammar"] = grammar


def _grammar(kind: str, source: str, json_options: Any) -> str:
    if kind == "json":
        return llguidance.LLMatcher.grammar_from_json_schema(source, overrides=json_options)
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(source)
    return llguidance.grammar_from("grammar", source)


def _probe(matcher: Any, mask_seconds: float) -> str:
    """An error if masks of random outputs take too long or cannot be computed."""
    for seed in range(OUTPUTS):
        chooser = random.Random(seed)
        trial = matcher.deep_copy()
        for _ in range(TOKENS):
            start = time.thread_time()
            mask = int.from_bytes(trial.compute_bitmask(), "little")
            seconds = time.thread_time() - start
            if trial.is_error() or not mask:
                return trial.get_error() or "it allows no output"
            if seconds > mask_seconds:
                return (
                    f"one token took {seconds:.2f} seconds, but {mask_seconds} are allowed: "
                    f"simplify it, or lower its counts"
                )
            place = chooser.randrange(mask.bit_length())
            above = mask >> place
            if not trial.consume_token(place + (above & -above).bit_length() - 1):
                break
            if trial.is_stopped():
                break
    return ""


if __name__ == "__main__":
    main()

"""A process that tries grammars: started when needed, killed when it hangs."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptj.engine.constraints.grammar import Grammar, GrammarError

PROGRAM = Path(__file__).with_name("process.py")
START_SECONDS = 60  # to import the library and read the tokenizer, on a busy machine
WALL_SECONDS = 20  # for one grammar; far above its CPU limit, for busy machines
# How a process ends that overflows its stack, or has no more memory. By anything else, such as the
# system's SIGKILL for lack of memory, the grammar is not to blame.
CRASHES = frozenset(
    -each for each in (signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGSEGV, signal.SIGTRAP)
)
MAX_ERROR = 500  # characters
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR")


class TimeoutGrammarError(GrammarError):
    """A grammar takes more than the allowed time to compile."""


class Trial:
    """Tries one grammar at a time; not thread-safe.

    Args:
        settings: process.py's.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._ending: Any = None  # finalizer that ends the process
        self._unread = b""

    def start(self) -> None:
        """Start the process, which `run` does otherwise. Raises RuntimeError."""
        if self._process is None:
            self._start()

    def run(self, grammar: Grammar, cpu_seconds: float) -> str:
        """The grammar in llguidance's form, ready to compile.

        Raises GrammarError, TimeoutGrammarError if it takes more CPU time, or WALL_SECONDS, and
        RuntimeError if something else ended the try.
        """
        if self._process is not None and self._process.poll() is not None:
            self._kill()  # it was killed from outside
        process = self._process or self._start()
        task = {
            "kind": grammar.kind,
            "source": grammar.source,
            "compact": grammar.compact,
            "cpu_seconds": cpu_seconds,
            "seconds": WALL_SECONDS,
        }
        reply = self._ask(process, task, WALL_SECONDS + START_SECONDS)
        if reply is None:
            status = self._kill()
            raise RuntimeError(f"the process that compiles grammars has ended: status {status}")
        if "timeout" in reply:
            raise TimeoutGrammarError(
                f"it takes more than {cpu_seconds} seconds to compile: simplify it"
            )
        if reply.get("status", 0) not in (0, *CRASHES):
            raise RuntimeError(f"compiling a grammar ended with status {reply['status']}")
        if "status" in reply:
            raise GrammarError("it is nested too deeply, or too large, to be compiled: simplify it")
        if "error" in reply:
            raise GrammarError(f"it cannot be compiled: {_readable(reply['error'])}")
        return str(reply["grammar"])

    def close(self) -> None:
        if self._process is not None:
            self._kill()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        # -P: do not import modules from the program's own folder.
        process = subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._process, self._unread = process, b""
        self._ending = weakref.finalize(self, _end, process)
        if self._ask(process, self._settings, START_SECONDS) is None:
            status = self._kill()
            raise RuntimeError(f"the process that compiles grammars did not start: status {status}")
        return process

    def _ask(
        self, process: subprocess.Popen[bytes], task: dict[str, Any], seconds: float
    ) -> dict[str, Any] | None:
        """The reply, or None if there is none in time."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return None
            part = os.read(process.stdout.fileno(), 2**16)
            if not part:
                process.wait()
                return None
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _kill(self) -> int:
        self._process = None
        status: int = self._ending()
        return status


def _end(process: subprocess.Popen[bytes]) -> int:
    """Kill the process; returns its exit status."""
    process.kill()
    status = process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # closing flushes unwritten data
                pipe.close()
    return status


def _readable(error: str) -> str:
    """The library's error without its parser's state, truncated."""
    error = error.partition("<state>")[0].replace("<non-verbose/>", "").strip()
    if error.startswith("NoExtension"):
        return "it allows no output"
    if "coerce_one_of" in error:  # an option of the library
        return (
            "it has a oneOf whose branches may be valid at the same time: use anyOf, or a required "
            "property with a different const in each branch"
        )
    return error if len(error) <= MAX_ERROR else error[:MAX_ERROR] + "…"

"""Another engine in a process of its own environment, which measures when it is told to."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

SCRIPT = Path(__file__).parent / "peers" / "decode.py"
SECONDS = 1800.0  # to load, or for one measurement


class PeerError(Exception):
    """Another engine could not be measured."""


class Peer:
    """See peers/decode.py.

    Raises:
        PeerError: it does not start, or ends.
    """

    def __init__(self, python: Path, engine: str, dtype: str, options: list[str]) -> None:
        self.engine, self.dtype = engine, dtype
        self._command = [str(python), str(SCRIPT), engine, *options, f"--dtype={dtype}"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self._answer(lambda: None)
        except PeerError:
            self.close()
            raise

    @property
    def processes(self) -> list[int]:
        return [self._process.pid]

    def measure(self, batch: int) -> dict[str, Any]:
        def ask() -> None:
            assert self._process.stdin is not None
            self._process.stdin.write(f"{batch}\n")
            self._process.stdin.flush()

        return self._answer(ask)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):  # closing flushes what it has not read
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()

    def _answer(self, ask: Callable[[], None]) -> dict[str, Any]:
        """The next JSON object it prints; engines print other lines besides."""
        assert self._process.stdout is not None
        alarm = threading.Timer(SECONDS, self._process.kill)
        alarm.start()
        try:
            ask()
            for line in self._process.stdout:
                if line.startswith("{"):
                    return cast("dict[str, Any]", json.loads(line))
        except BrokenPipeError:
            pass  # it has ended, see below
        finally:
            alarm.cancel()
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")[-3000:]
        raise PeerError(f"{' '.join(self._command)} ended:\n{said}")

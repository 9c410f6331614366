"""Stops a training early and resumably: if its job is told to stop, or Ray preempts a node.

The driver tells the workers through an actor, and each worker learns of it before its next step.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.train.v2._internal.execution.context import get_train_context

logger = logging.getLogger(__name__)

STOPPED = 128 + signal.SIGTERM  # the exit status of a program ended by SIGTERM
PREEMPTED = "Ray is about to preempt a node"


class OnSigterm:
    """During a `with` block in the driver, SIGTERM asks the workers to save and stop.

    A second one ends the driver at once. Use it in the main thread, after ray.init, whose own
    handler ends the driver.
    """

    def __init__(self, stop_signal: ActorHandle[Any]) -> None:
        self.stop_signal = stop_signal
        self._asked = False

    def __enter__(self) -> OnSigterm:
        self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            sys.exit(STOPPED)
        self._asked = True
        print("SIGTERM: the training ends after this step, with a checkpoint", flush=True)
        self.stop_signal.send.remote("the job was told to stop (SIGTERM)")


class Notices:
    """In a worker: the reason to stop, if any."""

    def __init__(self, stop_signal: ActorHandle[Any]) -> None:
        self._context = get_train_context()
        self._asked: str | None = None
        self._stop_signal = stop_signal
        threading.Thread(target=self._listen, name="stop-signal", daemon=True).start()

    def reason(self) -> str | None:
        """The driver's reason; else PREEMPTED, if Ray has announced a node's preemption."""
        if self._asked is None and self._context.preemption_context.preemption_info is not None:
            return PREEMPTED
        return self._asked

    def _listen(self) -> None:
        try:
            self._asked = str(ray.get(self._stop_signal.wait.remote()))
        except RayError as error:  # the driver has ended, or is about to
            logger.debug("no stop request can arrive any more: %s", error)

"""Numbers a submission's attempts: each of Ray Train's groups of workers is one."""

from __future__ import annotations

import os
from typing import Any

from ray.train.v2._internal.execution.callback import WorkerGroupCallback

_VARIABLE = "GPTJ_ATTEMPT"


class NumberAttempts(WorkerGroupCallback):
    """In Ray Train's controller: tells each group's workers its number, before they train.

    Workers that Ray has given up may be slow to start, or to end. Only the controller knows the
    order in which it started them.
    """

    def __init__(self) -> None:
        self._started = 0

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._started += 1
        worker_group.execute(_remember, self._started)


def this_attempt() -> int:
    """In a worker: its group's number, from 1."""
    return int(os.environ[_VARIABLE])


def _remember(number: int) -> None:
    os.environ[_VARIABLE] = str(number)

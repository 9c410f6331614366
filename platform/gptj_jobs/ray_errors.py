"""Ray's errors, in one line each."""

from __future__ import annotations

from ray.exceptions import RayActorError, RayError, RayTaskError


def reason(error: RayError) -> str:
    """The line that says what went wrong.

    It is the last, after the traceback, if a task or an actor's constructor failed, else the first.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    ours = isinstance(error, RayTaskError) or (
        isinstance(error, RayActorError) and error.actor_init_failed
    )
    return lines[-1] if ours else lines[0]

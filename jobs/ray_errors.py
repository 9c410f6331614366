"""What Ray raises, in one line."""

from __future__ import annotations

from ray.exceptions import RayActorError, RayError, RayTaskError


def reason(error: RayError) -> str:
    """Of an error in a task or an actor's constructor the last line, after the traceback.

    Of others the first one.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    ours = isinstance(error, RayTaskError) or (
        isinstance(error, RayActorError) and error.actor_init_failed
    )
    return lines[-1] if ours else lines[0]

"""What Ray raises, in one line."""

from __future__ import annotations

from ray.exceptions import RayError, RayTaskError


def reason(error: RayError) -> str:
    """Of a task's own error its last line, after the traceback; of others the first one."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if isinstance(error, RayTaskError) else lines[0]

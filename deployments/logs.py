"""Our log in Serve's: in its files and form, with the request's id.

`logging_config: {encoding: JSON}` in serve.yaml, or RAY_SERVE_LOG_ENCODING=JSON where Ray starts,
makes every line of Serve's files a JSON object.
"""

from __future__ import annotations

import logging

SERVE = logging.getLogger("ray.serve")
OURS = ("gptj", "deployments")


class ToServe(logging.Handler):
    """Passes records to Serve's handlers, which Serve may replace at any time."""

    def emit(self, record: logging.LogRecord) -> None:
        if SERVE.isEnabledFor(record.levelno):
            SERVE.handle(record)


def follow_serve() -> None:
    """In a process of Serve's: write what our loggers say to Serve's log."""
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = [ToServe()]
        logger.propagate = False
        logger.setLevel(logging.INFO)

"""Writes our logs to Serve's: in its files and format, with the request's id.

`logging_config: {encoding: JSON}` in serve.yaml makes every line of Serve's files a JSON object.
"""

from __future__ import annotations

import logging

import ray

SERVE = logging.getLogger("ray.serve")
OURS = ("gptj", "deployments")


class ToServe(logging.Handler):
    """Passes records to Serve's handlers, which Serve may replace at any time."""

    def emit(self, record: logging.LogRecord) -> None:
        if SERVE.isEnabledFor(record.levelno):
            SERVE.handle(record)


def follow_serve() -> None:
    """In a cluster's process, pass our loggers' records to Serve's log."""
    if not ray.is_initialized():  # a process that only builds an application has its own log
        return
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = [ToServe()]
        logger.propagate = False
        logger.setLevel(logging.INFO)

"""Our log in Serve's: in its files and form, with the request's id.

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
    """In a process of a cluster: write what our loggers say to Serve's log."""
    if not ray.is_initialized():  # whoever builds an application here has a log of his own
        return
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = [ToServe()]
        logger.propagate = False
        logger.setLevel(logging.INFO)

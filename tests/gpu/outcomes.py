"""A pytest plugin: each test's outcome, and failures as results, as soon as the test has ended.

So a run that is stopped loses nothing. Tests run in the order of the files on the command line.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from results import Results, Row

OUTCOMES = "GPTJ_CHECK_OUTCOMES"  # a file: a line for each test
RESULTS = "GPTJ_CHECK_RESULTS"  # where results are added to
PART = "GPTJ_CHECK_PART"
MAX_FAILURES = 40  # that are results


def pytest_configure(config: pytest.Config) -> None:
    # Workers of xdist report to the process that started them.
    if OUTCOMES in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Recorder())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The most important first: time may end."""
    order = {Path(path).name: place for place, path in enumerate(config.args)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


class Recorder:
    """Writes the outcomes down."""

    def __init__(self) -> None:
        self._results = Results(Path(os.environ[RESULTS]), os.environ[PART])
        self._failures = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            outcome = "error" if report.when in ("setup", "teardown") else "failed"
        elif report.skipped:
            outcome = "skipped"
        elif report.when == "call":
            outcome = "passed"
        else:
            return
        self._add(outcome, report, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add("error", report, 0.0)

    def _add(
        self, outcome: str, report: pytest.TestReport | pytest.CollectReport, seconds: float
    ) -> None:
        row: Row = {"test": report.nodeid, "outcome": outcome, "seconds": round(seconds, 3)}
        if report.failed:
            row["message"] = _message(report)
            self._failures += 1
            if self._failures <= MAX_FAILURES:
                self._results.add(
                    "failed test", test=report.nodeid, message=row["message"], right=False
                )
        with open(os.environ[OUTCOMES], "a") as file:
            file.write(json.dumps(row) + "\n")


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """What was raised and where, without the lines around it."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return str(report.longrepr)[-400:]
    return f"{Path(crash.path).name}:{crash.lineno}: {crash.message}"[:400]

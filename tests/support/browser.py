"""Debian's Chromium, and a page in it that tells what must never happen.

Not in conftest.py: Playwright's loop runs in the main thread while its browser does, and there
asyncio.run would fail in other modules' tests. A module that uses them says
`pytest_plugins = ["browser"]`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

DESKTOP = {"width": 1000, "height": 900}


@dataclass
class Watched:
    """What a page does that tests do not ask for."""

    hosts: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)  # of scripts and of the policy
    refused: set[str] = field(default_factory=set)  # why requests have failed

    def console(self, message: ConsoleMessage) -> None:
        if message.type not in ("error", "warning"):
            return
        refused = re.match(r"Failed to load .*(status of \d+|net::\w+)", message.text)
        if refused:
            self.refused.add(refused[1].removeprefix("status of "))
        else:
            self.errors.append(message.text)


def chromium() -> str:
    """The program's path."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no Chromium here: Debian's package `chromium` has it")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as playwright:
        # Root cannot have Chromium's sandbox; the only pages are ours.
        browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=False)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, service: str) -> Iterator[Callable[..., Page]]:
    """Opens an address, or a path of the service, in a profile of its own.

    The page is watched until the test ends: nothing else than what `refused` names may fail
    ("401", "net::ERR_CONNECTION_REFUSED"). `before` gets the page before it has loaded anything.
    """
    with ExitStack() as stack:

        def open_page(
            path: str = "/",
            refused: Container[str] = (),
            before: Callable[[Page], None] | None = None,
            **options: Any,
        ) -> Page:
            address = urljoin(service, path)
            context = browser.new_context(**{"viewport": DESKTOP, **options})
            stack.callback(context.close)
            context.set_default_timeout(20_000)
            watched = Watched()
            stack.callback(_check, watched, urlsplit(address).netloc, refused)
            page = context.new_page()
            page.on("request", lambda each: watched.hosts.add(urlsplit(each.url).netloc))
            page.on("pageerror", lambda error: watched.errors.append(str(error)))
            page.on("console", watched.console)
            if before is not None:
                before(page)
            page.goto(address)
            return page

        yield open_page


def _check(watched: Watched, host: str, refused: Container[str]) -> None:
    assert watched.errors == []
    assert [each for each in watched.refused if each not in refused] == []
    assert watched.hosts <= {host}, "no request leaves for another host"

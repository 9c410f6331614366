"""Commands of the README and other pages, as a reader copies them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = "README.md"


def section(title: str, page: str = README) -> str:
    """What is under a heading of the second level."""
    text = (ROOT / page).read_text()
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found is not None, f"{page} has no section {title!r}"
    return found[1]


def blocks(title: str, language: str, page: str = README) -> list[str]:
    """The fenced blocks of a section, in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", section(title, page), re.M | re.S)


def commands(title: str, page: str = README) -> list[str]:
    """The lines of a section's shell blocks, without their comments."""
    lines = "".join(blocks(title, "sh", page)).splitlines()
    return [line.partition("  #")[0].strip() for line in lines]

"""The README's commands, as a reader copies them."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def section(title: str) -> str:
    """What is under a heading of the second level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## )", README.read_text(), re.M | re.S)
    assert found is not None, f"the README has no section {title!r}"
    return found[1]


def blocks(title: str, language: str) -> list[str]:
    """The fenced blocks of a section, in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", section(title), re.M | re.S)


def commands(title: str) -> list[str]:
    """The lines of a section's shell blocks, without their comments."""
    lines = "".join(blocks(title, "sh")).splitlines()
    return [line.partition("  #")[0].strip() for line in lines]

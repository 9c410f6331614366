"""What can be wrong with a chat template."""

from __future__ import annotations


class ChatTemplateError(ValueError):
    """A template that cannot be read, or that refuses a chat; the message has the reason."""

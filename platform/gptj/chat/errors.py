"""Errors of chat templates."""

from __future__ import annotations


class ChatTemplateError(ValueError):
    """A template cannot be read, or rejects a chat; the message says why."""


class SlowTemplateError(ChatTemplateError):
    """A template takes more time for a chat than it was given."""

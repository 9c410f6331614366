"""Checkpoint errors; for storage see gptj.storage.errors."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint is damaged or does not fit; the message names the file and the reason."""


class NoTokenizerError(FileNotFoundError):
    """The folder has no tokenizer."""

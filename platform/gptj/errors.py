"""Errors of checkpoints. Those of storage are in gptj.storage.errors."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that is damaged or does not fit; the message names the file and the reason."""


class NoTokenizerError(FileNotFoundError):
    """A folder that has no tokenizer."""

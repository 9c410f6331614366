"""A tokenizer whose ids have a gap, as some published ones do: its size is not its largest id."""

from __future__ import annotations

import json

from tokenizers import Tokenizer

from gptj import GPTJTokenizer

MOVED = "z"  # the entry with the largest id


def gapped(tokenizer: GPTJTokenizer, number: int) -> GPTJTokenizer:
    """The tokenizer with another id, `number`, for the letter z."""
    content = json.loads(tokenizer.files()["tokenizer.json"])
    content["model"]["vocab"][MOVED] = number
    return GPTJTokenizer(Tokenizer.from_str(json.dumps(content)), pad_token=tokenizer.pad_token)

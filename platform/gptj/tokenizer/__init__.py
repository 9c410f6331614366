"""Text to token ids and back: GPT-2's byte-level BPE with GPT-J's 50400 entries."""

from gptj.errors import NoTokenizerError
from gptj.tokenizer.bpe import END_OF_TEXT, EXTRA_TOKENS
from gptj.tokenizer.inputs import Padding, Side, Truncation
from gptj.tokenizer.rows import Encoded
from gptj.tokenizer.tokenizer import GPTJTokenizer

__all__ = [
    "END_OF_TEXT",
    "EXTRA_TOKENS",
    "Encoded",
    "GPTJTokenizer",
    "NoTokenizerError",
    "Padding",
    "Side",
    "Truncation",
]

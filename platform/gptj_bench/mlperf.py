"""MLPerf's GPT-J over HTTP: `python -m gptj_bench mlperf`.

Settings follow MLPerf Inference's GPT-J (github.com/mlcommons/inference: language/gpt-j, and the
load generator's built-in mlperf.conf): 4 beams, 30 to 128 new tokens, prompts of at most 1919
tokens, and in the server scenario 99 % of the replies within 20 seconds. Results list deviations.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from gptj import GPTJConfig, GPTJTokenizer
from gptj.data.sources import read_rows
from gptj_bench.decode import DTYPES, TEXT_IDS, split_dtype
from gptj_bench.loadgen import MAX_TOKENS, MLPerf, Row, Scenario, load_generator
from gptj_bench.serve import ours
from gptj_jobs import command_line

MAX_PROMPT_TOKENS = 1919


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=command_line.address, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--url", help="a running service, such as http://host:8000")
    parser.add_argument("--scenario", default="both", choices=["offline", "server", "both"])
    parser.add_argument(
        "--prompts",
        type=command_line.data_address,
        help="a data set with the column text; default: random ids",
    )
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of random prompts")
    parser.add_argument("--samples", type=int, default=24, help="minimum; MLPerf uses 13368")
    parser.add_argument("--min-duration", type=float, default=10, help="seconds; MLPerf uses 600")
    parser.add_argument("--target-qps", type=float, default=1, help="samples per second")
    parser.add_argument("--concurrency", type=int, default=32, help="requests in flight")
    parser.add_argument("--logs", type=command_line.folder, default=Path("outputs/mlperf"))


def measure(given: argparse.Namespace) -> Iterator[Row]:
    """One measurement per scenario. ValueError for invalid arguments."""
    load_generator()
    for name in ("samples", "concurrency", "target_qps"):
        if not getattr(given, name) > 0:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be above 0, got {getattr(given, name)}")
    prompts = _prompts(given)
    headers = {}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    dtype, quantization = split_dtype(given.dtype)
    arguments = {"dtype": dtype, "quantization": quantization}
    with tempfile.TemporaryDirectory(prefix="gptj-benchmark-") as folder:
        service: AbstractContextManager[str] = ours(given.model, arguments, Path(folder))
        if given.url:
            service = nullcontext(given.url.rstrip("/"))
        with service as address:
            benchmark = MLPerf(
                f"{address}/v1/completions",
                prompts,
                given.samples,
                given.target_qps,
                given.min_duration,
                given.concurrency,
                given.logs,
                headers,
            )
            scenarios: Sequence[Scenario] = ("offline", "server")
            for scenario in scenarios:
                if given.scenario in (scenario, "both"):
                    yield {"dtype": None if given.url else given.dtype, **benchmark.run(scenario)}


def _prompts(given: argparse.Namespace) -> list[list[int]]:
    """Token ids: of texts, truncated as in MLPerf, or random."""
    config = GPTJConfig.from_pretrained(given.model)
    limit = min(MAX_PROMPT_TOKENS, config.n_positions - MAX_TOKENS)
    if given.prompts:
        tokenizer = GPTJTokenizer.from_pretrained(given.model)
        rows = itertools.islice(read_rows(given.prompts, ["text"]), given.samples)
        return [tokenizer.encode(row.text("text"))[:limit] for row in rows]
    if not 1 <= given.prompt_tokens <= limit:
        raise ValueError(
            f"--prompt-tokens must be in [1, {limit}], so that {MAX_TOKENS} more fit into the "
            f"model's context of {config.n_positions}, got {given.prompt_tokens}"
        )
    numbers = random.Random(0)
    below = min(TEXT_IDS, config.vocab_size)
    return [
        [numbers.randrange(below) for _ in range(given.prompt_tokens)] for _ in range(given.samples)
    ]

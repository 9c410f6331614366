"""Outputs of fifty schemas by a random model with GPT-J's vocabulary: all are valid.

Two of each schema, and ten, which are 500, at night.
"""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import torch
from engine_caller import submit_many

from gptj import GPTJConfig, GPTJForCausalLM
from gptj.engine.constraints.compiler import GrammarCompiler
from gptj.engine.constraints.grammar import Grammar
from gptj.engine.engine import Engine
from gptj.engine.events import Finished, TokenEvent
from gptj.engine.runners.torch_runner import TorchRunner
from gptj_bench.schemas import SCHEMAS
from gptj_bench.vocabulary import gpt2_tokenizer

pytestmark = pytest.mark.slow

TOKENS = 1000
# A grammar has a date's form, but 29 February in any year; jsonschema's `time` is not RFC 3339's,
# and its `date-time` needs another package.
FORMATS = ("uuid", "ipv4", "email")
SECONDS = 400  # for all of them, on a busy machine


@pytest.mark.parametrize("outputs", [2, pytest.param(10, marks=pytest.mark.nightly)])
def test_every_output_of_fifty_schemas_is_valid(outputs: int) -> None:
    assert len(SCHEMAS) == 50
    tokenizer = gpt2_tokenizer()
    model = random_model()
    engine = Engine(
        TorchRunner(model, 4096), eos_ids=[50256], banned_ids=tokenizer.unused_ids, max_num_seqs=64
    )
    compiler = GrammarCompiler(tokenizer, model.config.vocab_size, [50256])
    try:
        grammars = {
            name: compiler.compile(Grammar.of_json_schema(schema))
            for name, schema in SCHEMAS.items()
        }
        callers = {
            name: submit_many(
                engine,
                tokenizer.encode(name),
                *(
                    {**_params(seed), "grammar": grammar, "max_tokens": TOKENS}
                    for seed in range(outputs)
                ),
            )
            for name, grammar in grammars.items()
        }
        checked = 0
        for name, each in callers.items():
            for caller in each:
                assert caller.ended.wait(SECONDS)
                *tokens, last = caller.events
                assert isinstance(last, Finished) and last.reason == "stop", (name, last)
                ids = [event.token_id for event in tokens if isinstance(event, TokenEvent)]
                text = b"".join(map(tokenizer.token_bytes, ids)).decode()
                jsonschema.validate(
                    json.loads(text),
                    SCHEMAS[name],
                    format_checker=jsonschema.FormatChecker(FORMATS),
                    cls=jsonschema.Draft202012Validator,
                )
                checked += 1
        assert checked == 50 * outputs
    finally:
        engine.close()
        compiler.close()


def _params(seed: int) -> dict[str, Any]:
    """Drawing from 50,400 tokens takes long: most outputs differ by what they are kept from."""
    if seed % 5 == 0:
        return {"temperature": 1.0, "seed": seed}
    bias = {(seed * 7919 + 613 * n) % 50000: 20.0 * (n % 3 - 1) for n in range(100)}
    return {"frequency_penalty": 2.0, "presence_penalty": 2.0, "logit_bias": bias}


def random_model() -> GPTJForCausalLM:
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=50400,
        n_positions=1024,
        n_embd=16,
        n_layer=1,
        n_head=2,
        rotary_dim=4,
        initializer_range=0.3,
    )
    return GPTJForCausalLM(config).eval()

"""What the engine's number formats cost: perplexity of a trained model, in each of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from plain_operations import PlainOperations

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj.data.causal_lm import CausalLMData
from gptj.data.sources import read_rows
from gptj.engine.engine import Engine
from gptj.engine.runners.cpu import library
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.quantization.quantizer import Calibration, quantize_model
from gptj.training.evaluation import evaluate
from gptj.training.tasks import TASKS
from gptj_bench.__main__ import main
from gptj_bench.perplexity import score

pytestmark = pytest.mark.slow

TRAIN, TEXT = "sample://documentation", "sample://documentation/evaluation"
STEPS = 120


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, CausalLMData]:
    """A small model that has learned our sample text, saved; and other text to measure with."""
    folder = str(tmp_path_factory.mktemp("trained") / "model")
    rows = list(read_rows(TRAIN, ["text"]))
    tokenizer = GPTJTokenizer.train([row.text("text") for row in rows], vocab_size=512)
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=128,
        n_layer=2,
        n_head=4,
        rotary_dim=16,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPTJForCausalLM(config)
    data = CausalLMData(rows, tokenizer, config.n_positions)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        examples = [data[(step * 8 + place) % len(data)] for place in range(8)]
        loss = model(**data.collate(examples)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder, tokenizer=tokenizer)
    return folder, CausalLMData(read_rows(TEXT, ["text"]), tokenizer, config.n_positions)


def test_dtypes_change_perplexity_by_less_than_half_a_percent_and_gptq_by_less_than_one(
    trained: tuple[str, CausalLMData], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command, whose fp32 row is what evaluation computes without the engine.

    4 bits by rounding to nearest, which is quicker, cost more than by GPTQ.
    """
    try:
        library.load()
    except library.UnsupportedError as error:
        pytest.skip(f"int8 needs our kernels: {error}")
    folder, data = trained
    model = GPTJForCausalLM.from_pretrained(folder).eval()
    expected = evaluate(TASKS["causal-lm"], model, data, batch_size=8, device="cpu")["perplexity"]
    assert expected < 100, "it has learned nothing: of no use to compare formats with"

    quantized = str(tmp_path / "quantized")
    quantize_model(folder, quantized, Calibration(TRAIN, rows=128, sequence_length=64))
    main(["perplexity", f"--model={folder}", f"--data={TEXT}", f"--quantized={quantized}"])
    _, *rows, gptq = map(json.loads, capsys.readouterr().out.splitlines())
    by_dtype = {row["dtype"]: row for row in rows}
    assert list(by_dtype) == ["float32", "bfloat16", "int8", "int4"]
    assert (gptq["dtype"], gptq["model"]) == ("int4", quantized)
    assert gptq["above_float32_percent"] < by_dtype["int4"]["above_float32_percent"]
    assert gptq["above_float32_percent"] < 1
    assert math.isclose(by_dtype["float32"]["perplexity"], expected, rel_tol=1e-4)
    for dtype in ("bfloat16", "int8"):
        assert abs(by_dtype[dtype]["above_float32_percent"]) < 0.5, by_dtype[dtype]


def test_fp8_changes_perplexity_by_less_than_half_a_percent(
    trained: tuple[str, CausalLMData],
) -> None:
    """By the GPU's runner with plain operations, whose products are of the same numbers."""
    folder, data = trained
    prompts = [data[index].ids.tolist() for index in range(len(data))]
    losses = []
    formats = ((torch.float32, None), (torch.float16, "fp8"), (torch.bfloat16, "fp8"))
    for stored, quantization in formats:
        model = GPTJForCausalLM.from_pretrained(folder, dtype=stored).eval()
        operations = PlainOperations(stored, model.config.layer_norm_epsilon)
        runner = CudaRunner(model, 32, operations, quantization=quantization)
        engine = Engine(runner, eos_ids=[], max_num_batched_tokens=512, max_queued=len(data))
        try:
            found = score(engine, prompts)
        finally:
            engine.close()
            runner.close()
        losses.append(sum(found) / len(found))
    assert math.exp(losses[0]) < 100, "it has learned nothing: of no use to compare formats with"
    for loss in losses[1:]:
        assert abs(math.expm1(loss - losses[0])) < 0.005

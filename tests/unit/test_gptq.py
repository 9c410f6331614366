"""GPTQ: one layer against its definition in double precision, and whole folders by the job."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gptj import GPTJConfig, GPTJForCausalLM, GPTJForQuestionAnswering, GPTJTokenizer
from gptj.checkpoints.manifest import verify
from gptj.checkpoints.weights import read_weights
from gptj.data.rows import DataError
from gptj.errors import CheckpointError
from gptj.layers import int4
from gptj.quantization.gptq import DAMPINGS, GPTQ, Hessian, relative_error
from gptj.quantization.quantizer import Calibration, quantize_model
from gptj.storage import AlreadyExistsError
from jobs import quantize

DATA = "sample://documentation"
CONFIG = GPTJConfig(vocab_size=300, n_positions=32, n_embd=64, n_layer=2, n_head=4, rotary_dim=8)
CALIBRATION = Calibration(DATA, rows=12, sequence_length=24)


def correlated(positions: int, inputs: int) -> Tensor:
    """Inputs as layers have them: a few directions carry most, and some inputs are larger."""
    torch.manual_seed(1)
    mixed = torch.randn(positions, inputs // 8) @ torch.randn(inputs // 8, inputs)
    return (mixed + 0.3 * torch.randn(positions, inputs)) * torch.rand(inputs).square()


def hessian_of(x: Tensor) -> Hessian:
    hessian = Hessian(x.shape[1], torch.device("cpu"))
    for part in x.split(50):
        hessian.add(part)
    return hessian


def by_definition(weight: Tensor, x: Tensor, order: Tensor, scales: Tensor) -> Tensor:
    """Optimal brain quantization in a fixed order, with a new inverse for each input."""
    left = weight.double().clone()
    matrix = x.double().T @ x.double()
    matrix += DAMPINGS[0] * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.double)
    units = scales.double().repeat_interleave(64, dim=1)
    result = torch.zeros_like(left)
    for number, i in enumerate(order.tolist()):
        rest = order[number:]
        inverse = torch.linalg.inv(matrix[rest][:, rest])
        result[:, i] = (left[:, i] / units[:, i]).round().clamp(-8, 7) * units[:, i]
        error = (left[:, i] - result[:, i]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    return result.float()


def test_rounding_is_gptqs_by_definition() -> None:
    x, weight = correlated(300, 192), torch.randn(24, 192)
    gptq = GPTQ.of(hessian_of(x))
    found = gptq.round(weight)
    expected = by_definition(weight, x, gptq.order_I, found.scales)
    # A number half way between two steps may be rounded either way, and what follows with it.
    differing = (found.dequantized(torch.float32) - expected).abs() > 1e-6
    assert differing.float().mean() < 0.02


def test_its_output_error_is_below_nearests() -> None:
    x, weight = correlated(400, 256), torch.randn(64, 256)
    hessian = hessian_of(x)
    errors = []
    for rounded in (int4.quantize(weight), GPTQ.of(hessian).round(weight)):
        difference = x @ (rounded.dequantized(torch.float32) - weight).T
        errors.append(float(difference.square().sum() / (x @ weight.T).square().sum()))
        assert relative_error(weight, rounded, hessian) == pytest.approx(errors[-1], rel=1e-3)
    assert errors[1] < 0.5 * errors[0]


def test_independent_inputs_are_rounded_to_nearest() -> None:
    """Nothing can be made up for; also with inputs that are always 0."""
    weight = torch.randn(16, 128)
    hessian = Hessian(128, torch.device("cpu"))
    hessian.sum_II.diagonal()[:100] = torch.rand(100) + 0.5
    found = GPTQ.of(hessian).round(weight)
    units = found.scales.float().repeat_interleave(64, dim=1)
    expected = (weight / units).round().clamp(-8, 7) * units
    torch.testing.assert_close(found.dequantized(torch.float32), expected)


def test_fewer_positions_than_inputs_are_enough() -> None:
    x, weight = correlated(20, 128), torch.randn(8, 128)
    hessian = hessian_of(x)
    error = relative_error(weight, GPTQ.of(hessian).round(weight), hessian)
    assert error < relative_error(weight, int4.quantize(weight), hessian)


def save(folder: Path, config: GPTJConfig = CONFIG) -> GPTJForCausalLM:
    torch.manual_seed(0)
    model = GPTJForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    tokenizer = GPTJTokenizer.train(["some text to learn from"], 280)
    model.save_pretrained(folder, tokenizer=tokenizer)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_models_outputs_change_less_than_by_nearest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tied: bool
) -> None:
    """On the calibration text; the folder is complete, in shards, and says how it was rounded."""
    config = GPTJConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": tied})
    source = tmp_path / "model"
    model = save(source, config)
    ids = CALIBRATION.read(GPTJTokenizer.from_pretrained(source), config)
    assert ids.shape == (12, 24)
    errors = []
    with caplog.at_level(logging.INFO), torch.inference_mode():
        for name, calibration in (("nearest", None), ("gptq", CALIBRATION)):
            target = str(tmp_path / name)
            quantize_model(str(source), target, calibration, shard_bytes=100_000)
            verify(target)
            assert len(list(Path(target).glob("*.safetensors"))) > 1
            quantized = GPTJForCausalLM.from_pretrained(target)
            difference = quantized(ids).logits - model(ids).logits
            errors.append(float(difference.square().mean()))
            fields = quantized.config.quantization_config["config_groups"]["group_0"]["weights"]  # type: ignore[attr-defined]
            assert fields["actorder"] == (None if name == "nearest" else "weight")
    assert errors[1] < 0.8 * errors[0]
    assert "block 2 of 2: " in caplog.text and "relative error" in caplog.text


@pytest.mark.slow
def test_a_run_that_fails_leaves_no_model(tmp_path: Path) -> None:
    """Here at the second block, when a part of the folder is written."""
    model = save(tmp_path / "model")
    model.transformer.h[1].ln_1.weight.data[3] = torch.finfo(torch.float32).max  # finite itself
    model.save_pretrained(
        tmp_path / "bad", tokenizer=GPTJTokenizer.from_pretrained(tmp_path / "model")
    )
    target = str(tmp_path / "quantized")
    with pytest.raises(ValueError, match="activations are not finite"):
        quantize_model(str(tmp_path / "bad"), target, CALIBRATION)
    with pytest.raises(FileNotFoundError):
        GPTJForCausalLM.from_pretrained(target)
    quantize_model(str(tmp_path / "model"), target, CALIBRATION)  # again, from the start
    with pytest.raises(AlreadyExistsError):
        quantize_model(str(tmp_path / "model"), target, CALIBRATION)


@pytest.mark.slow
def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "model")
    source, target = str(tmp_path / "model"), str(tmp_path / "quantized")
    with pytest.raises(DataError, match=r"fewer than 100000 rows of 24.*--rows"):
        quantize_model(source, target, Calibration(DATA, 100_000, 24))
    other = str(tmp_path / "answers")
    GPTJForQuestionAnswering(CONFIG).save_pretrained(other)
    with pytest.raises(ValueError, match="is a GPTJForQuestionAnswering, and only language models"):
        quantize_model(other, target, None)
    GPTJForCausalLM(CONFIG).save_pretrained(tmp_path / "silent")
    with pytest.raises(ValueError, match="has no tokenizer, which calibration needs"):
        quantize_model(str(tmp_path / "silent"), target, CALIBRATION)
    assert not any(Path(target).iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["transformer.h.1.mlp.fc_in.weight", "transformer.wte.weight", "lm_head.bias"]
)
def test_weights_that_are_not_finite_are_refused_by_name(
    name: str, value: float, tmp_path: Path
) -> None:
    """Whatever their layer: one of them would make outputs NaN."""
    save(tmp_path / "model")
    state = {key: each.clone() for key, each in read_weights(str(tmp_path / "model"), None)}
    state[name].view(-1)[5] = value
    (tmp_path / "model" / "manifest.json").unlink()
    save_file(state, tmp_path / "model" / "model.safetensors")
    for calibration in (None, CALIBRATION):
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)} of .*/model has values"):
            quantize_model(str(tmp_path / "model"), str(tmp_path / "quantized"), calibration)
    assert not any((tmp_path / "quantized").iterdir())


@pytest.mark.slow
def test_the_job_writes_a_folder_and_prints_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "model")
    words = [str(tmp_path / "model"), str(tmp_path / "quantized")]
    monkeypatch.setattr(sys, "argv", ["quantize.py", *words, f"--data={DATA}", "--rows=9"])
    quantize.main()
    assert capsys.readouterr().out.strip() == words[1]
    assert int4.is_int4(GPTJForCausalLM.from_pretrained(words[1]))
    with pytest.raises(SystemExit, match=r"error: .*already holds"):
        quantize.main()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "GPTQ needs --data"),
        (["--rounding=nearest", "--data=x"], "uses no --data"),
        (["--data=x", "--rows=0"], "must be 1 or more, got 0"),
    ],
)
def test_wrong_command_lines_are_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        quantize.read_arguments(["model", "output", *words])
    assert message in capsys.readouterr().err

"""4-bit weights: their words and scales by definition, and the folders that hold them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.embeddings import Arguments as EmbeddingsArguments
from deployments.generation import Arguments, new_engine_runner
from deployments.loading import check, load
from gptj import GPTJConfig, GPTJForCausalLM, GPTJModel, GPTJTokenizer
from gptj.adapters.base import Base
from gptj.adapters.config import LoRAConfig
from gptj.adapters.lora import add_lora
from gptj.checkpoints.manifest import verify
from gptj.engine.backends import best_runner
from gptj.engine.runners.base import StepBatch
from gptj.engine.runners.cpu import library
from gptj.engine.runners.cpu.library import UnsupportedError
from gptj.engine.runners.cpu.runner import CpuRunner
from gptj.errors import CheckpointError
from gptj.interop.exporter import export_weights
from gptj.layers import int4
from gptj.quantization.quantizer import quantize_model
from gptj.training.model_config import make_config
from gptj.training.settings import Settings, SettingsError
from gptj_cli.models import describe

CONFIG = GPTJConfig(vocab_size=300, n_positions=32, n_embd=64, n_layer=2, n_head=4, rotary_dim=8)
IDS = torch.arange(20)[None]


def model_of(config: GPTJConfig = CONFIG) -> GPTJForCausalLM:
    torch.manual_seed(0)
    model = GPTJForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model in fp32, and the same in 4 bits, rounded to nearest."""
    root = tmp_path_factory.mktemp("int4")
    plain, quantized = str(root / "plain"), str(root / "quantized")
    tokenizer = GPTJTokenizer.train(["some text to learn from"], 280)
    model_of().save_pretrained(plain, tokenizer=tokenizer, training={"steps": 3})
    quantize_model(plain, quantized, None)
    return plain, quantized


def test_parameters_are_counted_as_the_weights_that_the_words_stand_for(
    folders: tuple[str, str],
) -> None:
    plain, quantized = map(GPTJForCausalLM.from_pretrained, folders)
    assert quantized.num_parameters() == plain.num_parameters()
    linears = sum(p.numel() for p in plain.transformer.h.parameters() if p.dim() == 2)
    trainable = plain.num_parameters() - linears
    assert quantized.num_parameters(only_trainable=True) == trainable


def altered(folder: str, target: Path, **quantization: Any) -> str:
    """The folder with other fields in its quantization_config, without a manifest."""
    target.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        content = (Path(folder) / name).read_bytes()
        if name == "config.json":
            fields = json.loads(content)
            fields["quantization_config"] |= quantization
            content = json.dumps(fields).encode()
        (target / name).write_bytes(content)
    return str(target)


def test_words_and_scales_are_those_of_the_format() -> None:
    """By its definition, number by number."""
    weight = torch.randn(3, 128)
    weight[1, 64:] = 0
    found = int4.quantize(weight)
    assert found.shape == weight.shape and found.packed.shape == (3, 16)
    restored = found.dequantized(torch.float32)
    for row in range(3):
        for column in range(128):
            word = int(found.packed[row, column // 8]) & 0xFFFFFFFF
            code = word >> 4 * (column % 8) & 15
            scale = float(found.scales[row, column // 64])
            assert restored[row, column] == (code - 8) * scale
            assert abs(restored[row, column] - weight[row, column]) <= 0.51 * abs(scale) or (
                code == 15  # the other end of the range, which has one code fewer
            )
    groups = weight.unflatten(1, (-1, 64))
    largest = groups.abs().argmax(dim=-1, keepdim=True)
    codes = restored.unflatten(1, (-1, 64)).gather(2, largest) / found.scales.float()[..., None]
    assert set(codes.nan_to_num(-8).flatten().tolist()) == {-8.0}
    assert (restored[1, 64:] == 0).all()


def test_rows_of_a_matrix_are_quantized_alone() -> None:
    weight = torch.randn(7, 64)
    whole, part = int4.quantize(weight), int4.quantize(weight[2:5])
    assert torch.equal(whole[2:5].packed, part.packed)
    assert torch.equal(whole[2:5].scales, part.scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_quantized_folder_loads_in_4_bits(folders: tuple[str, str], dtype: torch.dtype) -> None:
    """Everything else is in the dtype, in which layers compute with their dequantized weights."""
    verify(folders[1])
    expected = model_of()
    for block in expected.transformer.h:
        for parent, name in int4.block_linears(block):
            weight = getattr(parent, name).weight
            weight.data = int4.quantize(weight.data).dequantized(torch.float32)
    model = GPTJForCausalLM.from_pretrained(folders[1], dtype=dtype)
    assert int4.is_int4(model) and model.dtype == dtype
    assert model.lm_head.weight.dtype == model.transformer.h[0].mlp.fc_in.bias.dtype == dtype
    packed = model.transformer.h[0].mlp.fc_in.weight_packed
    assert packed.shape == (256, 8) and packed.dtype == torch.int32 and not packed.requires_grad
    with torch.inference_mode():
        found, wanted = model(IDS).logits, expected.to(dtype)(IDS).logits
    torch.testing.assert_close(found, wanted)


def test_a_quantized_folder_says_what_it_is(folders: tuple[str, str]) -> None:
    plain, quantized = map(Path, folders)
    assert describe(folders[1])["weights"] == "int4" and "weights" not in describe(folders[0])
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (plain, quantized)]
    weights = 2 * 12 * 64 * 64
    assert sizes[0] - sizes[1] == pytest.approx(weights * (4 - 4.25 / 8), rel=0.01)
    assert json.loads((quantized / "training.json").read_text()) == {"steps": 3}


def test_a_loaded_model_is_saved_as_it_is(folders: tuple[str, str], tmp_path: Path) -> None:
    model = GPTJForCausalLM.from_pretrained(folders[1])
    model.save_pretrained(tmp_path / "again")
    again = GPTJForCausalLM.from_pretrained(tmp_path / "again")
    assert again.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model)(IDS).logits, again(IDS).logits)


def test_a_converted_model_keeps_its_scales(folders: tuple[str, str], tmp_path: Path) -> None:
    """The format has no others than bf16, so a folder with converted ones could not be loaded."""
    model = GPTJForCausalLM.from_pretrained(folders[1])
    scales = model.transformer.h[0].mlp.fc_in.weight_scale.detach().clone()
    for number, dtype in enumerate((torch.float16, torch.float32)):
        model.to(dtype).save_pretrained(tmp_path / f"{number}")
        assert model.dtype == dtype
        again = GPTJForCausalLM.from_pretrained(tmp_path / f"{number}")
        assert again.dtype == dtype
        found = again.transformer.h[0].mlp.fc_in.weight_scale
        assert found.dtype == torch.bfloat16 and torch.equal(found, scales)


def test_a_transposed_matrix_is_quantized_as_its_copy() -> None:
    """Flax, TensorFlow and mesh-transformer-jax store transposes, which are read without a copy."""
    weight = torch.randn(128, 48).T
    assert not weight.is_contiguous()
    found, expected = int4.quantize(weight), int4.quantize(weight.contiguous())
    assert torch.equal(found.packed, expected.packed)
    assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "gptq"}, r"quant_method is 'gptq'"),
        ({"format": "int-quantized"}, r"format is 'int-quantized'"),
        ({"ignore": []}, r"ignore is \[\]"),
        ({"config_groups": {}}, r"config_groups is {}"),
        ({"config_groups": {"group_0": {"targets": ["Linear"]}}}, r"weights is None"),
    ],
)
def test_weights_quantized_otherwise_are_refused(
    folders: tuple[str, str], tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    address = altered(folders[1], tmp_path / "model", **fields)
    for opened in (
        lambda: GPTJForCausalLM.from_pretrained(address),
        lambda: check(GPTJForCausalLM, Arguments(checkpoint=address)),
    ):
        with pytest.raises(CheckpointError, match=f"not supported: {message}.*jobs/quantize.py"):
            opened()


def test_other_group_sizes_are_named(folders: tuple[str, str], tmp_path: Path) -> None:
    fields = int4.config_fields(group_size=128)
    address = altered(folders[1], tmp_path / "model", **fields)
    with pytest.raises(CheckpointError, match=r"weights.group_size is 128, not 64"):
        GPTJForCausalLM.from_pretrained(address)


def test_what_4_bit_weights_cannot_give_is_refused(folders: tuple[str, str]) -> None:
    """int8, other heads, training, conversion, and adapters on top."""
    quantized = folders[1]
    with pytest.raises(ValueError, match="int8 needs the original weights"):
        check(GPTJForCausalLM, Arguments(checkpoint=quantized, quantization="int8"))
    model = GPTJForCausalLM.from_pretrained(quantized)
    with pytest.raises(ValueError, match="int8 needs the original weights"):
        best_runner(model, 64, quantization="int8")
    with pytest.raises(ValueError, match="with which only generation computes"):
        check(GPTJModel, EmbeddingsArguments(checkpoint=quantized))
    with pytest.raises(ValueError, match="has 4-bit weights, beside which no adapter can be"):
        add_lora(model, LoRAConfig(4))
    settings = Settings.model_validate({"model": {"checkpoint": quantized}})
    with pytest.raises(SettingsError, match="has 4-bit weights, which cannot be trained"):
        make_config(settings, GPTJTokenizer.from_pretrained(quantized))
    for convert in (
        lambda: export_weights(quantized, f"{quantized}-exported", format="flax"),
        lambda: quantize_model(quantized, f"{quantized}-again", None),
    ):
        with pytest.raises(CheckpointError, match="has quantized weights, which cannot be"):
            convert()


def test_an_adapter_is_not_put_on_4_bit_weights(folders: tuple[str, str], tmp_path: Path) -> None:
    model = GPTJForCausalLM.from_pretrained(folders[0])
    add_lora(model, LoRAConfig(4))
    model.save_adapter(tmp_path / "adapter", base=Base(folders[1]))
    with pytest.raises(CheckpointError, match="has 4-bit weights, to which nothing can be added"):
        GPTJForCausalLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("writer", ["ours", "PEFT"])
def test_an_adapter_must_be_merged_before_its_weights_are_converted(
    writer: str, folders: tuple[str, str], tmp_path: Path
) -> None:
    model = GPTJForCausalLM.from_pretrained(folders[0])
    add_lora(model, LoRAConfig(4))
    adapter = tmp_path / "adapter"
    model.save_adapter(adapter, base=Base(folders[0]))
    if writer == "PEFT":
        for path in adapter.iterdir():
            if not path.name.startswith("adapter_"):
                path.unlink()
    target = str(tmp_path / "target")
    for convert in (
        lambda: quantize_model(str(adapter), target, None),
        lambda: export_weights(str(adapter), target, format="flax"),
    ):
        with pytest.raises(CheckpointError, match=r"is an adapter, .*jobs/merge_adapter.py BASE"):
            convert()


def test_a_null_quantization_config_means_none(folders: tuple[str, str], tmp_path: Path) -> None:
    """Hugging Face may write one."""
    address = str(tmp_path / "model")
    model = GPTJForCausalLM.from_pretrained(folders[0])
    setattr(model.config, int4.CONFIG_FIELD, None)
    model.save_pretrained(address, tokenizer=GPTJTokenizer.from_pretrained(folders[0]))
    assert '"quantization_config": null' in (tmp_path / "model/config.json").read_text()
    assert "weights" not in describe(address)
    check(GPTJForCausalLM, Arguments(checkpoint=address, quantization="int8"))
    settings = Settings.model_validate({"model": {"checkpoint": address}})
    settings = settings.model_copy(
        update={"data": settings.data.model_copy(update={"sequence_length": 32})}
    )
    make_config(settings, GPTJTokenizer.from_pretrained(address))
    add_lora(model, LoRAConfig(4))
    model.save_adapter(tmp_path / "adapter", base=Base(address))
    assert GPTJForCausalLM.from_pretrained(tmp_path / "adapter").adapter is not None
    quantize_model(address, str(tmp_path / "quantized"), None)
    assert int4.is_int4(GPTJForCausalLM.from_pretrained(tmp_path / "quantized"))


def test_without_kernels_4_bit_weights_are_refused_and_not_dequantized(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTJ_MAX_CPU_ISA", "none")
    reason = "quantization=int4 is not available: GPTJ_MAX_CPU_ISA is none"
    with pytest.raises(UnsupportedError, match=reason):
        best_runner(GPTJForCausalLM.from_pretrained(folders[1]), 64)
    with pytest.raises(UnsupportedError, match=reason):
        best_runner(GPTJForCausalLM.from_pretrained(folders[0]), 64, quantization="int4")


@torch.inference_mode()
def test_the_generation_service_computes_in_4_bits(folders: tuple[str, str]) -> None:
    """From the folder in 4 bits without a setting, and from the plain one with it."""
    try:
        library.level()
    except UnsupportedError as error:
        pytest.skip(str(error))
    read, ids = [], torch.arange(20, dtype=torch.int32).numpy()
    table = torch.arange(2, dtype=torch.int32)[None].numpy()
    ends = torch.tensor([0, 20], dtype=torch.int32).numpy()
    for folder, quantization in ((folders[1], "none"), (folders[1], "int4"), (folders[0], "int4")):
        arguments = Arguments.model_validate(
            {
                "checkpoint": folder,
                "quantization": quantization,
                "cache_tokens": 64,
                "dtype": "float32",  # rounding to bf16 first would change codes
            }
        )
        check(GPTJForCausalLM, arguments)
        model, _ = load(GPTJForCausalLM, arguments, torch.device("cpu"))
        runner, _ = new_engine_runner(model, arguments)
        assert isinstance(runner, CpuRunner)
        read.append(runner.bytes_read)
        logits = runner.step(StepBatch(ids, ids, ends, table, ids))
        expected = GPTJForCausalLM.from_pretrained(folders[1])(IDS).logits[0]
        assert float((logits - expected).abs().max() / expected.std()) < 0.12
        runner.close()
    assert len(set(read)) == 1


def test_widths_that_are_not_whole_groups_are_refused(tmp_path: Path) -> None:
    model = model_of(GPTJConfig(**{**CONFIG.to_dict(), "n_inner": 100}))
    with pytest.raises(ValueError, match=r"needs layers with a multiple of 64 inputs.*fc_out has"):
        int4.quantize_blocks(model.transformer.h)
    model = model_of(GPTJConfig(**{**CONFIG.to_dict(), "n_inner": 100}))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="n_inner=100 must be multiples of 64"):
        quantize_model(str(tmp_path / "model"), str(tmp_path / "quantized"), None)

"""Adapters trained on real ranks (gloo) and DeepSpeed, against PEFT's on transformers' GPT-J."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_rows import loss_alone
from safetensors.torch import load_file
from task_data import make_data
from test_training import (
    MODEL,
    RATES,
    STEPS,
    NoPicture,
    losses,
    releasing,
    run_ranks,
    settings_of,
    write_text,
)

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer, storage
from gptj.adapters.base import Base
from gptj.adapters.config import LoRAConfig
from gptj.adapters.lora import add_lora
from gptj.adapters.quantization import QuantizedLinear, quantize_blocks
from gptj.checkpoints.manifest import CheckpointError, verify
from gptj.data.batches import BatchOrder
from gptj.interop.merging import merge_adapter
from gptj.model import HEAD_CLASSES
from gptj.training import loop, progress
from gptj.training.loop import Worker, train
from gptj.training.model_config import make_config
from gptj.training.settings import Settings, SettingsError, read_settings
from gptj.training.state import check_resumable, is_complete, upload_state
from gptj.training.tokenizer import prepare_tokenizer
from jobs import evaluate as evaluate_job

WORLD = 2
ADAPTER: dict[str, Any] = {
    "rank": 4,
    "alpha": 8,
    "target_modules": ["q_proj", "v_proj", "fc_in"],
    "rslora": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    # Stage 3 first: it needs the ranks before DeepSpeed has been initialised by another run.
    "stage-3": {"deepspeed": {"stage": 3}, "model": {"gradient_checkpointing": True}},
    "stage-0": {"deepspeed": {"stage": 0}},
    "stage-1": {"deepspeed": {"stage": 1}},
    "stage-2": {"deepspeed": {"stage": 2}},
}
PACKED = {"deepspeed": {"stage": 2}, "data": {"train": "{folder}/pairs.jsonl"}}
QUANTIZED: dict[str, dict[str, Any]] = {
    f"{quantization}-{stage}": {
        "deepspeed": {"stage": stage},
        "adapter": {"quantization": quantization},
    }
    for quantization, stage in (("nf4", 0), ("int8", 1), ("nf4", 2))
}
CASES: dict[str, dict[str, Any]] = {
    **VARIANTS,
    **QUANTIZED,
    "nf4-bf16": {
        "deepspeed": {"stage": 2, "precision": "bf16"},
        "adapter": {"quantization": "nf4"},
    },
    "packed": PACKED,
    "bf16-3": {"deepspeed": {"stage": 3, "precision": "bf16"}},
    "bf16-0": {"deepspeed": {"stage": 0, "precision": "bf16"}},
}
TASKS = ("classification", "question-answering")


def rank_main(rank: int, world: int, port: int, runs: list[Settings]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    loop.deepspeed_config = releasing
    progress.draw_curve = lambda history, run: NoPicture()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    for settings in runs:

        def report(
            metrics: dict[str, float],
            folder: Path,
            name: str,
            fence: Callable[[], None],
            settings: Settings = settings,
        ) -> None:
            upload_state(folder, storage.join(settings.folder, name), rank, world, fence)

        train(settings, Worker(rank, world, torch.device("cpu"), report))
    torch.distributed.destroy_process_group()


def adapter_settings(folder: Path, run: str, **fields: Any) -> Settings:
    model = {"checkpoint": str(folder / "base"), **fields.pop("model", {})}
    values = settings_of(folder, run).model_dump(exclude_unset=True)
    values.update(model=model, adapter=ADAPTER, workers={"count": WORLD})
    del values["tokenizer"]
    for key, value in fields.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    values["data"]["train"] = values["data"]["train"].format(folder=folder)
    return Settings(**values)


def task_settings(folder: Path, task: str) -> Settings:
    """On the task's sample, in batches that all ranks share."""
    values = adapter_settings(folder, task, steps=2).model_dump(exclude_unset=True)
    data = {"sequence_length": 96, **({"stride": 16} if task == "question-answering" else {})}
    return Settings(**{**values, "task": task, "data": data})


def halfway(settings: Settings) -> str:
    return storage.join(settings.folder, f"checkpoint-{STEPS // 2:08}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Settings]:
    """All runs that the tests look at, on ranks that are started once."""
    folder = tmp_path_factory.mktemp("adapters")
    write_text(folder)
    text = json.loads((folder / "train.jsonl").read_text())["text"]
    tokenizer = GPTJTokenizer.train([text], vocab_size=300)
    torch.manual_seed(1)
    config = GPTJConfig(
        **{**MODEL, "n_positions": 128, "vocab_size": len(tokenizer)},
        eos_token_id=tokenizer.eos_token_id,
    )
    GPTJForCausalLM(config).save_pretrained(folder / "base", tokenizer=tokenizer)
    fields = {"checkpoint_every": STEPS // 2, "keep_checkpoints": 2}
    found = {name: adapter_settings(folder, name, **fields, **case) for name, case in CASES.items()}
    for stage in (3, 0, 2):  # with dropout, whose random numbers are part of a checkpoint
        quantization = "nf4" if stage == 2 else None
        adapter = {
            "adapter": {**ADAPTER, "dropout": 0.2, "quantization": quantization},
            "deepspeed": {"stage": stage},
        }
        found[f"dropout-{stage}"] = adapter_settings(
            folder, f"dropout-{stage}", **fields, **adapter
        )
    found |= {task: task_settings(folder, task) for task in TASKS}
    found["task-3"] = Settings(
        **{
            **found["classification"].model_dump(exclude_unset=True),
            "run": "task-3",
            "deepspeed": {"stage": 3},
        }
    )
    order = sorted(found.values(), key=lambda each: each.deepspeed.stage != 3)
    run_ranks(WORLD, order, rank_main)
    again = {}
    for name in [name for name in found if name.startswith("dropout-")]:
        fields = found[name].model_dump(exclude_unset=True)
        again[f"again-{name}"] = Settings(**{**fields, "run": f"again-{name}"})
        folder_again = Path(again[f"again-{name}"].folder)
        shutil.copytree(halfway(found[name]), folder_again / Path(halfway(found[name])).name)
    run_ranks(WORLD, list(again.values()), rank_main)
    return found | again


def dequantized(settings: Settings, folder: Path) -> Settings:
    """The same run on a base model whose weights are those that the quantized ones stand for."""
    assert settings.adapter is not None and settings.adapter.quantization is not None
    base = settings.model.checkpoint
    model = GPTJForCausalLM.from_pretrained(base, dtype="float32")
    quantized = GPTJForCausalLM.from_pretrained(base, dtype="float32")
    quantize_blocks(quantized, settings.adapter.quantization)
    for name, layer in quantized.named_modules():
        if isinstance(layer, QuantizedLinear):
            model.get_submodule(name).weight.data.copy_(layer.dequantized(torch.float32))
    model.save_pretrained(folder, tokenizer=GPTJTokenizer.from_pretrained(base))
    return Settings(
        **{**settings.model_dump(exclude_unset=True), "model": {"checkpoint": str(folder)}}
    )


def reference(settings: Settings, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """PEFT's adapter in transformers' model, PyTorch's AdamW, each global batch as a whole."""
    import peft  # not for the ranks, which import this module
    import transformers

    tokenizer = prepare_tokenizer(settings)
    data = make_data(settings, tokenizer).train
    torch.manual_seed(settings.seed)
    start = GPTJForCausalLM.from_pretrained(settings.model.checkpoint)
    assert settings.adapter is not None
    add_lora(start, settings.adapter.lora())
    start.save_adapter(folder, base=Base.at(settings.model.checkpoint))
    model = transformers.GPTJForCausalLM.from_pretrained(settings.model.checkpoint)
    model = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.01)
    order = BatchOrder(len(data), 8, settings.seed)
    found = []
    for step, rate in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = data.collate([data[i] for i in order.indices(step)])
        loss = loss_alone(model, batch) if "cu_seqlens" in batch else model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, peft.get_peft_model_state_dict(model)


@pytest.mark.slow
@pytest.mark.parametrize("names", [[*VARIANTS], ["packed"]], ids=["full-rows", "packed"])
def test_every_stage_trains_like_peft(
    names: list[str], runs: dict[str, Settings], tmp_path: Path
) -> None:
    expected, weights = reference(runs[names[-1]], tmp_path / "start")
    assert expected[-1] < expected[0]
    for name in names:
        assert losses(runs[name]) == pytest.approx(expected, abs=1e-4), name
        found = load_file(storage.join(runs[name].model_folder, "adapter_model.safetensors"))
        assert found.keys() == weights.keys()
        for key, tensor in found.items():
            # Adam divides by small numbers, so that the last bits of a gradient may show.
            torch.testing.assert_close(tensor, weights[key], rtol=0, atol=2e-3, msg=key)
    if names == [*VARIANTS]:
        for name in ("bf16-3", "bf16-0"):
            assert losses(runs[name]) == pytest.approx(expected, abs=0.05), name


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZED)
def test_an_adapter_learns_the_same_on_quantized_and_dequantized_weights(
    name: str, runs: dict[str, Settings], tmp_path: Path
) -> None:
    expected, weights = reference(dequantized(runs[name], tmp_path / "base"), tmp_path / "start")
    assert losses(runs[name]) == pytest.approx(expected, abs=1e-4)
    assert losses(runs[name]) != pytest.approx(losses(runs["stage-2"]), abs=1e-5)
    found = load_file(storage.join(runs[name].model_folder, "adapter_model.safetensors"))
    assert found.keys() == weights.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, weights[key], rtol=0, atol=2e-3, msg=key)
    if name == "nf4-2":
        assert losses(runs["nf4-bf16"]) == pytest.approx(expected, abs=0.05)


@pytest.mark.slow
def test_checkpoints_only_hold_the_adapter(runs: dict[str, Settings]) -> None:
    """Frozen weights are in none of the files: neither as such nor as the optimizer's masters."""
    settings = runs["stage-2"]
    model = GPTJForCausalLM.from_pretrained(settings.model_folder)
    trained = sum(
        p.numel() for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n
    )
    assert trained < model.num_parameters() / 5
    for name in ("stage-0", "stage-2", "stage-3", "nf4-bf16", "bf16-3", *QUANTIZED):
        kept: dict[str, int] = {}
        for file in Path(halfway(runs[name])).glob("*.safetensors"):
            for tensor, values in load_file(file).items():
                kind, _, parameter = tensor.split("/", 2)
                assert ".lora_" in parameter, (file, tensor)
                kept[kind] = kept.get(kind, 0) + values.numel()
        assert kept == dict.fromkeys(("master", "exp_avg", "exp_avg_sq"), trained), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_adapter_run_equals_an_undisturbed_one(
    stage: int, runs: dict[str, Settings]
) -> None:
    whole, again = runs[f"dropout-{stage}"], runs[f"again-dropout-{stage}"]
    assert losses(again) == losses(whole)
    one, other = (
        load_file(storage.join(each.model_folder, "adapter_model.safetensors"))
        for each in (whole, again)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert losses(whole) != losses(runs[f"stage-{stage}"])  # dropout was there


@pytest.mark.slow
def test_the_result_is_an_adapters_folder_that_evaluates_and_merges(
    runs: dict[str, Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stage-2", "stage-3", "nf4-2", "task-3", *TASKS):
        settings = runs[name]
        assert is_complete(settings)
        verify(settings.model_folder)
        base = json.loads(Path(settings.model_folder, "base.json").read_text())
        expected = Base.at(settings.model.checkpoint)
        assert expected.digest is not None
        assert base == expected.to_dict()
        merge_adapter(settings.model.checkpoint, settings.model_folder, str(tmp_path / name))
        words = {"classification": "reviews", "question-answering": "questions"}
        data = str(Path(settings.storage, "train.jsonl"))
        if settings.task in words:
            data = f"sample://{words[settings.task]}/evaluation"
        results = []
        for checkpoint in (settings.model_folder, str(tmp_path / name)):
            request = evaluate_job.read_settings([checkpoint, data, "limit=20"])
            results.append(evaluate_job.measure(request))
        for key in results[0].keys() - {"checkpoint", "seconds"}:
            adapted, merged = results[0][key], results[1][key]
            if isinstance(merged, float):
                merged = pytest.approx(merged, abs=1e-5, rel=1e-6)
            assert adapted == merged, key
        config = GPTJConfig.from_pretrained(settings.model_folder)
        cls = HEAD_CLASSES[(config.architectures or [""])[0]]
        model = cls.from_pretrained(settings.model_folder)
        assert model.adapter is not None
        assert bool(model.adapter.modules_to_save) == (settings.task in words)
    head = load_file(storage.join(runs["task-3"].model_folder, "adapter_model.safetensors"))
    assert head["base_model.model.score.weight"].shape == (2, MODEL["n_embd"])


@pytest.mark.slow
def test_a_run_only_resumes_with_its_original_base(
    runs: dict[str, Settings], tmp_path: Path
) -> None:
    settings, before = runs["stage-2"], halfway(runs["stage-2"])
    check_resumable(settings, before)
    base = Path(settings.model.checkpoint)
    base.rename(tmp_path / "base")
    try:
        GPTJForCausalLM(GPTJConfig.from_pretrained(tmp_path / "base")).save_pretrained(base)
        with pytest.raises(CheckpointError, match="was not trained on"):
            check_resumable(settings, before)
    finally:
        shutil.rmtree(base)
        (tmp_path / "base").rename(base)
    changed = adapter_settings(base.parent, "stage-2", adapter={**ADAPTER, "rank": 8})
    with pytest.raises(SettingsError, match=r"adapter\.rank was 4 and is now 8"):
        check_resumable(changed, before)
    full = settings.model_dump(exclude_unset=True) | {"adapter": None}
    with pytest.raises(SettingsError, match=r"adapter.*"):
        check_resumable(Settings(**full), before)


@pytest.mark.slow
def test_training_on_top_of_an_adapter_is_refused(runs: dict[str, Settings]) -> None:
    settings = runs["stage-2"]
    fields = settings.model_dump(exclude_unset=True)
    fields["model"] = {"checkpoint": settings.model_folder}
    on_top = Settings(**fields)
    tokenizer = prepare_tokenizer(on_top)
    data = make_data(on_top, tokenizer).train
    with pytest.raises(ValueError, match=r"is an adapter.*merge_adapter"):
        make_config(on_top, tokenizer, data.labels)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["adapter.rank=8"], "adapter: a new model has no weights .* set model.checkpoint"),
        (["adapter.rank=0"], r"adapter\.rank: .*greater than or equal to 1"),
        (["adapter.dropout=1"], r"adapter\.dropout: .*less than 1"),
        (["adapter.target_modules=[q_proj,wte]"], "target_modules: 'wte' is not one of k_proj"),
        (["adapter.target_modules=[]"], "target_modules is empty"),
        (["adapter.quantization=fp8"], r"adapter\.quantization: .*'int8' or 'nf4', got 'fp8'"),
        (
            ["model.checkpoint=x", "adapter.quantization=nf4", "deepspeed.stage=3"],
            "adapter.quantization=nf4 and deepspeed.stage=3: .* set deepspeed.stage=2",
        ),
        (["adapter.ranks=8"], r"adapter\.ranks: unknown setting; did you mean adapter.rank"),
    ],
)
def test_impossible_settings_are_refused(words: list[str], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        read_settings(words)


def test_settings_of_an_adapter_become_its_configuration() -> None:
    settings = read_settings(["model.checkpoint=somewhere", "adapter={}"])
    assert settings.adapter is not None
    assert settings.adapter.lora() == LoRAConfig()
    settings = read_settings(
        ["model.checkpoint=x", "adapter.target_modules=[fc_out]", "adapter.alpha=4"]
    )
    assert settings.adapter is not None
    assert settings.adapter.lora(("score",)) == LoRAConfig(
        alpha=4, target_modules=("fc_out",), modules_to_save=("score",)
    )
    assert re.search("alpha: 4", settings.to_yaml())

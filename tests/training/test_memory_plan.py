"""A run's predicted memory against real tensors, and the errors of runs that do not fit."""

from __future__ import annotations

import logging
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray as real_ray
import torch

from gptj import GPTJConfig, GPTJForCausalLM
from gptj.adapters.lora import add_lora
from gptj.storage.lease import take_over
from gptj.training import memory, memory_plan
from gptj.training.live_bytes import LiveBytes
from gptj.training.memory import (
    as_long_as,
    changed,
    fits,
    fitting,
    main,
    words,
)
from gptj.training.memory_plan import certain_bytes, plan_memory
from gptj.training.sections import AdapterSettings, Recomputation
from gptj.training.settings import Settings, SettingsError, read_settings
from gptj_jobs import memory as job_memory
from gptj_jobs.memory import (
    Gpu,
    Host,
    check_gpu_memory,
    check_machine_memory,
    check_memory,
    roomiest_host,
)
from jobs import finetune

GB = 10**9
SIX = GPTJConfig.preset("6b")


def run_of(count: int = 1, **fields: Any) -> Settings:
    """The published model in bf16, as jobs/README.md trains it."""
    values: dict[str, Any] = {
        "batch_size": 8 * count,
        "micro_batch_size": 1,
        "data": {"train": "s3://b/d", "sequence_length": 1024},
        "model": {"checkpoint": memory.PUBLISHED},
        "deepspeed": {"stage": 3, "precision": "bf16"},
        "workers": {"count": count},
    }
    for key, value in fields.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return Settings(**values)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, "selective", True])
@pytest.mark.parametrize("adapter", [None, AdapterSettings()])
def test_predicted_activations_equal_real_tensors(
    adapter: AdapterSettings | None, recompute: Recomputation
) -> None:
    """Counted on the meta device with two and three blocks, for a model of five."""
    config = GPTJConfig(vocab_size=900, n_embd=64, n_layer=5, n_head=4, rotary_dim=8)
    model = GPTJForCausalLM(config).train()
    if adapter is not None:
        add_lora(model, adapter.lora())
    if recompute:
        model.gradient_checkpointing_enable(selective=recompute == "selective")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(memory_plan._drop)
    ids = torch.zeros(3, 96, dtype=torch.long)
    with LiveBytes() as real:
        model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss.backward()
    body, head = memory_plan._activations(
        "causal-lm", config.to_json(), adapter, "fp32", recompute, 3, 96
    )
    assert body + head == pytest.approx(real.peak, rel=0.02)


@pytest.mark.slow
def test_the_published_models_memory_is_as_known() -> None:
    """16 bytes a weight, and 18 where gradients of micro-batches are added up, in fp32.

    That is 96.8 or 108.9 GB in all, spread by stage 3 over as many GPUs as there are.
    """
    alone, eight = (plan_memory(run_of(count), SIX, on_gpu=True) for count in (1, 8))
    once = plan_memory(run_of(8, batch_size=8), SIX, on_gpu=True)
    for plan, count, size in ((alone, 1, 108.9), (eight, 8, 108.9), (once, 8, 96.8)):
        state = sum(plan.device[name] for name in ("weights", "optimizer", "gradients"))
        assert state * count == pytest.approx(size * GB, rel=0.02)
    assert not fits(alone, 1, 80 * GB)
    assert fits(eight, 8, 40 * GB)
    adapter = plan_memory(run_of(adapter={}, deepspeed={"stage": 2}), SIX, on_gpu=True)
    assert adapter.device["weights"] == pytest.approx(12.1 * GB, rel=0.01)
    assert adapter.device["optimizer"] < 0.1 * GB


def test_what_a_run_needs_to_resume_counts_too() -> None:
    """Moments in 8 bits come back with a scale for each number: 16 bytes a weight, on the host."""
    settings = run_of(4, optimizer={"moments": "8bit"})
    host = plan_memory(settings, SIX, on_gpu=True).host
    assert host["restoring"] == pytest.approx(16 * 6.05 * GB / 4, rel=0.01)
    whole = changed(settings, {"deepspeed.stage": 0})
    on_cpu = plan_memory(whole, SIX, on_gpu=False).device
    assert "restoring" in on_cpu and "gradients" not in on_cpu
    assert "restoring" not in plan_memory(run_of(4), SIX, on_gpu=True).host


def test_workers_that_share_nothing_copy_their_gradients_to_add_them_up() -> None:
    """At stage 0 in fp32: at most half a thousand million at a time, and a worker alone none."""
    whole = {"stage": 0, "precision": "fp32"}
    alone, two = (
        plan_memory(run_of(count, batch_size=count, deepspeed=whole), SIX, on_gpu=True).device
        for count in (1, 2)
    )
    assert "update" not in alone
    assert two["update"] == 4 * memory_plan.REDUCED


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("gigabytes", [16, 24, 40, 80])
def test_suggested_settings_fit(gigabytes: int, count: int) -> None:
    settings = run_of(count, micro_batch_size=2)
    found = fitting(settings, SIX, gpu_memory=gigabytes * GB)
    for change in found:
        plan = plan_memory(changed(settings, change), SIX, on_gpu=True)
        assert fits(plan, count, gigabytes * GB)
    assert found or gigabytes == 16
    if gigabytes >= 24:
        assert any("adapter" not in change for change in found)


@pytest.mark.slow
def test_a_run_that_cannot_fit_is_refused_with_settings_that_fit() -> None:
    settings = run_of(4)
    with pytest.raises(SettingsError) as refused:
        check_gpu_memory(settings, SIX, Gpu(24 * GB, bf16=True))
    message = str(refused.value)
    assert re.search(
        r"it would need about \d+\.\d GB of each GPU's 24\.0 GB \(weights 3\.03, ", message
    )
    assert "deepspeed.offload_optimizer=true" in message
    check_gpu_memory(run_of(8), SIX, Gpu(80 * GB, bf16=True))
    needed = plan_memory(settings, SIX, on_gpu=True).device_bytes
    check_gpu_memory(settings, SIX, Gpu(int(0.9 * needed), bf16=True))  # which may do
    longest = run_of(1, data={"sequence_length": 2048})
    with pytest.raises(SettingsError, match="It needs more GPUs"):
        check_gpu_memory(longest, SIX, Gpu(2 * GB, bf16=True))


@pytest.mark.slow
def test_a_run_that_its_hosts_may_not_hold_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Offloading moves the optimizer's state, of 72.6 GB and a copy of gradients, to the host."""
    caplog.set_level(logging.INFO)
    settings = run_of(4, deepspeed={"offload_optimizer": True})
    gpu = Gpu(40 * GB, bf16=True)
    check_gpu_memory(settings, SIX, gpu, Host(400 * GB, gpus=8))
    check_gpu_memory(settings, SIX, gpu, Host(100 * GB, gpus=2))  # two workers on each
    assert "may not fit" not in caplog.text
    check_gpu_memory(settings, SIX, gpu, Host(64 * GB, gpus=8))
    message = caplog.records[-1].getMessage()
    assert message.startswith("the run may not fit")
    assert re.search(r"for each of 4 workers on a host with 64\.0 GB \(.*optimizer \d\d", message)
    # Where the GPUs do not suffice either, suggestions fit the host, if any do.
    with pytest.raises(SettingsError) as refused:
        check_gpu_memory(run_of(4), SIX, Gpu(24 * GB, bf16=True), Host(64 * GB, gpus=8))
    assert "offload" not in str(refused.value).partition("These settings fit")[2]
    with pytest.raises(SettingsError, match="These settings fit"):
        check_gpu_memory(run_of(4), SIX, Gpu(24 * GB, bf16=True), Host(10 * GB, gpus=8))


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_is_suggested_where_fp32_is_what_does_not_fit(bf16: bool) -> None:
    settings = run_of(1, adapter={}, deepspeed={"stage": 2, "precision": "fp32"})
    with pytest.raises(SettingsError) as refused:
        check_gpu_memory(settings, SIX, Gpu(20 * GB, bf16))
    assert ("deepspeed.precision=" in str(refused.value)) == bf16


@pytest.mark.parametrize("computes", [True, False])
def test_bf16_is_suggested_on_cpus_that_compute_in_it(
    computes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_memory, "cpu_computes_bf16", lambda: computes)
    settings = run_of(1, adapter={}, deepspeed={"stage": 2, "precision": "fp32"})
    with pytest.raises(SettingsError) as refused:
        check_machine_memory(settings, SIX, 16 * GB)
    assert ("deepspeed.precision=bf16" in str(refused.value)) == computes
    whole = run_of(1, deepspeed={"stage": 0, "precision": "fp32"})  # 16 bytes a weight in both
    with pytest.raises(SettingsError, match="choose a smaller model") as refused:
        check_machine_memory(whole, SIX, 16 * GB)
    assert "bf16" not in str(refused.value)


def test_a_clusters_roomiest_host_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its memory for each GPU, with the part that Ray's object store may take."""
    has = {"memory": 100.0 * GB, "object_store_memory": 20.0 * GB}
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0, "memory": 900.0 * GB}},
        {"Alive": True, "Resources": {"GPU": 4.0, **has}},
        {"Alive": True, "Resources": {"GPU": 2.0, **has}},
        {"Alive": False, "Resources": {"GPU": 1.0, **has}},
    ]
    cluster(monkeypatch, 6, nodes=lambda: nodes)
    assert roomiest_host() == Host(120 * GB, gpus=2)
    cluster(monkeypatch)
    assert roomiest_host() is None


def test_on_a_cpu_only_runs_that_certainly_do_not_fit_are_refused() -> None:
    """Weights, gradients and Adam's moments: 16 bytes a weight in fp32."""
    config = GPTJConfig.preset("small")
    settings = Settings(model={"preset": "small"})  # type: ignore[arg-type]
    needed = certain_bytes(settings, config)
    assert needed == pytest.approx(16 * 305e6, rel=0.02)
    check_machine_memory(settings, config, needed)
    with pytest.raises(SettingsError, match=r"need 4\.\d GB together, but the machine has 4\.0 GB"):
        check_machine_memory(settings, config, 4 * GB)


def cluster(monkeypatch: pytest.MonkeyPatch, gpus: int = 0, **functions: Any) -> None:
    """One node, as gptj_jobs.memory sees it."""
    ray = {
        "nodes": lambda: [{"Alive": True, "Resources": {}}, {"Alive": False, "Resources": {}}],
        "cluster_resources": lambda: {"CPU": 2.0, **({"GPU": float(gpus)} if gpus else {})},
        "remote": lambda **_: lambda function: SimpleNamespace(remote=lambda: function),
        "cancel": lambda *_, **__: None,
        "exceptions": real_ray.exceptions,
        **functions,
    }
    monkeypatch.setattr(job_memory, "ray", SimpleNamespace(**ray))


def test_nothing_is_refused_before_the_cluster_has_its_machines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster(monkeypatch)
    monkeypatch.setattr(job_memory, "total_bytes", lambda: GB)
    config = GPTJConfig.preset("small")
    for autoscaling in (True, False):
        settings = Settings(
            model={"preset": "small"},  # type: ignore[arg-type]
            workers={"autoscaling": autoscaling},  # type: ignore[arg-type]
        )
        with nullcontext() if autoscaling else pytest.raises(SettingsError, match=r"has 1\.0 GB"):
            check_memory(settings, config, False, 128)


def test_nothing_is_refused_if_gpus_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be taken, or on a node that takes minutes to start."""

    def late(asked: object, timeout: float) -> int:
        raise real_ray.exceptions.GetTimeoutError

    cancelled: list[object] = []
    cluster(monkeypatch, 1, get=late, cancel=lambda asked, force: cancelled.append(asked))
    check_memory(run_of(4), SIX, True, 1024)
    assert cancelled
    cluster(monkeypatch, 1, get=lambda asked, timeout: Gpu(24 * GB, bf16=True))
    with pytest.raises(SettingsError, match="does not fit"):
        check_memory(run_of(4), SIX, True, 1024)


@pytest.mark.parametrize("fitted", [False, True])
def test_a_run_that_has_fitted_before_resumes(
    fitted: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever is predicted."""
    trained = []
    cluster(monkeypatch, 4, get=lambda asked, timeout: Gpu(GB, bf16=True))
    monkeypatch.setattr(finetune, "check_inputs", lambda settings, shared: (SIX, 1024, None))
    monkeypatch.setattr(finetune, "_has_fitted", lambda settings: fitted)
    monkeypatch.setattr(finetune, "OnSigterm", lambda stop_signal: nullcontext())
    trainer = SimpleNamespace(fit=lambda: trained.append(True))
    monkeypatch.setattr(finetune, "build_trainer", lambda *_: trainer)
    settings = run_of(4, storage=str(tmp_path))
    refused = pytest.raises(SystemExit, match="the run does not fit")
    with nullcontext() if fitted else refused:
        claim = take_over(str(tmp_path / "lease"))
        finetune.fine_tune(settings, True, claim, "submission", tmp_path, None)
    assert bool(trained) == fitted


def test_a_driver_that_was_away_too_long_leaves_the_run_to_its_successor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It would delete what the other prepares and uploads."""
    changed: list[object] = []
    monkeypatch.setattr(finetune, "check_inputs", lambda *_: changed.append(True))
    claim, _ = (take_over(str(tmp_path / "lease")) for _ in range(2))
    with pytest.raises(SystemExit, match="another process has taken over"):
        finetune.fine_tune(
            run_of(4, storage=str(tmp_path)), False, claim, "submission", tmp_path, None
        )
    assert not changed


@pytest.mark.slow
def test_memory_is_computed_for_the_longest_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short texts are not padded to data.sequence_length, and take no memory for it."""
    cluster(monkeypatch, 8, get=lambda asked, timeout: Gpu(40 * GB, bf16=True))
    settings = run_of(8, micro_batch_size=16, batch_size=128, data={"sequence_length": 2048})
    with pytest.raises(SettingsError, match="does not fit"):
        check_memory(settings, SIX, True, 2048)
    check_memory(settings, SIX, True, 20)
    assert as_long_as(settings, 20).data.sequence_length == 24
    assert as_long_as(settings, 2041) == settings
    answering = Settings(task="question-answering", data={"stride": 40})  # type: ignore[arg-type]
    assert as_long_as(answering, 9).data.sequence_length == 41


def test_suggestions_are_written_as_command_line_settings() -> None:
    change = {"model.gradient_checkpointing": True, "micro_batch_size": 1, "adapter": {}}
    assert words(change) == "model.gradient_checkpointing=true micro_batch_size=1 'adapter={}'"
    settings = changed(run_of(2, micro_batch_size=4), change)
    assert settings.model.gradient_checkpointing
    assert settings.model.checkpoint == memory.PUBLISHED
    assert settings.adapter == AdapterSettings()


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, {}])
def test_suggestions_can_be_pasted_into_a_shell(
    adapter: dict[str, Any] | None, tmp_path: Path
) -> None:
    """Each is one word to the shell, and means the change."""
    given = {"micro_batch_size": 4, "deepspeed": {"stage": 1, "precision": "fp32"}}
    settings = run_of(2, **given, **({} if adapter is None else {"adapter": adapter}))
    (tmp_path / "run.yaml").write_text(settings.to_yaml())
    for change in memory._changes(settings, bf16=True):
        read = read_settings([str(tmp_path / "run.yaml"), *shlex.split(words(change))])
        assert read.model_dump() == changed(settings, change).model_dump()
    nested = words({"adapter": {"quantization": "nf4"}})
    printed = subprocess.run(["bash", "-c", f"echo {nested}"], capture_output=True, text=True)
    assert printed.stdout == 'adapter={"quantization": "nf4"}\n'


def test_host_memory_without_gpus_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--model=tiny", "--host-memory=64"])
    assert "give --gpu-memory too" in capsys.readouterr().err


@pytest.mark.slow
def test_the_program_prints_the_parts_and_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model=6b", "--gpus=4", "--gpu-memory=24"]
    main([*given, "deepspeed.precision=bf16", "deepspeed.stage=3", "data.train=s3://b/d"])
    printed = capsys.readouterr().out
    assert re.search(r"each GPU of 4:\n  weights +3\.03 GB\n", printed)
    assert "It does not fit 24 GB. These settings fit:" in printed
    assert "deepspeed.offload_optimizer=true" in printed
    main(["--model=tiny"])
    assert "each worker of 1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="unknown setting"):
        main([*given, "stage=3"])


@pytest.mark.slow
def test_the_memory_program_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "gptj.training.memory", "--help"]
    assert "--gpu-memory" in subprocess.run(command, capture_output=True, text=True).stdout

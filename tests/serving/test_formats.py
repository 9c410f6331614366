"""Formats of weights and of the KV cache that a generation service asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_caller import tiny_model

from deployments import generation
from deployments.generation import Arguments, new_engine_runner
from deployments.loading import load
from gptj import GPTJForCausalLM
from gptj.engine.runners.cpu.library import UnsupportedError

NOWHERE = "/no/such/folder"  # what is refused without it is refused before anything is read
settings = pytest.mark.parametrize(
    ("setting", "remedy"), [("quantization", "int8"), ("kv_cache_dtype", "auto")]
)


def arguments(**given: Any) -> Arguments:
    return Arguments.model_validate({"checkpoint": NOWHERE, **given})


@settings
def test_the_engine_gets_what_is_asked_for(
    setting: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(generation, "best_runner", lambda *model, **names: asked.update(names))
    new_engine_runner(tiny_model(), arguments(**{setting: "fp8"}, cache_tokens=64))
    assert asked[setting] == "fp8"


@settings
def test_a_cpu_is_refused_before_anything_is_read(setting: str, remedy: str) -> None:
    reason = f"{setting}=fp8 is not available: fp8 needs a GPU.* remedy: {setting}={remedy}"
    with pytest.raises(UnsupportedError, match=reason):
        load(GPTJForCausalLM, arguments(**{setting: "fp8"}), torch.device("cpu"))


@settings
@pytest.mark.parametrize(
    ("dtype", "capability", "reason"),
    [
        ("float32", (9, 0), "this one is in float32; remedy: dtype=float16"),
        ("float16", (8, 6), "A10 has compute capability 8.6, but fp8 needs 8.9 .*: {remedy}"),
    ],
)
def test_a_gpu_or_dtype_without_fp8_is_refused_before_anything_is_read(
    setting: str,
    remedy: str,
    dtype: str,
    capability: tuple[int, int],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    major, minor = capability
    properties = SimpleNamespace(name="A10", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    given = arguments(**{setting: "fp8"}, dtype=dtype)
    with pytest.raises(UnsupportedError, match=reason.format(remedy=f"{setting}={remedy}")):
        load(GPTJForCausalLM, given, torch.device("cuda"))


def test_a_remedy_works_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 needs 16 bits as well, and a GPU for our kernels."""
    turing = SimpleNamespace(name="T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: turing)
    for dtype, reason in (("float32", "dtype=float16$"), ("float16", "leave quantization out$")):
        with pytest.raises(UnsupportedError, match=reason):
            given = arguments(quantization="fp8", dtype=dtype)
            load(GPTJForCausalLM, given, torch.device("cuda"))


def test_a_format_that_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="Input should be 'auto' or 'fp8'"):
        arguments(kv_cache_dtype="int8")

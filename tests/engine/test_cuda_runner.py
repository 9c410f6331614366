"""The GPU's runner: what test_runner.py does not ask of all runners. Without a GPU on the CPU."""

from __future__ import annotations

import copy
import logging
import sys
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from engine_caller import alone, submit, tiny_model, tokens
from plain_operations import PlainOperations
from torch import Tensor

from gptj import GPTJForCausalLM
from gptj.engine import backends as choice
from gptj.engine.engine import Engine
from gptj.engine.runners.base import StepBatch
from gptj.engine.runners.cpu.library import UnsupportedError
from gptj.engine.runners.cuda.graphs import MAX_SIZE, SIZES, size_for
from gptj.engine.runners.cuda.operations import Operations
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.engine.runners.cuda.support import operations_for

PAGE = 16


def operations(model: GPTJForCausalLM) -> Operations:
    if model.device.type == "cuda":
        return operations_for(model)
    return PlainOperations(model.dtype, model.config.layer_norm_epsilon)


def decode_batch(ids: list[int], positions: list[int], pages: list[list[int]]) -> StepBatch:
    """A step of one token for each sequence."""
    count = np.arange(len(ids) + 1, dtype=np.int32)
    ids, positions, pages = (np.array(each, np.int32) for each in (ids, positions, pages))
    return StepBatch(ids, positions, count, pages, count[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("pages", [128, 10], ids=["plain", "preemption"])
def test_greedy_output_of_a_mixed_batch_equals_generate_for_each_prompt_alone(
    device: torch.device, pages: int
) -> None:
    model = tiny_model(device=device)
    runner = CudaRunner(model, pages, operations(model))
    engine = Engine(runner, eos_ids=[], max_num_seqs=6, max_num_batched_tokens=24)
    prompts = [[5, 6, 7], [8], tokens(16), tokens(17), tokens(70), tokens(40, start=3), [2, 3]]
    callers = [submit(engine, prompt, max_tokens=12 + 5 * i) for i, prompt in enumerate(prompts)]
    for i, (prompt, caller) in enumerate(zip(prompts, callers, strict=True)):
        assert caller.ids == alone(model, prompt, max_new_tokens=12 + 5 * i, eos_token_id=[])
    assert (engine.stats().preemptions > 0) == (pages == 10)
    engine.close()
    runner.close()


def test_a_sampled_output_does_not_depend_on_the_batch(device: torch.device) -> None:
    model = tiny_model(device=device)
    runner = CudaRunner(model, 64, operations(model))
    engine = Engine(runner, eos_ids=[], max_num_seqs=8)
    params = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 3, "logprobs": 2}
    params |= {"presence_penalty": 0.5, "logit_bias": {7: 1.0}}
    expected = submit(engine, [4, 5, 6], **params).ids
    callers = [submit(engine, [4, 5, 6], **params), *(submit(engine, [i, 9]) for i in range(6))]
    assert callers[0].ids == expected
    for i, caller in enumerate(callers[1:]):
        assert caller.ids == alone(model, [i, 9], eos_token_id=[])
    engine.close()
    runner.close()


@pytest.mark.parametrize("beside", [False, True], ids=["graphs", "with a prompt"])
def test_drafts_are_decode_rows_that_see_each_other(device: torch.device, beside: bool) -> None:
    """So a step with drafts replays a graph, unless a prompt is computed in it."""
    model = tiny_model(device=device)
    runner = CudaRunner(model, 8, operations(model))
    replayed: list[int] = []
    compute = runner._step_decode
    runner._step_decode = lambda batch: replayed.append(len(batch.ids_T)) or compute(batch)
    text, other = tokens(24), tokens(20, start=5)
    pages = np.array([[2, 5], [7, 0], [1, 3]], np.int32)
    for ids, place in ((text[:13], 0), (other[:1], 1)):  # what is cached before
        count = len(ids)
        runner.step(
            StepBatch(
                np.array(ids, np.int32),
                np.arange(count, dtype=np.int32),
                np.array([0, count], np.int32),
                pages[place : place + 1],
                np.array([count - 1], np.int32),
            )
        )
    replayed.clear()
    ids, positions, starts = text[13:20] + other[1:2], [*range(13, 20), 1], [0, 7, 8]
    wanted = list(range(8))
    if beside:
        ids, positions, starts = ids + text[:20], positions + list(range(20)), [*starts, 28]
        wanted += [27]
    numbers = [np.array(each, np.int32) for each in (ids, positions, starts, wanted)]
    rows = 3 if beside else 2
    logits = runner.step(StepBatch(*numbers[:3], pages[:rows], numbers[3])).cpu()  # type: ignore[call-arg]
    with torch.inference_mode():
        theirs = model(torch.tensor([text[:20]], device=device)).logits[0].cpu()
        others = model(torch.tensor([other[:2]], device=device)).logits[0].cpu()
    expected = [*theirs[13:], others[1], *([theirs[-1]] if beside else [])]
    torch.testing.assert_close(logits, torch.stack(expected), rtol=0, atol=1e-4)
    assert replayed == ([] if beside else [8])
    runner.close()


def test_padding_touches_no_page_but_the_scratch_page(device: torch.device) -> None:
    """Three rows run as four; each of the three writes one place of a page of its own."""
    model = tiny_model(device=device)
    runner = CudaRunner(model, 8, operations(model))
    runner._cache.zero_()
    runner.step(decode_batch([5, 6, 7], [0, 15, 17], [[2, 0], [5, 0], [1, 3]]))
    written = runner._cache.data.ne(0).any(dim=(0, 1, 3, 5)).nonzero().tolist()  # (page, place)
    assert written == [[2, 0], [3, 1], [5, 15], [8, 0]]
    runner.close()


def test_batches_larger_than_any_graph_run_eagerly(device: torch.device) -> None:
    model = tiny_model(device=device)
    count = MAX_SIZE + 3
    runner = CudaRunner(model, count, operations(model))
    ids = [i % 97 for i in range(count)]
    logits = runner.step(decode_batch(ids, [0] * count, [[i] for i in range(count)]))
    with torch.inference_mode():
        expected = model(torch.arange(97, device=device)[:, None]).logits[:, 0]
    torch.testing.assert_close(logits, expected[torch.tensor(ids)], rtol=0, atol=1e-4)
    runner.close()


def test_logits_survive_the_next_step(device: torch.device) -> None:
    model = tiny_model(device=device)
    runner = CudaRunner(model, 8, operations(model))
    logits = runner.step(decode_batch([5], [0], [[0]]))
    before = logits.clone()
    runner.step(decode_batch([6], [1], [[0]]))
    assert torch.equal(logits, before)
    runner.close()


def test_a_released_models_weights_live_only_in_the_runner(device: torch.device) -> None:
    model = tiny_model(device=device)
    with torch.inference_mode():
        expected = model(torch.tensor([[5]], device=device)).logits[0]
    given = copy.deepcopy(model)
    runner = CudaRunner(given, 8, operations(given), release=True)
    assert sum(parameter.numel() for parameter in given.parameters()) == 0
    logits = runner.step(decode_batch([5], [0], [[0]]))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    embedding = model.transformer.wte.weight
    biases = 4 * sum(p.numel() for name, p in model.named_parameters() if p.dim() == 1)
    matrices = 4 * sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert runner.bytes_read == matrices + biases - embedding.nbytes
    runner.close()


class Watched(PlainOperations):
    """Notes whether sums in less than fp32 were allowed to the products."""

    reduced: ClassVar[list[bool]] = []

    def multiply(self, x_TC: Tensor, weight: Tensor, *, wide: bool = False) -> Tensor:  # type: ignore[override]
        matmul = torch.backends.cuda.matmul
        self.reduced += [
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction,
        ]
        return super().multiply(x_TC, weight, wide=wide)


def test_products_accumulate_in_fp32_and_restore_the_global_setting() -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_reduced_precision_reduction = True  # the default, whatever ran before
    matmul.allow_bf16_reduced_precision_reduction = True
    Watched.reduced.clear()
    model = tiny_model()
    runner = CudaRunner(model, 8, Watched(model.dtype, model.config.layer_norm_epsilon))
    runner.step(decode_batch([5], [0], [[0]]))
    assert len(Watched.reduced) == 2 * (2 * model.config.n_layer + 1)
    assert not any(Watched.reduced)
    assert matmul.allow_fp16_reduced_precision_reduction
    assert matmul.allow_bf16_reduced_precision_reduction
    runner.close()


def test_a_layers_output_may_exceed_fp16(device: torch.device) -> None:
    """The residual stream, which it is added to, is fp32, and the last norm makes it small."""
    model = tiny_model()
    model.transformer.h[0].mlp.fc_out.weight.data *= 3e4
    half = model.to(torch.float16)
    runner = CudaRunner(copy.deepcopy(half).to(device), 8, operations(half.to(device)))
    model = half.cpu().float()
    outputs: list[Tensor] = []
    model.transformer.h[0].mlp.register_forward_hook(lambda *found: outputs.append(found[-1]))
    with torch.inference_mode():
        expected = model(torch.tensor([[5]])).logits[0]
    assert float(outputs[0].abs().max()) > 1.1 * torch.finfo(torch.float16).max
    logits = runner.step(decode_batch([5], [0], [[0]]))
    torch.testing.assert_close(logits.cpu(), expected, rtol=0, atol=0.05)
    runner.close()


def test_a_resized_cache_works_like_a_new_one(device: torch.device) -> None:
    model = tiny_model(device=device)
    runner = CudaRunner(model, 1, operations(model))
    runner.step(decode_batch([9], [0], [[0]]))
    runner.resize(8)
    fresh = CudaRunner(model, 8, operations(model))
    batch = decode_batch([5, 6, 7], [0, 0, 0], [[7], [3], [0]])
    assert runner.num_pages == 8
    assert torch.equal(runner.step(batch), fresh.step(batch))
    for each in (runner, fresh):
        each.close()


def test_each_batch_uses_the_smallest_graph_that_fits() -> None:
    assert [size_for(count) for count in (1, 2, 3, 5, 9, 64, 65)] == [1, 2, 4, 8, 16, 64, 80]
    assert all(size_for(size) == size for size in SIZES)
    assert size_for(MAX_SIZE) == 256


def test_a_model_on_a_cpu_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedError, match="the model is on cpu"):
        operations_for(tiny_model())


class ElsewhereModel(GPTJForCausalLM):
    """Says that it is on a GPU, of which there is none here."""

    device = torch.device("cuda")  # type: ignore[assignment]


def test_without_kernels_a_gpu_uses_pytorch_and_logs_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*arguments: object) -> Operations:
        raise UnsupportedError("Triton cannot be imported")

    plain = object()
    monkeypatch.setattr(choice, "operations_for", unsupported)
    monkeypatch.setattr(choice, "TorchRunner", lambda model, num_pages: plain)
    model = ElsewhereModel(tiny_model().config)
    with caplog.at_level(logging.WARNING):
        assert choice.best_runner(model, 64) is plain
    assert "on PyTorch, without our kernels: Triton cannot be imported" in caplog.text
    hopper = SimpleNamespace(name="H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: hopper)
    model = model.half()
    for name in ("int8", "int4", "fp8"):
        reason = f"{name} is not available: Triton cannot be imported"
        with pytest.raises(UnsupportedError, match=reason):
            choice.best_runner(model, 64, quantization=name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("major", "triton", "reason"),
    [(7, True, "Old GPU has compute capability 7.5"), (9, False, "Triton cannot be imported")],
)
def test_old_gpus_and_missing_triton_are_reported(
    monkeypatch: pytest.MonkeyPatch, major: int, triton: bool, reason: str
) -> None:
    properties = SimpleNamespace(name="Old GPU", major=major, minor=5, multi_processor_count=8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    if not triton:
        monkeypatch.setitem(sys.modules, "triton", None)
        for name in ("launch", "kernels"):
            monkeypatch.delitem(sys.modules, f"gptj.engine.runners.cuda.{name}", raising=False)
    with pytest.raises(UnsupportedError, match=reason):
        operations_for(ElsewhereModel(tiny_model().config))

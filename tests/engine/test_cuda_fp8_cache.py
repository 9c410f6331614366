"""A KV cache in fp8: kernels and runner against PyTorch, which computes with the same numbers.

Without a GPU it runs on the CPU, with interpreted kernels or plain operations.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton_interpreter
from engine_caller import search, submit, tiny_model, tokens
from plain_operations import PlainOperations, store
from test_cuda_kernels import DEVICE, PAGE, PAGES, Setting, decode_inputs, numbers, setting
from test_cuda_quantized_runner import CONFIG, IDS, plain_operations, prompt, random_model
from test_cuda_quantized_runner import PAGES as TABLE
from test_cuda_runner import ElsewhereModel, decode_batch
from torch import Tensor

from gptj import GPTJForCausalLM
from gptj.engine import backends as choice
from gptj.engine.cache_size import page_bytes
from gptj.engine.engine import Engine
from gptj.engine.request import BeamParams
from gptj.engine.runners.base import PageCopy
from gptj.engine.runners.cpu.library import UnsupportedError
from gptj.engine.runners.cuda import launch
from gptj.engine.runners.cuda.fp8 import FP8
from gptj.engine.runners.cuda.inputs import groups_of
from gptj.engine.runners.cuda.launch import TritonOperations
from gptj.engine.runners.cuda.operations import Cache, Chunk, Inputs, LayerCache, Operations
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.engine.runners.cuda.support import operations_for
from gptj.model import Rotary

triton_interpreter.repair()
if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("this GPU does not convert to fp8", allow_module_level=True)
# Of an output's largest number: the rounding of attention's weights to 11 and 8 bits.
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Triton's interpreter has no products in bf16.
OTHER = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
shapes = pytest.mark.parametrize(
    ("shape", "dtype"),
    [("head width 256", torch.float16), ("head width 10", OTHER)],
    ids=["head width 256", "head width 10"],
)


def random_cache(it: Setting) -> LayerCache:
    """Keys of moderate size. A value's scale is anything from 1e-8 to 100, also within a head."""
    shape = (64, it.config.n_head, PAGE)
    filled = [
        (448 * (2 * torch.rand(*shape, it.config.head_dim) - 1)).to(DEVICE, FP8) for _ in range(2)
    ]
    key_scales = 10 ** (torch.rand(shape) - 2.5)
    value_scales = 10 ** (10 * torch.rand(shape) - 8)
    return LayerCache(*filled, key_scales.to(DEVICE), value_scales.to(DEVICE))  # type: ignore[call-arg]


def dequantized(cache: LayerCache) -> LayerCache:
    """In fp32."""
    assert cache.key_scales is not None and cache.value_scales is not None
    return LayerCache(
        cache.keys.float() * cache.key_scales[..., None],
        cache.values.float() * cache.value_scales[..., None],
    )


def check_attention(it: Setting, cache: LayerCache, inputs: Inputs) -> None:
    """It is that of the dequantized cache in fp32, for each head of each token."""
    tokens = len(inputs.ids_T)
    heads, width = it.config.n_head, it.config.head_dim
    q_THK = it.random(tokens, heads, width)
    ours, theirs = it.attn_mlp(tokens).float(), it.attn_mlp(tokens).float()
    it.triton.paged_attention(q_THK, inputs, cache, ours)
    plain = PlainOperations(torch.float32, it.config.layer_norm_epsilon)
    plain.paged_attention(q_THK.float(), inputs, dequantized(cache), theirs)
    found, expected = (
        each[:, : it.config.n_embd].view(tokens, heads, width) for each in (ours, theirs)
    )
    error = (found - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert float(error.max()) < TOLERANCES[it.dtype]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processors", "places"), [(1, 16), (16, 16), (1, 32)], ids=["whole", "splits", "two pages"]
)
@shapes
def test_decode_attention_is_that_of_the_dequantized_cache(
    shape: str, dtype: torch.dtype, processors: int, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a group, whose shared pages are read once; by one or two pages at a time."""
    blocks = replace(launch.DECODE_BLOCKS[1], places=places)
    monkeypatch.setitem(launch.DECODE_BLOCKS, 1, blocks)
    it = setting(shape, dtype)
    it.triton = TritonOperations(it.config, dtype, processors * it.config.n_head // 2)
    inputs = decode_inputs([1, 15, 16, 17, 100, 70, 81, PAGES * PAGE])
    table = inputs.page_table_RP
    table[5:7, :4] = table[4, :4]
    groups = groups_of(table.cpu().numpy(), inputs.positions_T.cpu().numpy() // PAGE)
    assert groups[4:7].tolist() == [[2, 4], [-1, 4], [-1, 4]]
    check_attention(it, random_cache(it), replace(inputs, groups_R2=numbers(groups.tolist())))


@pytest.mark.slow
@shapes
def test_prefill_attention_is_that_of_the_dequantized_cache(shape: str, dtype: torch.dtype) -> None:
    it = setting(shape, dtype)
    chunks, tiles, positions = [], [], []
    for row, (count, position) in enumerate([(3, 0), (it.triton.tile + 1, 16), (2, 77)]):
        start = len(positions)
        chunks.append(Chunk(row, start, count, position))
        for first in range(0, count, it.triton.tile):
            filled = min(it.triton.tile, count - first)
            tiles.append((row, start + first, filled, position + first))
        positions += range(position, position + count)
    inputs = replace(
        decode_inputs([1, 1, 1]),
        ids_T=numbers(positions),
        positions_T=numbers(positions),
        num_decodes=0,
        chunks=tuple(chunks),
        tiles_N4=numbers(tiles),
    )
    check_attention(it, random_cache(it), inputs)


@pytest.mark.slow
@shapes
def test_attention_ignores_numbers_and_scales_that_no_token_sees(
    shape: str, dtype: torch.dtype
) -> None:
    it = setting(shape, dtype)
    cache = random_cache(it)
    decode = decode_inputs([17, 40])
    prefill = replace(
        decode,
        ids_T=numbers([0] * 7),
        positions_T=numbers([*range(13, 17), *range(37, 40)]),
        num_decodes=0,
        chunks=(Chunk(0, 0, 4, 13), Chunk(1, 4, 3, 37)),
        tiles_N4=numbers([(0, 0, 4, 13), (1, 4, 3, 37)]),
    )
    q_THK = it.random(7, it.config.n_head, it.config.head_dim)
    unseen = torch.ones(64, PAGE, dtype=torch.bool, device=DEVICE)
    for row, context in enumerate((17, 40)):
        for place in range(context):
            unseen[decode.page_table_RP[row, place // PAGE], place % PAGE] = False
    found = []
    for poison in (False, True):
        if poison:
            for part in (cache.keys, cache.values):
                part.view(torch.uint8).masked_fill_(unseen[:, None, :, None], 127)  # NaN
            for scales in (cache.key_scales, cache.value_scales):
                assert scales is not None
                scales.masked_fill_(unseen[:, None], torch.nan)
        for inputs in (decode, prefill):
            attn_mlp = it.attn_mlp(len(inputs.ids_T))
            it.triton.paged_attention(q_THK[: len(attn_mlp)], inputs, cache, attn_mlp)
            found.append(attn_mlp)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert all(each.isfinite().all() for each in found)


@pytest.mark.slow
def test_attention_is_near_that_of_an_fp16_cache() -> None:
    """Of e4m3's 3 bits, and sums of 100 places."""
    it = setting("head width 10", torch.float16)
    every = torch.arange(64 * PAGE, device=DEVICE)
    cache = random_cache(it)
    for stored, scales, plain in (
        (cache.keys, cache.key_scales, it.cache.keys),
        (cache.values, cache.value_scales, it.cache.values),
    ):
        store(stored, scales, every // PAGE, every % PAGE, plain.transpose(1, 2).flatten(0, 1))
    inputs = decode_inputs([100, 60])
    q_THK = it.random(2, it.config.n_head, it.config.head_dim)
    ours, theirs = it.attn_mlp(2), it.attn_mlp(2)
    it.triton.paged_attention(q_THK, inputs, cache, ours)
    it.triton.paged_attention(q_THK, inputs, it.cache, theirs)
    difference = (ours - theirs).float().norm() / theirs.float().norm()
    assert 1e-3 < float(difference) < 0.05


@pytest.mark.slow
@shapes
def test_numbers_of_any_size_are_cached_within_the_precision_of_e4m3(
    shape: str, dtype: torch.dtype
) -> None:
    """Each head by its own scale: tiny, large, and zeros."""
    it = setting(shape, dtype)
    config, sizes = it.config, torch.tensor([1e-4, 1, 200, 0, 6e4])
    tokens = len(sizes)
    qkv_fc_in = torch.rand(tokens, 3 * config.n_embd + config.inner_dim) - 0.5
    qkv_fc_in = (qkv_fc_in * sizes[:, None]).to(DEVICE, dtype)
    qkv_fc_in[1, config.n_embd + config.head_dim] = 300  # the second head's first key
    qkv_fc_in[:, 3 * config.n_embd :] = 0
    bias_I = torch.zeros(config.inner_dim, device=DEVICE)
    rotary = Rotary.at(torch.arange(config.n_positions, device=DEVICE)[None], config)
    tables = (
        rotary.sin_BL1R[0, :, 0, ::2].contiguous(),
        rotary.cos_BL1R[0, :, 0, ::2].contiguous(),
    )
    slots = numbers([0, 1023, 16, 15, 500])
    inputs = replace(
        decode_inputs([1] * tokens), positions_T=numbers([0, 1, 77, 127, 5]), slots_T=slots
    )
    cache = random_cache(it)
    wide = LayerCache(*(torch.zeros(cache.keys.shape, device=DEVICE) for _ in range(2)))
    q_THK = it.triton.rope_and_cache(qkv_fc_in, bias_I, tables, inputs, cache, it.attn_mlp(tokens))
    plain = PlainOperations(torch.float32, config.layer_norm_epsilon)
    attn_mlp = it.attn_mlp(tokens).float()
    expected_q = plain.rope_and_cache(qkv_fc_in.float(), bias_I, tables, inputs, wide, attn_mlp)
    torch.testing.assert_close(q_THK.float(), expected_q, rtol=1e-2, atol=1e-4)
    pages, places = slots // PAGE, slots % PAGE
    found = dequantized(cache)
    for ours, theirs in ((found.keys, wide.keys), (found.values, wide.values)):
        x, exact = ours[pages, :, places], theirs[pages, :, places]
        largest = exact.abs().amax(-1, keepdim=True)
        # Half of the last of 3 bits; below 2^-6 of e4m3, whose largest number is 224 or more, half
        # of 2^-9.
        bound = torch.maximum(exact.abs() / 16, largest / 224 / 1024) * 1.0001 + 1e-30
        assert ((x - exact).abs() <= bound).all()
        assert (x[3] == 0).all()
        torch.testing.assert_close(x.abs().amax(-1, keepdim=True), largest, rtol=1 / 16, atol=0)


@shapes
def test_copied_pages_have_their_scales(shape: str, dtype: torch.dtype) -> None:
    it = setting(shape, dtype)
    results = []
    for operations in (it.triton, it.plain):
        torch.manual_seed(1)
        cache = Cache.zeros(it.config, 3, 7, FP8, DEVICE)
        assert cache.scales is not None
        cache.data.view(torch.uint8).copy_(torch.randint(0, 127, cache.data.shape))
        cache.scales.copy_(torch.rand(cache.scales.shape))
        before = cache.scales.clone()
        operations.copy_pages(cache, [PageCopy(1, 2, filled=5), PageCopy(3, 4, filled=PAGE)])
        results.append((cache.data.view(torch.uint8), cache.scales))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(cache.scales[:, :, 2, :, :5], before[:, :, 1, :, :5])
    assert torch.equal(cache.scales[:, :, 2, :, 5:], before[:, :, 2, :, 5:])


def kernels(model: GPTJForCausalLM) -> Operations:
    if model.device.type == "cuda":
        return operations_for(model, cache_dtype=FP8)
    return TritonOperations(model.config, model.dtype, processors=1)


def difference(logits: Tensor, expected: Tensor) -> float:
    return float((logits.cpu() - expected.cpu()).abs().max() / expected.std())


@pytest.mark.slow
def test_a_runner_computes_prompts_in_chunks_and_decodes() -> None:
    """As PyTorch does with the same cache; and nearly as the model in fp32, without a cache."""
    model = random_model(DEVICE)
    runner = CudaRunner(model, 4, kernels(model), cache_dtype=FP8)
    plain = CudaRunner(model.cpu(), 4, plain_operations(), cache_dtype=FP8)
    with torch.inference_mode():
        exact = model.float()(torch.tensor([IDS])).logits[0]
    second = replace(prompt(IDS[12:30]), positions_T=np.arange(12, 30, dtype=np.int32))
    steps = [(prompt(IDS[:12]), exact[:12]), (second, exact[12:30])]
    for position in range(30, 33):
        batch = decode_batch(IDS[position : position + 1], [position], TABLE)
        steps.append((batch, exact[position : position + 1]))
    for batch, expected in steps:
        logits = runner.step(batch)
        # A key or value that lies between two numbers of e4m3 may be rounded to the other one.
        assert difference(logits, plain.step(batch)) < 0.05
        assert difference(logits, expected) < 0.2
    runner.close()
    plain.close()


def test_rows_decode_from_a_copied_page_as_from_its_source(device: torch.device) -> None:
    model = random_model(device)
    operations = operations_for(model, cache_dtype=FP8) if device.type == "cuda" else None
    runner = CudaRunner(model, 4, operations or plain_operations(), cache_dtype=FP8)
    runner.step(prompt(IDS[:20]))  # on pages 2 and 0
    runner.copy_pages([PageCopy(0, 3, filled=4)])
    expected = runner.step(decode_batch(IDS[20:21], [20], [[2, 0]]))
    assert torch.equal(runner.step(decode_batch(IDS[20:21], [20], [[2, 3]])), expected)
    runner.reset()
    other = runner.step(decode_batch(IDS[20:21], [20], [[2, 3]]))
    assert other.isfinite().all() and not torch.equal(other, expected)
    runner.close()


@pytest.mark.slow
def test_texts_are_equal_with_and_without_prefix_caching(device: torch.device) -> None:
    """Texts do not depend on whether a prefix was computed or found in the cache."""
    model = tiny_model(device=device).half()
    asked, found = tokens(40), []
    for prefix_caching in (False, True):
        operations: Operations = PlainOperations(model.dtype, model.config.layer_norm_epsilon)
        if device.type == "cuda":
            operations = operations_for(model, cache_dtype=FP8)
        runner = CudaRunner(model, 64, operations, cache_dtype=FP8)
        engine = Engine(runner, eos_ids=[], max_num_seqs=8, prefix_caching=prefix_caching)
        texts = []
        for _ in range(2):
            texts.append(submit(engine, asked).ids)
            texts += search(engine, asked, BeamParams(4, 4), max_tokens=12).beams
        assert (engine.stats().prefix_tokens_hit > 0) == prefix_caching
        found += [texts[:5], texts[5:]]
        engine.close()
        runner.close()
    assert len({str(texts) for texts in found}) == 1


def test_a_page_takes_a_byte_per_number_and_a_scale_per_head() -> None:
    runner = CudaRunner(random_model(), 9, plain_operations(), cache_dtype=FP8)
    cache = runner._cache
    assert cache.scales is not None
    page = page_bytes(CONFIG, FP8)
    assert page == 2 * 2 * 16 * (64 + 4 * 4)  # keys and values, layers, positions, width, heads
    assert cache.data.nbytes + cache.scales.nbytes == 10 * page
    runner.resize(3)
    assert runner._cache.data.nbytes == 4 * 2 * 2 * 16 * 64
    runner.close()


def test_a_gpu_gets_a_runner_with_an_fp8_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """With plain operations in place of a GPU's."""
    asked: list[object] = []

    def plain(model: object, lora: object, quantization: object, cache_dtype: object) -> Operations:
        asked.append(cache_dtype)
        return plain_operations()

    monkeypatch.setattr(choice, "operations_for", plain)
    runner = choice._gpu_runner(random_model(), 4, "none", "fp8", None, release=True)
    assert isinstance(runner, CudaRunner)
    assert asked == [FP8] and runner.cache_dtype == FP8
    runner.close()


def test_a_model_on_a_cpu_is_refused() -> None:
    reason = "kv_cache_dtype=fp8 is not available: fp8 needs a GPU.* remedy: kv_cache_dtype=auto"
    with pytest.raises(UnsupportedError, match=reason):
        choice.best_runner(random_model(), 64, kv_cache_dtype="fp8")


@pytest.mark.parametrize(
    ("dtype", "capability", "reason"),
    [
        (torch.float32, (9, 0), "float16 or bfloat16, and this one is in float32; .*dtype=float16"),
        (
            torch.float16,
            (8, 6),
            "A10 has compute capability 8.6, but fp8 needs 8.9 or more; remedy",
        ),
    ],
)
def test_gpus_and_models_without_fp8_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    capability: tuple[int, int],
    reason: str,
) -> None:
    major, minor = capability
    properties = SimpleNamespace(name="A10", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    model = ElsewhereModel(CONFIG).to(dtype)
    with pytest.raises(UnsupportedError, match=reason):
        operations_for(model, cache_dtype=FP8)
    with pytest.raises(UnsupportedError, match=f"kv_cache_dtype=fp8 is not available: .*{reason}"):
        choice.best_runner(model, 64, kv_cache_dtype="fp8")


def test_without_kernels_an_fp8_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: object) -> Operations:
        raise UnsupportedError("Triton cannot be imported")

    monkeypatch.setattr(choice, "operations_for", unsupported)
    hopper = SimpleNamespace(name="H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: hopper)
    model = ElsewhereModel(CONFIG).half()
    reason = "quantization=int8 with kv_cache_dtype=fp8 is not available: Triton cannot be imported"
    with pytest.raises(UnsupportedError, match=reason):
        choice.best_runner(model, 64, quantization="int8", kv_cache_dtype="fp8")

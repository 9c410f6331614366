"""The GPU's kernels against PyTorch; without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_operations import PlainOperations
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.jit import KernelInterface

from gptj import GPTJConfig
from gptj.adapters.config import TARGET_MODULES
from gptj.engine.adapter_weights import shape_of
from gptj.engine.runners.base import PageCopy
from gptj.engine.runners.cpu.library import UnsupportedError
from gptj.engine.runners.cuda import kernels, tuned_linear
from gptj.engine.runners.cuda.inputs import ALONE, groups_of
from gptj.engine.runners.cuda.launch import TritonOperations
from gptj.engine.runners.cuda.lora import LoRASlots
from gptj.engine.runners.cuda.operations import MAX_GROUP, Cache, Chunk, Inputs, LayerCache
from gptj.engine.runners.cuda.support import try_out
from gptj.engine.runners.cuda.tuned_linear import Blocks, multiply_row
from gptj.engine.runners.cuda.weights import Norm
from gptj.engine.runners.lora import NONE, LoRALimits, LoRAPair, LoRAWeights
from gptj.model import Rotary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE = 16
PAGES = 8  # of a sequence
# Relative to the largest number: fp32's order of summation, and two roundings to fp16's 11 bits.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}

# GPT-J's head width, and one that fills no power of two.
SHAPES = {
    "head width 256": {"n_embd": 512, "n_head": 2, "rotary_dim": 64, "n_inner": 1100},
    "head width 10": {"n_embd": 40, "n_head": 4, "rotary_dim": 6, "n_inner": 52},
}
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=["fp32", "fp16"])
shapes = pytest.mark.parametrize(
    ("shape", "dtype"), list(zip(SHAPES, TOLERANCES, strict=True)), ids=["256 fp32", "10 fp16"]
)


def setting(shape: str, dtype: torch.dtype) -> Setting:
    return Setting(GPTJConfig(n_positions=PAGES * PAGE, **SHAPES[shape]), dtype)


class Setting:
    """A layer's cache of random numbers, and both forms of the operations."""

    def __init__(self, config: GPTJConfig, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.config, self.dtype = config, dtype
        self.triton = TritonOperations(config, dtype, processors=1)
        self.plain = PlainOperations(dtype, config.layer_norm_epsilon)
        self.cache = self._new_cache()

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape).to(DEVICE, dtype or self.dtype)

    def attn_mlp(self, tokens: int) -> Tensor:
        width = self.config.n_embd + self.config.inner_dim
        return torch.zeros(tokens, width, dtype=self.dtype, device=DEVICE)

    def near(self, ours: Tensor, theirs: Tensor) -> None:
        difference = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        assert float(difference) < TOLERANCES[self.dtype]

    def attended(self, inputs: Inputs) -> None:
        """Both forms attend alike."""
        tokens = len(inputs.ids_T)
        q_THK = self.random(tokens, self.config.n_head, self.config.head_dim)
        ours, theirs = self.attn_mlp(tokens), self.attn_mlp(tokens)
        self.triton.paged_attention(q_THK, inputs, self.cache, ours)
        self.plain.paged_attention(q_THK, inputs, self.cache, theirs)
        self.near(ours, theirs)

    def _new_cache(self) -> LayerCache:
        shape = (64, self.config.n_head, PAGE, self.config.head_dim)
        return LayerCache(self.random(*shape), self.random(*shape))


def numbers(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def decode_inputs(contexts: list[int]) -> Inputs:
    """A token at the end of each context, whose pages lie scattered."""
    count = len(contexts)
    pages = torch.randperm(64)[: count * PAGES].view(count, PAGES)
    positions = numbers([context - 1 for context in contexts])
    table = numbers(pages.tolist())
    return Inputs(numbers([0] * count), positions, positions, table, alone(count), count)


def alone(count: int) -> Tensor:
    return numbers([ALONE] * count)


@pytest.mark.slow
@pytest.mark.parametrize(("processors", "splits"), [(1, 1), (4, 2), (16, 8)])
@shapes
def test_decode_attention_over_ragged_contexts_and_scattered_pages(
    shape: str, dtype: torch.dtype, processors: int, splits: int
) -> None:
    """Contexts that end before, at and after a page's border; some with fewer pages than runs."""
    contexts = [1, 15, 16, 17, 100, PAGES * PAGE]
    it = setting(shape, dtype)
    it.triton = TritonOperations(it.config, dtype, processors * it.config.n_head // 2)
    assert it.triton.splits(len(contexts)) == splits
    it.attended(decode_inputs(contexts))


@pytest.mark.slow
@pytest.mark.parametrize(("processors", "splits"), [(1, 1), (16, 8)])
@shapes
def test_decode_attention_reads_shared_pages_once(
    shape: str, dtype: torch.dtype, processors: int, splits: int
) -> None:
    """A group that ends in a page that all share, one with pages of their own, and two without."""
    it = setting(shape, dtype)
    it.triton = TritonOperations(it.config, dtype, processors * it.config.n_head // 2)
    assert it.triton.splits(7) == splits
    contexts = [100, 70, 81, PAGES * PAGE, 65, 66, 30]
    inputs = decode_inputs(contexts)
    table = inputs.page_table_RP
    table[1:3, :4], table[5, :4] = table[0, :4], table[4, :4]
    groups = groups_of(table.cpu().numpy(), inputs.positions_T.cpu().numpy() // PAGE)
    assert groups.tolist() == [[2, 4], [-1, 4], [-1, 4], [0, 0], [1, 4], [-1, 4], [0, 0]]
    it.attended(replace(inputs, groups_R2=numbers(groups.tolist())))


def test_groups_share_pages_that_all_their_tokens_see_wholly() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        rows, width = int(random.integers(1, 60)), int(random.integers(4, 12))
        table = random.integers(0, 2, (rows, width), dtype=np.int32)
        table[:, : int(random.integers(0, width + 1))] = 7
        full = random.integers(0, width, rows, dtype=np.int32)
        groups = groups_of(table, full).tolist()
        first = 0
        while first < rows:
            others, shared = groups[first]
            count = others + 1
            assert 1 <= count <= MAX_GROUP and (count > 1) == (shared > 0)
            own = slice(first, first + count)
            assert (table[own, :shared] == table[first, :shared]).all()
            assert full[own].min() >= shared
            assert groups[first + 1 : first + count] == [[-1, shared]] * (count - 1)
            first += count


def test_large_groups_are_several_and_short_prefixes_none() -> None:
    table = np.zeros((40, 12), np.int32)
    full = np.full(40, 10, np.int32)
    assert (groups_of(table, full)[:, 0] > 0).nonzero()[0].tolist() == [0, 16, 32]
    table[20:, 3] = 1
    groups = groups_of(table, full).tolist()
    assert groups[20:] == [[15, 10]] + [[-1, 10]] * 15 + [[3, 10]] + [[-1, 10]] * 3
    assert groups_of(table[19:21], full[19:21]).tolist() == [[0, 0], [0, 0]]


@pytest.mark.slow
@shapes
def test_prefill_attention_is_causal_and_sees_the_past(shape: str, dtype: torch.dtype) -> None:
    """Chunks that end before, at and after a tile's border, with and without a past."""
    it = setting(shape, dtype)
    tile = it.triton.tile
    sizes = [(3, 0), (tile - 1, 33), (tile, 0), (tile + 1, 16), (2 * tile + 5, 47)]
    chunks, start = [], 1  # after a single token
    for row, (tokens, position) in enumerate(sizes, start=1):
        chunks.append(Chunk(row, start, tokens, position))
        start += tokens
    positions = [20] + [p for c in chunks for p in range(c.position, c.position + c.tokens)]
    tiles = [
        (c.row, c.start + first, min(tile, c.tokens - first), c.position + first)
        for c in chunks
        for first in range(0, c.tokens, tile)
    ]
    tables = decode_inputs([1] * 6).page_table_RP
    it.attended(
        Inputs(
            numbers([0] * start),
            numbers(positions),
            numbers([0] * start),
            tables,
            alone(6),
            1,
            tuple(chunks),
            numbers(tiles),
        )
    )


@pytest.mark.slow
@dtypes
def test_attention_ignores_memory_beyond_the_context(dtype: torch.dtype) -> None:
    it = setting("head width 10", dtype)
    inputs = decode_inputs([17, 40])
    q_THK = it.random(2, it.config.n_head, it.config.head_dim)
    clean, other = it.attn_mlp(2), it.attn_mlp(2)
    it.triton.paged_attention(q_THK, inputs, it.cache, clean)
    for row, context in enumerate((17, 40)):
        for place in range(context, PAGES * PAGE):
            page = int(inputs.page_table_RP[row, place // PAGE])
            it.cache.keys[page, :, place % PAGE] = torch.nan
            it.cache.values[page, :, place % PAGE] = torch.nan
    it.triton.paged_attention(q_THK, inputs, it.cache, other)
    assert torch.equal(clean, other)


@shapes
def test_rope_and_cache_rotates_and_stores_at_the_right_slots(
    shape: str, dtype: torch.dtype
) -> None:
    it = setting(shape, dtype)
    config, tokens = it.config, 5
    qkv_fc_in = it.random(tokens, 3 * config.n_embd + config.inner_dim)
    bias_I = it.random(config.inner_dim, dtype=torch.float32)
    rotary = Rotary.at(torch.arange(config.n_positions, device=DEVICE)[None], config)
    tables = (
        rotary.sin_BL1R[0, :, 0, ::2].contiguous(),
        rotary.cos_BL1R[0, :, 0, ::2].contiguous(),
    )
    positions, slots = numbers([0, 1, 77, 127, 5]), numbers([0, 1023, 16, 15, 500])
    inputs = Inputs(
        numbers([0] * tokens),
        positions,
        slots,
        decode_inputs([1] * tokens).page_table_RP,
        alone(5),
        5,
    )
    results = []
    for operations in (it.triton, it.plain):
        cache = LayerCache(it.cache.keys.clone(), it.cache.values.clone())
        attn_mlp = it.attn_mlp(tokens)
        q_THK = operations.rope_and_cache(qkv_fc_in, bias_I, tables, inputs, cache, attn_mlp)
        results.append((q_THK, cache.keys, cache.values, attn_mlp))
    for ours, theirs in zip(*results, strict=True):
        it.near(ours, theirs)
    assert torch.equal(results[0][2], results[1][2])


@shapes
def test_add_and_norm(shape: str, dtype: torch.dtype) -> None:
    it = setting(shape, dtype)
    width = it.config.n_embd
    stream = 1e3 * it.random(3, width, dtype=torch.float32) + 5e3  # a mean that could drown it
    added_TD, bias_D = it.random(3, width), it.random(width, dtype=torch.float32)
    norm = Norm(*(it.random(width, dtype=torch.float32) for _ in range(2)))
    for added in (None, (added_TD, bias_D)):
        results = []
        for operations in (it.triton, it.plain):
            x_TD = stream.clone()
            arguments = (None, None) if added is None else added
            results.append((operations.add_and_norm(x_TD, *arguments, norm), x_TD))  # type: ignore[call-arg]
        for ours, theirs in zip(*results, strict=True):
            it.near(ours, theirs)


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("blocks", [Blocks(1, 64, 4), Blocks(4, 32, 4)])
def test_gemv_with_any_number_of_columns_and_inputs(dtype: torch.dtype, blocks: Blocks) -> None:
    it = setting("head width 10", dtype)
    x_1C, weight = it.random(1, 100), it.random(37, 100)
    expected = F.linear(x_1C.float(), weight.float())
    it.near(multiply_row(x_1C, weight, blocks, wide=False), expected)
    wide = multiply_row(x_1C, weight, blocks, wide=True)
    torch.testing.assert_close(wide, expected, rtol=0, atol=1e-4)  # nothing is rounded but sums


@pytest.mark.slow
@shapes
@pytest.mark.parametrize("rank", [1, 24])
def test_adapter_products_are_added_per_token(shape: str, dtype: torch.dtype, rank: int) -> None:
    """Of two slots with other ranks, one without some modules; of single tokens and of a chunk."""
    it = setting(shape, dtype)
    config, limits = it.config, LoRALimits(max_loras=3, max_lora_rank=rank)
    config.n_layer = 1
    slots = LoRASlots(config, limits, dtype, DEVICE)
    for slot, modules in ((2, TARGET_MODULES), (0, ("q_proj", "fc_out"))):
        own = max(1, rank - 3 * slot)
        pairs = {
            module: LoRAPair(*(0.1 * torch.randn(size) for size in ((own, inputs), (outputs, own))))
            for module in modules
            for outputs, inputs in [shape_of(config, module)]
        }
        slots.put(slot, LoRAWeights(own, (pairs,), b""))
    adapters = numbers([2, NONE, 0, 2, 2, 2])
    inputs = replace(
        decode_inputs([1] * 6),
        num_decodes=3,
        adapters_T=adapters,
        chunks=(Chunk(3, 3, 3, 0, adapter=2),),
    )
    (layer,) = slots.layers
    width, inner = config.n_embd, config.inner_dim
    for adapted, columns, width_in, wide in (
        (layer.qkv_fc_in, 3 * width + inner, width, False),
        (layer.out_proj_fc_out, width, width + inner, True),
    ):
        x_TI = it.random(6, width_in)
        y_TO = it.random(6, columns, dtype=torch.float32 if wide else dtype)
        ours, theirs = y_TO.clone(), y_TO.clone()
        it.triton.add_lora(ours, x_TI, adapted, inputs)
        it.plain.add_lora(theirs, x_TI, adapted, inputs)
        it.near(ours, theirs)
        assert torch.equal(ours[1], y_TO[1])
        assert not torch.equal(ours[0], y_TO[0]) and not torch.equal(ours[5], y_TO[5])


@shapes
def test_copied_pages_hold_the_filled_positions(shape: str, dtype: torch.dtype) -> None:
    it = setting(shape, dtype)
    config = it.config
    cache = it.random(2, 3, 7, config.n_head, PAGE, config.head_dim)
    copies = [PageCopy(1, 2, filled=5), PageCopy(3, 4, filled=PAGE), PageCopy(1, 6, filled=1)]
    ours, theirs = cache.clone(), cache.clone()
    it.triton.copy_pages(Cache(ours, None), copies)
    it.plain.copy_pages(Cache(theirs, None), copies)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours[:, :, 2, :, :5], cache[:, :, 1, :, :5])
    assert torch.equal(ours[:, :, 2, :, 5:], cache[:, :, 2, :, 5:])


def test_caches_of_more_than_2_31_elements_are_addressed_correctly() -> None:
    """On a CPU only the pages that are touched take memory, of 17 GB."""
    it = setting("head width 256", torch.float32)
    config = it.config
    last = 2**31 // (config.n_head * PAGE * config.head_dim) + 5
    whole = torch.empty(2, 1, last + 1, config.n_head, PAGE, config.head_dim, device=DEVICE)
    page = it.random(2, config.n_head, PAGE, config.head_dim)
    whole[:, 0, last - 1] = page
    it.triton.copy_pages(Cache(whole, None), [PageCopy(last - 1, last, filled=PAGE)])
    assert torch.equal(whole[:, 0, last], page)

    it.cache = LayerCache(whole[0, 0], whole[1, 0])
    table = numbers([[last] + [0] * (PAGES - 1)])
    zeros, slots = numbers([0, 0]), numbers([last * PAGE, last * PAGE + 1])
    rotary = (torch.zeros(PAGES * PAGE, 32, device=DEVICE),) * 2
    qkv_fc_in = it.random(2, 3 * config.n_embd + config.inner_dim)
    bias_I = torch.zeros(config.inner_dim, device=DEVICE)
    inputs = Inputs(zeros, zeros, slots, table, alone(2), 2)
    it.triton.rope_and_cache(qkv_fc_in, bias_I, rotary, inputs, it.cache, it.attn_mlp(2))
    values = qkv_fc_in[:, 2 * config.n_embd : 3 * config.n_embd].view(2, config.n_head, -1)
    assert torch.equal(it.cache.values[last, :, :2], values.transpose(0, 1))

    it.attended(Inputs(zeros[:1], numbers([PAGE - 1]), slots[:1], table, alone(1), 1))
    chunk = Chunk(0, 0, PAGE, 0)
    many, places = numbers([0] * PAGE), numbers(list(range(PAGE)))
    tiles = numbers([[0, 0, PAGE, 0]])
    it.attended(Inputs(many, places, many, table, alone(1), 0, (chunk,), tiles))


class Broken:
    """A kernel that fails as it is launched."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*arguments: object, **names: object) -> None:
            raise self._error

        return launch


# `prepare` skips its candidates; parts of other kernels.
NOT_TRIED = ("multiply_row", "attend", "attend_fp8", "fp8_scale")
KERNELS = [
    name
    for name, kernel in vars(kernels).items()
    if isinstance(kernel, KernelInterface) and name not in NOT_TRIED
]
ERRORS = [
    OutOfResources(300_000, 232_448, "shared memory"),
    PTXASError("ptxas fatal"),
    OSError("no space left on device"),
    RuntimeError("no C compiler was found"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_tried_before_the_weights_are_released(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = setting("head width 10", torch.float32)
    monkeypatch.setattr(kernels, name, Broken(ERRORS[0]))
    with pytest.raises(UnsupportedError, match="OutOfResources: out of resource: shared memory"):
        try_out(it.triton, DEVICE, LoRALimits(max_loras=1, max_lora_rank=2))


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_failure_of_triton_falls_back_to_pytorch(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = setting("head width 10", torch.float32)
    try_out(it.triton, DEVICE)
    monkeypatch.setattr(kernels, "paged_prefill_attention", Broken(error))
    with pytest.raises(UnsupportedError, match=f"{type(error).__name__}: "):
        try_out(it.triton, DEVICE)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_gemv_that_does_not_compile_falls_back_to_pytorch(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def seconds(multiply: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> float:
        multiply(weights[0])
        return 1.0

    it = setting("head width 10", torch.float32)
    weight, row = it.random(37, 100), it.random(1, 100)
    monkeypatch.setattr(tuned_linear, "seconds_of", seconds)
    monkeypatch.setattr(kernels, "multiply_row", Broken(error))
    chooser = tuned_linear.TunedLinear()
    chooser.tune([weight], wide=True)
    assert caplog.text.count("is not available") == len(tuned_linear.CANDIDATES)
    it.near(chooser.multiply(row, weight, wide=True), F.linear(row, weight))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [[], pytest.param(["--all"], marks=pytest.mark.nightly)], ids=["one", "all"]
)
def test_the_kernels_compile_for_other_gpus(
    arguments: list[str], pytestconfig: pytest.Config
) -> None:
    """Triton's own compiler and NVIDIA's assembler, for GPT-J 6B: on two GPUs, or on all.

    With all, also the candidates that tuning measures. Triton keeps what it has compiled, by the
    hash of all that it depends on: the next run compiles what has changed.
    """
    assert pytestconfig.cache is not None
    folder = str(pytestconfig.cache.mkdir("triton"))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": folder}
    script = Path(__file__).parents[1] / "support" / "compile_kernels.py"
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=590,
    )
    assert result.returncode == 0, result.stderr

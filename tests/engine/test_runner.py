"""The runners: logits over a paged cache, against the model without one."""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_operations import PlainOperations
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from gptj import GPTJConfig, GPTJForCausalLM
from gptj.engine import sampler, sampling_batch
from gptj.engine.backends import best_runner
from gptj.engine.cache_size import page_bytes
from gptj.engine.runners.base import PageCopy, Runner, StepBatch, independent_groups
from gptj.engine.runners.cpu import library
from gptj.engine.runners.cpu.packing import KINDS, Kind, pack, quantized
from gptj.engine.runners.cpu.runner import CpuRunner
from gptj.engine.runners.cuda.launch import TritonOperations
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.engine.runners.torch_runner import TorchRunner
from gptj.layers.int4 import GROUP_SIZE, Int4Weight, quantize, quantize_blocks
from gptj.sampling import SamplingParams

PAGE = 16
LENGTH = 60
INTERPRETED = 34  # tokens in Triton's interpreter: each takes ten milliseconds a layer
# Differences to the model in fp32, in units of the logits' standard deviation. fp32: the order of
# summation; fp16 and bf16: 11 and 8 bits of each number; int8: 7 bits of weights and activations.
# int4 is compared with the same 4-bit weights in PyTorch: 7 bits of activations and of the head.
TOLERANCES = {
    "torch": 1e-5,
    "plain": 1e-5,
    "triton": 1e-5,
    "triton fp16": 0.01,
    "fp32": 1e-5,
    "bf16": 0.05,
    "int8": 0.12,
    "int4": 0.12,
}
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")

KERNEL_LEVELS = [
    name for name, (flags, _) in library.LEVELS.items() if set(flags) <= library.processor_flags()
]
needs_kernels = pytest.mark.skipif(not KERNEL_LEVELS, reason="the processor has no AVX2")


def config(**changes: object) -> GPTJConfig:
    settings = {
        "vocab_size": 300,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 8,
        "n_positions": 128,
    }
    return GPTJConfig(**{**settings, **changes})


# Shapes in which something does not fill a vector or a block, and GPT-J's own head width.
SHAPES = {
    "plain": {},
    "wide heads": {"n_embd": 512, "n_head": 2, "rotary_dim": 64, "vocab_size": 97},
    "odd sizes": {"n_embd": 40, "n_head": 4, "rotary_dim": 6, "vocab_size": 101, "n_inner": 52},
    "all rotated": {"n_embd": 96, "n_head": 2, "rotary_dim": None},
}


def random_model(**changes: object) -> GPTJForCausalLM:
    torch.manual_seed(0)
    model = GPTJForCausalLM(config(**changes)).eval()
    for parameter in model.parameters():
        # Norms and biases that do something, and logits that differ.
        noise = torch.randn_like(parameter)
        parameter.data = 0.05 * noise if parameter.dim() > 1 else parameter.data + 0.1 * noise
    return model


def gpu_runner(model: GPTJForCausalLM, num_pages: int, kind: str) -> CudaRunner:
    """The GPU's runner; where there is none, on the CPU, with PyTorch or Triton's interpreter."""
    dtype = torch.float16 if kind == "triton fp16" else torch.float32
    model = copy.deepcopy(model).to(GPU, dtype)
    if kind == "plain":
        operations = PlainOperations(dtype, model.config.layer_norm_epsilon)
        return CudaRunner(model, num_pages, operations)
    # As if of one multiprocessor: contexts are then cut for some sizes of a batch, not for all.
    return CudaRunner(model, num_pages, TritonOperations(model.config, dtype, 1))


# Operators by which the host waits for a number of the device.
WAITING = {"is_nonzero", "item", "_local_scalar_dense", "nonzero", "equal"}


@dataclass
class Case:
    model: GPTJForCausalLM  # in fp32, on the CPU
    runner: Runner
    tolerance: float
    length: int = LENGTH  # of a long sequence


@pytest.fixture(params=list(TOLERANCES))
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Case]]:
    """Makes a model with a runner of each kind; fp32, bf16, int8 and int4 are our CPU kernels."""
    if request.param in KINDS and not KERNEL_LEVELS:
        pytest.skip("the processor has no AVX2")
    if request.param == "triton fp16" and GPU.type == "cpu":
        pytest.skip("no CUDA device on this machine")
    runners: list[Runner] = []

    def make_case(num_pages: int = 32, **changes: Any) -> Case:
        interpreted = request.param == "triton" and GPU.type == "cpu"
        if request.param == "int4":  # whose inputs are whole groups
            widths = {name: changes[name] for name in ("n_embd", "n_inner") if name in changes}
            changes |= {
                name: -(-width // GROUP_SIZE) * GROUP_SIZE for name, width in widths.items()
            }
        model = random_model(**({"n_layer": 1} if interpreted else {}), **changes)
        runner: Runner
        if request.param == "torch":
            runner = TorchRunner(model, num_pages)
        elif request.param not in KINDS:
            runner = gpu_runner(model, num_pages, request.param)
        else:
            runner = CpuRunner(model, num_pages, request.param)
        if request.param == "int4":
            quantize_blocks(model.transformer.h)
        runners.append(runner)
        length = INTERPRETED if interpreted else LENGTH
        return Case(model, runner, TOLERANCES[request.param], length)

    yield make_case
    for runner in runners:
        runner.close()


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def random_ids(count: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, count).astype(np.int32)


@torch.inference_mode()
def step(runner: Runner, *sequences: tuple[np.ndarray, int, list[int]]) -> list[Tensor]:
    """One step of (ids, position of the first, pages); all logits of each sequence."""
    lengths = [len(ids) for ids, _, _ in sequences]
    most = max(len(pages) for _, _, pages in sequences)
    logits = runner.step(
        StepBatch(
            np.concatenate([ids for ids, _, _ in sequences]),
            np.concatenate([first + np.arange(len(ids)) for ids, first, _ in sequences]).astype(
                np.int32
            ),
            np.cumsum([0, *lengths]).astype(np.int32),
            np.array([pages + [0] * (most - len(pages)) for _, _, pages in sequences], np.int32),
            np.arange(sum(lengths), dtype=np.int32),
        )
    )
    return list(logits.cpu().split(lengths))


@torch.inference_mode()
def reference(model: GPTJForCausalLM, ids: np.ndarray) -> Tensor:
    return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].float()


def assert_near(case: Case, ours: Tensor, ids: np.ndarray) -> None:
    theirs = reference(case.model, ids)
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.std()) < case.tolerance


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_the_models_with_scattered_pages_and_chunks(
    make: Callable[..., Case], shape: str
) -> None:
    case = make(**SHAPES[shape])
    ids = random_ids(case.length, case.model.config.vocab_size)
    pages = [7, 3, 31, 0]
    ends = (0, 18, 19, 34) if case.length == INTERPRETED else (0, 25, 26, 44, 49, 60)
    chunks = [
        step(case.runner, (ids[start:end], start, pages))[0]
        for start, end in itertools.pairwise(ends)
    ]
    assert_near(case, torch.cat(chunks), ids)


@pytest.mark.slow
def test_sequences_in_a_step_are_independent(make: Callable[..., Case]) -> None:
    case = make()
    long, short = random_ids(case.length, 300, 1), random_ids(9, 300, 2)
    before = case.length - 10
    step(case.runner, (long[:before], 0, [1, 2, 3, 4]))
    after, whole = step(case.runner, (long[before:], before, [1, 2, 3, 4]), (short, 0, [5]))
    assert_near(case, whole, short)
    assert float((after - reference(case.model, long)[before:]).abs().max()) < 2 * case.tolerance


@pytest.mark.slow
@pytest.mark.parametrize("filled", [4, 5])  # the second ends within a word of two positions
def test_a_copied_page_is_independent(make: Callable[..., Case], filled: int) -> None:
    case = make()
    ids, start = random_ids(LENGTH, 300), 16 + filled
    step(case.runner, (ids[:start], 0, [1, 2]))
    with torch.inference_mode():
        case.runner.copy_pages([PageCopy(2, 9, filled)])
    other = random_ids(10, 300, 5)
    step(case.runner, (other, start, [1, 2]))  # overwrites what follows in page 2, not in page 9
    (rest,) = step(case.runner, (ids[start:30], start, [1, 9]))
    assert float((rest - reference(case.model, ids[:30])[start:]).abs().max()) < 2 * case.tolerance


@pytest.mark.slow
def test_a_reset_cache_works(make: Callable[..., Case]) -> None:
    case = make()
    ids = random_ids(case.length, 300)
    step(case.runner, (ids, 0, [1, 2, 3, 4]))
    case.runner.reset()
    assert_near(case, step(case.runner, (ids, 0, [4, 3, 2, 1]))[0], ids)


@pytest.mark.slow
@pytest.mark.parametrize("length", [20, 19])
def test_unused_slots_of_a_page_do_not_matter(make: Callable[..., Case], length: int) -> None:
    """A page may have been another request's, whose output was not finite."""
    case = make()
    ids = random_ids(length, 300)
    (clean,) = step(case.runner, (ids, 0, [1, 2]))
    wte = case.model.transformer.wte.weight
    if isinstance(case.runner, CudaRunner):
        case.runner._cache.data[:, :, 1:3] = torch.nan
    elif isinstance(case.runner, CpuRunner):
        case.runner._cache[:, :, 1:3] = torch.nan
    else:
        assert isinstance(case.runner, TorchRunner)
        assert wte.isfinite().all()
        case.runner._keys[:, 1:3] = torch.nan
        case.runner._values[:, 1:3] = torch.nan
    (again,) = step(case.runner, (ids, 0, [1, 2]))
    assert torch.equal(clean, again)


@pytest.mark.parametrize("kind", ["torch", "plain", pytest.param("cpu", marks=needs_kernels)])
def test_logits_closer_than_bf16_resolution_are_distinguished(kind: str) -> None:
    """Near 20 bf16's numbers are 0.125 apart: 20 and 20.0625 would be one, and the first win."""
    model = random_model().to(torch.bfloat16)
    model.transformer.ln_f.weight.data.fill_(0)
    model.transformer.ln_f.bias.data.fill_(0.5)
    model.lm_head.weight.data.fill_(0)
    model.lm_head.bias.data.fill_(0)
    model.lm_head.weight.data[5:7] = 0.625
    model.lm_head.weight.data[6, 0] += 0.125
    runner: Runner
    if kind == "torch":
        runner = TorchRunner(model, 8)
    elif kind == "plain":
        operations = PlainOperations(torch.bfloat16, model.config.layer_norm_epsilon)
        runner = CudaRunner(model, 8, operations)
    else:
        runner = CpuRunner(model, 8, "bf16")
    for ids in (numbers(7), numbers(7, 8, 9)):  # as a decode step, and as a chunk
        (logits,) = step(runner, (ids, 0, [2]))
        assert logits.dtype == torch.float32
        assert logits[-1, 5:7].tolist() == [20.0, 20.0625]
        assert int(logits[-1].argmax()) == 6
    runner.close()


class Operators(TorchDispatchMode):
    """The names of PyTorch's operators that were called, and which kernels attention took."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attention: list[SDPBackend] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.names.add(function.__name__.partition(".")[0])
        if function is torch.ops.aten.scaled_dot_product_attention.default:
            self.attention.append(SDPBackend(torch._fused_sdp_choice(*args, **kwargs)))
        return function(*args, **kwargs)


@pytest.mark.parametrize("kind", ["torch", "plain"])
def test_attention_uses_fused_kernels_without_synchronizing(kind: str) -> None:
    """Also on a T4, which has PyTorch's alone. A step waits for no number of the device's.

    With a mask and in fp32 a GPU takes another of the fused kernels than a CPU.
    """
    model = random_model().to(GPU)
    runner = TorchRunner(model, 8) if kind == "torch" else gpu_runner(model, 8, "plain")
    with Operators() as called:
        step(runner, (random_ids(20, 300), 0, [1, 2]), (random_ids(1, 300), 0, [3]))
    assert len(called.attention) == 2 * model.config.n_layer
    assert SDPBackend.MATH not in called.attention
    assert not called.names & WAITING
    runner.close()


def test_sampling_synchronizes_only_to_read_the_tokens() -> None:
    """Also where top_p keeps more tokens than are looked at first: then all is drawn again."""
    wide = SamplingParams(temperature=1.0, top_p=0.95, min_p=1e-9, seed=5, logprobs=3)
    narrow = replace(wide, top_p=0.2, presence_penalty=0.5, logit_bias={3: 1.0})
    logits_RV = torch.linspace(0, 1, 9000).repeat(2, 1)[:, torch.randperm(9000)]
    expected = []
    for first in (sampling_batch.CANDIDATES, 9000):
        chooser = sampler.Sampler([7], torch.device("cpu"), 9000)
        for key, params in enumerate((wide, narrow)):
            chooser.add(key, params, [1], [])
        chooser._states[0].candidates = first
        with torch.inference_mode(), Operators() as called:
            expected.append([chooser.sample(logits_RV.clone(), [0, 1]) for _ in range(20)])
        assert chooser._states[0].candidates > 8000  # 0.95 of nearly equal ones
        assert not called.names & WAITING
    assert expected[0] == expected[1]


@pytest.mark.slow
def test_a_seeded_token_is_independent_of_other_rows_and_threads() -> None:
    """At every top_p about the likeliest token's probability, whose last bit must be the same."""
    logits_RV = torch.randn(32, 50400, generator=torch.Generator().manual_seed(0))
    logits_RV[:, :3] += 11.5  # about as likely as all others together, so a token more is drawn
    likeliest_R = logits_RV.softmax(dim=-1).amax(dim=-1).numpy()
    tops_PR = [likeliest_R]
    for direction in (0, 1):
        near_R = likeliest_R
        for _ in range(2):
            near_R = np.nextafter(near_R, np.float32(direction))
            tops_PR.append(near_R)
    threads = torch.get_num_threads()
    drawn = []
    try:
        for threads_used, rows in ((2, 1), (2, 32), (1, 32)):
            torch.set_num_threads(threads_used)
            tokens: list[int] = []
            for top_p_R, seed in itertools.product(tops_PR, range(2)):
                chooser = sampler.Sampler([], torch.device("cpu"), 50400)
                for row, top_p in enumerate(top_p_R.tolist()):
                    chooser.add(row, SamplingParams(top_p=top_p, seed=seed), [1], [])
                for start in range(0, 32, rows):
                    keys = list(range(start, start + rows))
                    tokens += chooser.sample(logits_RV[keys].clone(), keys).tokens
                chooser.close()
            drawn.append(tokens)
    finally:
        torch.set_num_threads(threads)
    assert drawn.count(drawn[0]) == len(drawn)
    assert len(set(drawn[0])) > 1


def test_dependent_page_copies_are_made_in_separate_groups() -> None:
    a, b = PageCopy(1, 2, 3), PageCopy(1, 4, 3)
    freed, again = PageCopy(5, 1, 7), PageCopy(2, 6, 1)
    assert list(independent_groups([a, b])) == [[a, b]]
    assert list(independent_groups([a, freed])) == [[a], [freed]]  # page 1 was handed out again
    assert list(independent_groups([a, b, again, freed])) == [[a, b], [again, freed]]
    assert list(independent_groups([])) == []


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_bitwise_independent_of_batch_and_chunks(kind: str) -> None:
    runner = CpuRunner(random_model(n_embd=192, n_head=3), 256, kind, threads=2)  # type: ignore[arg-type]
    ids = random_ids(40, 300)
    (whole,) = step(runner, (ids, 0, [0, 1, 2]))
    one_by_one = [step(runner, (ids[i : i + 1], i, [3, 4, 5]))[0] for i in range(40)]
    assert torch.equal(whole, torch.cat(one_by_one))
    ends = (0, 11, 19, 22, 24, 29, 40)  # any number of queries may be left
    chunks = [step(runner, (ids[i:j], i, [3, 4, 5]))[0] for i, j in itertools.pairwise(ends)]
    assert torch.equal(whole, torch.cat(chunks))
    for others in (1, 7, 12, 13, 30):
        beside = [(random_ids(3, 300, other), 0, [20 + other]) for other in range(others)]
        assert torch.equal(whole, step(runner, *beside, (ids, 0, [6, 7, 8]))[-1]), others
    runner.close()


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])
def test_kernels_are_bitwise_independent_of_threads(threads: int) -> None:
    model = random_model()
    ids = random_ids(LENGTH, 300)
    results = []
    for count in (2, threads):
        runner = CpuRunner(model, 8, "bf16", threads=count)
        results += step(runner, (ids, 0, [0, 1, 2, 3]))
        runner.close()
    assert torch.equal(*results)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_kernels_propagate_nonfinite_values(kind: str, broken: float) -> None:
    model = random_model()
    model.transformer.wte.weight.data[5, 3] = broken
    runner = CpuRunner(model, 8, kind)  # type: ignore[arg-type]
    bad, good = step(runner, (numbers(1, 5, 2), 0, [0]), (numbers(1, 6, 2), 0, [1]))
    assert good.isfinite().all()
    assert not bad[1].isfinite().any()
    runner.close()


@needs_kernels
def test_4_bit_weights_are_served_as_they_were_loaded() -> None:
    """Those of a quantized folder give the logits of weights that are quantized at load."""
    ids = random_ids(LENGTH, 300)
    found = []
    for stored in (False, True):
        model = random_model()
        if stored:
            quantize_blocks(model.transformer.h)
        runner = best_runner(model, 100, quantization="none" if stored else "int4", release=True)
        assert sum(parameter.numel() for parameter in model.parameters()) == 0
        found += step(runner, (ids, 0, [0, 1, 2, 3]))
        runner.close()
    assert torch.equal(*found)
    with pytest.raises(library.UnsupportedError, match="stored in int4, not in bf16"):
        model = random_model()
        quantize_blocks(model.transformer.h)
        CpuRunner(model, 8, "bf16")


@needs_kernels
def test_a_released_models_weights_live_only_in_the_runner() -> None:
    model = random_model()
    ids = random_ids(LENGTH, 300)
    expected = reference(model, ids)
    runner = best_runner(model, 100, release=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == 0
    (logits,) = step(runner, (ids, 0, [0, 1, 2, 3]))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    runner.close()


@needs_kernels
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_freed_while_packed_except_a_tied_embedding(
    tied: bool,
) -> None:
    model = random_model(tie_word_embeddings=tied, vocab_size=3000)
    ids = random_ids(LENGTH, 300)
    expected = reference(model, ids)
    weight = model.lm_head.weight.detach()
    runner = best_runner(model, 100, release=True)
    gone = float((weight == 0).float().mean())
    assert gone == 0 if tied else gone > 0.7  # whole pages of each piece
    (logits,) = step(runner, (ids, 0, [0, 1, 2, 3]))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    runner.close()


def new_bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shapes", "beside"),
    [
        ([(100, 64)], False),
        ([(300, 64), (20, 64), (600, 64)], False),  # which do not end with a block
        ([(256, 8)] * 3, False),
        ([(300, 64), (300, 200)], True),
    ],
)
def test_several_weights_pack_like_their_concatenation(
    kind: Kind, shapes: list[tuple[int, int]], beside: bool
) -> None:
    weights = [torch.randn(shape) for shape in shapes]
    if kind == "int4" and any(shape[1] % GROUP_SIZE for shape in shapes):
        weights = [torch.randn(shape[0], 128) for shape in shapes]
    check_packed(weights, kind, beside)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_columns_is_packed(kind: Kind) -> None:
    """They are packed 256 at a time, so the last ones may be any number, and fill no block."""
    weight = torch.randn(288, GROUP_SIZE)
    for columns in (*range(1, 256), *range(257, 288)):
        check_packed([weight[:columns]], kind, beside=False)


def check_packed(weights: list[Tensor], kind: Kind, beside: bool) -> None:
    """Blocks of 32 columns of what PyTorch gives for the weights side by side."""
    spent: list[Tensor] = []
    packed = pack(weights, None, kind, new_bytes, beside=beside, spent=spent.append)
    whole = torch.cat(weights, dim=int(beside))
    assert sum(map(torch.numel, spent)) == whole.numel()
    words = torch.zeros(-(-len(whole) // 32) * 32, packed.data.shape[1], dtype=torch.int32)
    if kind == "int8":
        values, scales = quantized(whole)
        assert packed.scales is not None
        assert torch.equal(packed.scales, scales)
    elif kind == "int4":
        values, scales = quantize(whole).packed, quantize(whole).scales
        units = torch.zeros(len(words), scales.shape[1], dtype=torch.bfloat16)
        units[: len(whole)] = scales
        assert packed.scales is not None
        assert torch.equal(packed.scales, units.unflatten(0, (-1, 32)).transpose(1, 2))
    else:
        values = whole.to(torch.float32 if kind == "fp32" else torch.bfloat16)
    words[: len(whole)] = values.view(torch.int32)
    blocks, width, _ = packed.data.shape
    assert torch.equal(packed.data, words.view(blocks, 32, width).transpose(1, 2))
    assert (packed.columns, packed.inputs) == whole.shape


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_any_vocabulary_and_width_give_the_models_logits(kind: Kind) -> None:
    """Also where 256 columns leave some that fill no block of 32."""
    sizes = [{"vocab_size": vocabulary} for vocabulary in (20, 257, 258, 265, 272, 287, 289, 511)]
    if kind != "int4":  # which has whole groups
        # 3 * 88 projections, 12 and 268 inner columns, and 12 to leave the layer.
        sizes += [{"n_embd": 88}, {"n_inner": 12}, {"n_inner": 268}, {"n_embd": 12, "n_head": 1}]
    for changes in sizes:
        model = random_model(n_layer=1, **changes)
        ids = random_ids(3, model.config.vocab_size)
        runner = CpuRunner(model, 1, kind)
        if kind == "int4":
            quantize_blocks(model.transformer.h)
        (found,) = step(runner, (ids, 0, [0]))
        runner.close()
        assert_near(Case(model, runner, TOLERANCES[kind]), found, ids)


@pytest.mark.parametrize("beside", [False, True])
def test_4_bit_weights_are_packed_as_they_are(beside: bool) -> None:
    weights = [torch.randn(300, 128), torch.randn(300, 128)]
    spent: list[Tensor] = []
    coded: list[Int4Weight] = [quantize(weight) for weight in weights]
    found = pack(coded, None, "int4", new_bytes, beside=beside, spent=spent.append)
    expected = pack(weights, None, "int4", new_bytes, beside=beside)
    assert torch.equal(found.data, expected.data)
    assert found.scales is not None and expected.scales is not None
    assert torch.equal(found.scales, expected.scales)
    assert sum(map(torch.numel, spent)) == 2 * 300 * 128 // 8


def test_quantized_weights_are_within_half_a_step() -> None:
    weight = torch.randn(33, 64)
    weight[7] = 0
    unsigned, scales = quantized(weight)
    restored = (unsigned.float() - 128) * scales[:, None]
    assert ((restored - weight).abs() <= 0.5001 * scales[:, None]).all()
    assert unsigned.min() >= 1  # symmetric


@pytest.mark.parametrize(("kind", "size"), [("fp32", 4), ("bf16", 2), ("int8", 1), ("int4", 0.5)])
def test_packed_weights_take_exactly_their_width(kind: str, size: float) -> None:
    weight = torch.randn(64, 128)
    packed = pack([weight], None, kind, new_bytes)  # type: ignore[arg-type]
    assert packed.data.nbytes == 64 * 128 * size
    scales = {"int8": 64 * 4, "int4": 64 * 2 * 2}.get(kind, 0)
    assert packed.bytes_read == packed.data.nbytes + 64 * 4 + scales


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"activation_function": "relu"}, "gelu_new"), ({"n_inner": 50}, "n_inner=50")],
)
def test_unsupported_models_use_pytorch_and_log_why(
    changes: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_model(**changes)
    with caplog.at_level(logging.WARNING):
        runner = best_runner(model, 64)
    assert isinstance(runner, TorchRunner)
    if KERNEL_LEVELS:
        assert reason in caplog.text
    ids = random_ids(LENGTH, 300)
    torch.testing.assert_close(
        step(runner, (ids, 0, [3, 2, 1, 0]))[0], reference(model, ids), rtol=0, atol=1e-5
    )
    for quantization in ("int8", "int4"):
        with pytest.raises(library.UnsupportedError, match=quantization):
            best_runner(model, 64, quantization=quantization)  # type: ignore[arg-type]


@needs_kernels
def test_without_a_compiler_pytorch_is_used_and_the_reason_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    library._load.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert isinstance(best_runner(random_model(), 64), TorchRunner)
    assert "no-such-compiler" in caplog.text
    library._load.cache_clear()


@needs_kernels
@pytest.mark.parametrize("shape", ["wide heads", "odd sizes"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_level_of_the_processor_gives_the_same_logits(
    kind: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the order in which a vector's lanes, or bf16's halves, are added up."""
    if kind == "int4" and shape == "odd sizes":
        pytest.skip("int4 needs whole groups")
    if len(KERNEL_LEVELS) == 1:
        pytest.skip("the processor has only one level")
    model = random_model(**SHAPES[shape])
    ids = random_ids(LENGTH + 1, model.config.vocab_size)
    found = []
    for name in KERNEL_LEVELS:
        monkeypatch.setenv("GPTJ_MAX_CPU_ISA", name)
        runner = CpuRunner(model, 8, kind)  # type: ignore[arg-type]
        pages = [0, 1, 2, 3]
        found.append(step(runner, (ids[:-1], 0, pages)) + step(runner, (ids[-1:], LENGTH, pages)))
        runner.close()
    scale = float(found[0][0].std())
    for each in found[1:]:
        for ours, theirs in zip(each, found[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01 * scale)


def test_the_level_is_the_processors_highest_up_to_the_setting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    every = frozenset(flag for flags, _ in library.LEVELS.values() for flag in flags)
    for flags, highest, expected in (
        (every, "", "avx512_bf16"),
        *((every, level, level) for level in library.LEVELS),
        (every - {"avx512_bf16"}, "", "avx512_vnni"),
        (every - {"avx512_vnni"}, "", "avx512"),
        (frozenset({"avx2", "fma", "avx512f"}), "", "avx2"),
        (frozenset({"sse4_2"}), "", "does not have avx2 and fma"),
        (every, "none", "GPTJ_MAX_CPU_ISA is none"),
    ):
        monkeypatch.setattr(library, "processor_flags", lambda flags=flags: flags)
        monkeypatch.setenv("GPTJ_MAX_CPU_ISA", highest)
        if expected in library.LEVELS:
            assert library.level() == expected
        else:
            with pytest.raises(library.UnsupportedError, match=expected):
                library.level()
            assert isinstance(best_runner(random_model(), 64), TorchRunner)
            assert expected in caplog.text
    monkeypatch.setenv("GPTJ_MAX_CPU_ISA", "AVX3")
    with pytest.raises(ValueError, match="one of avx512_bf16, avx512_vnni, avx512, avx2 or"):
        best_runner(random_model(), 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("level", "processor"),  # in GCC's names
    [
        ("avx512", "skylake-avx512"),
        ("avx512_vnni", "cascadelake"),
        ("avx512_bf16", "sapphirerapids"),
    ],
)
def test_the_kernels_compile_for_levels_that_this_machine_lacks(
    level: str, processor: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """By a compiler that has not compiled the same sources in the same way before."""
    if level in KERNEL_LEVELS:
        pytest.skip("other tests run this level")
    folder, compiler = Path(library.__file__).parent, library._compiler()
    flags = [flag for flag in library.FLAGS if not flag.startswith(("-march", "-O"))]
    flags += library.LEVELS[level][1]
    command = [compiler, *flags, "-O0", f"-march={processor}", "-Werror"]
    contents = [(folder / source).read_bytes() for source in library.SOURCES]
    whole = b"\0".join([*contents, " ".join([*command, library._version(compiler)]).encode()])
    digest = hashlib.sha256(whole).hexdigest()
    assert pytestconfig.cache is not None
    if pytestconfig.cache.get(f"kernels/{level}", None) == digest:
        return
    output = tmp_path / "step.so"
    subprocess.run([*command, "-o", str(output), str(folder / library.SOURCES[0])], check=True)
    pytestconfig.cache.set(f"kernels/{level}", digest)


COMPILER = """#!/bin/sh
test "$1" = --version && exec echo a compiler
while test "$1" != -o; do shift; done
echo built > "$2"
echo "$2" >> {calls}
"""


@needs_kernels
def test_the_library_is_built_once_and_atomically(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a compiler that only writes down where: the real one has built what other tests use."""
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(COMPILER.format(calls=calls))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = library._built(KERNEL_LEVELS[0])
    assert first.read_text() == "built\n"
    assert library._built(KERNEL_LEVELS[0]) == first
    (written,) = calls.read_text().split()
    assert Path(written).parent != first.parent  # until it is whole
    assert [path.name for path in (tmp_path / "gptj").iterdir()] == [first.name]


def test_the_cache_has_whole_pages_and_at_least_the_requested_tokens() -> None:
    runner = best_runner(random_model(), 17)
    assert runner.num_pages == 2
    assert runner.page_size == PAGE
    assert page_bytes(runner.config, torch.float32) == 2 * 2 * 16 * 64 * 4
    with pytest.raises(ValueError, match="cache_tokens must be 1 or more, got 0"):
        best_runner(random_model(), 0)
    runner.close()


def test_runs_on_every_device(device: torch.device) -> None:
    model = random_model().to(device)
    ids = random_ids(LENGTH, 300)
    runner = best_runner(model, 64)
    (logits,) = step(runner, (ids, 0, [3, 2, 1, 0]))
    expected = model(torch.from_numpy(ids.astype(np.int64))[None].to(device)).logits[0].cpu()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    runner.close()

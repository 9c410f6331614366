"""Adapters side by side in the engine: each request gets what its merged model would give it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_caller import (
    EOS,
    Caller,
    Gate,
    WatchedRunner,
    alone,
    held,
    tiny_model,
    tokens,
)
from peft_adapters import KINDS, Made, make_adapter
from plain_operations import PlainOperations

from gptj import GPTJForCausalLM
from gptj.engine.adapter_slots import Adapter, AdapterSlots, SlotsInUseError
from gptj.engine.engine import Engine
from gptj.engine.request import BeamParams
from gptj.engine.runners.base import Runner, StepBatch
from gptj.engine.runners.cpu import library
from gptj.engine.runners.cpu.runner import CpuRunner
from gptj.engine.runners.cuda.inputs import with_drafts_as_rows
from gptj.engine.runners.cuda.launch import TritonOperations
from gptj.engine.runners.cuda.runner import CudaRunner
from gptj.engine.runners.lora import NONE, LoRALimits
from gptj.engine.runners.torch_runner import TorchRunner
from gptj.engine.speculation import Speculation
from gptj.sampling import SamplingParams
from gptj.workers.errors import QueueFullError

PROMPTS = [[5, 6, 7], [8], tokens(17), tokens(70), tokens(40, start=3)]


@pytest.fixture(scope="module")
def base() -> GPTJForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def made(base: GPTJForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    return {
        name: make_adapter(base, tmp_path_factory.mktemp("adapter"), seed, **settings)
        for seed, (name, settings) in enumerate(KINDS.items())
    }


class Served:
    """An engine with adapters by name."""

    def __init__(self, runner: TorchRunner, made: dict[str, Made], **settings: Any) -> None:
        self.runner = runner
        self.slots = AdapterSlots(runner, LoRALimits(max_loras=len(made)))
        self.adapters: dict[str | None, Adapter | None] = {None: None}
        self.adapters |= {name: self.slots.load(each.weights()) for name, each in made.items()}
        self.engine = Engine(runner, **{"eos_ids": [], "max_num_seqs": 8, **settings})

    def submit(self, prompt: list[int], name: str | None, **params: Any) -> Caller:
        caller = Caller()
        sampling = SamplingParams(**{"max_tokens": 12, "temperature": 0, **params})
        caller.ticket = self.engine.submit(prompt, sampling, caller, self.adapters[name])
        return caller


@pytest.fixture
def served(base: GPTJForCausalLM, made: dict[str, Made]) -> Iterator[Served]:
    served = Served(WatchedRunner(base, 128), made)
    yield served
    served.engine.close()


# Of the largest difference in logits, in units of their standard deviation: see test_runner.py.
TOLERANCES = {
    "torch": 1e-4,
    "plain": 1e-4,
    "triton": 1e-4,
    "fp32": 1e-4,
    "bf16": 0.25,
    "int8": 0.25,
}


def runner_of(kind: str, base: GPTJForCausalLM) -> Runner:
    if kind == "torch":
        return TorchRunner(base, 16)
    if kind in ("plain", "triton"):
        # As if of one multiprocessor.
        triton = TritonOperations(base.config, torch.float32, 1)
        plain = PlainOperations(torch.float32, base.config.layer_norm_epsilon)
        operations = triton if kind == "triton" else plain
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return CudaRunner(copy.deepcopy(base).to(device), 16, operations, lora=LoRALimits())
    try:
        library.level()
    except library.UnsupportedError as error:
        pytest.skip(str(error))
    return CpuRunner(base, 16, kind, lora=LoRALimits())  # type: ignore[arg-type]


# Of GELU, where it is 0: numbers here are larger than a trained model's.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow) if kind == "triton" else kind
        for kind in TOLERANCES
    ],
)
def test_pefts_adapters_compute_pefts_logits(
    base: GPTJForCausalLM, made: dict[str, Made], kind: str
) -> None:
    """All in one step, with a sequence that has none; as chunks and then as single tokens."""
    runner = runner_of(kind, base)
    names = ["mlp", None, *made]
    slots = {name: 7 - slot for slot, name in enumerate(made)}
    for name, slot in slots.items():
        runner.load_adapter(slot, made[name].weights())
    # In Triton's interpreter a token takes ten milliseconds a layer.
    last = 3 if kind == "triton" and not torch.cuda.is_available() else 12
    ids = np.array(tokens(last + 1), np.int32)
    rows = len(names)
    pages = np.arange(rows, dtype=np.int32)[:, None]
    adapters = np.array([NONE if name is None else slots[name] for name in names], np.int32)
    found = []
    for start, end in ((0, last), (last, last + 1)):
        length = end - start
        batch = StepBatch(
            np.tile(ids[start:end], rows),
            np.tile(np.arange(start, end, dtype=np.int32), rows),
            np.arange(rows + 1, dtype=np.int32) * length,
            pages,
            np.arange(rows * length, dtype=np.int32),
            adapters,
        )
        with torch.inference_mode():
            found.append(torch.stack(runner.step(batch).cpu().split(length)))
    inputs = torch.tensor([tokens(last + 1)])
    with torch.inference_mode():
        expected = torch.cat(
            [(base if name is None else made[name].theirs)(inputs).logits for name in names]
        )
    difference = (torch.cat(found, 1) - expected).abs().amax((1, 2)) / expected.std()
    assert float(difference.max()) < TOLERANCES[kind], difference
    assert float((expected - expected[1]).abs().amax((1, 2))[[0, 2, 3, 4, 5]].min()) > 1
    runner.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pages", "settings"),
    [
        (128, {}),
        (128, {"max_num_batched_tokens": 8}),
        (10, {}),
        (10, {"max_num_batched_tokens": 8, "prefix_caching": False}),
        (128, {"speculation": Speculation(num_speculative_tokens=4)}),
    ],
    ids=["plain", "chunks", "preemption", "preemption without prefix cache", "drafts"],
)
def test_a_mixed_batch_gives_each_request_its_merged_models_output(
    base: GPTJForCausalLM, made: dict[str, Made], pages: int, settings: dict[str, Any]
) -> None:
    """Twice, so that the second time finds what the first has left in the prefix cache."""
    served = Served(WatchedRunner(base, pages), made, **settings)
    names = [None, *made]
    cases = [
        (prompt, names[(i + shift) % len(names)])
        for i, prompt in enumerate(PROMPTS)
        for shift in range(2)
    ]
    expected = [
        alone(
            base if name is None else made[name].merged,
            prompt,
            max_new_tokens=20 + 4 * i,
            eos_token_id=[],
        )
        for i, (prompt, name) in enumerate(cases)
    ]
    assert len({tuple(each) for each in expected}) == len(cases)
    for _ in range(2):
        callers = [
            served.submit(prompt, name, max_tokens=20 + 4 * i)
            for i, (prompt, name) in enumerate(cases)
        ]
        assert [caller.ids for caller in callers] == expected
    assert (served.engine.stats().preemptions > 0) == (pages == 10)
    if "speculation" in settings:
        assert served.engine.stats().spec_decode_num_accepted_tokens > 0
    served.engine.close()
    assert served.engine.stats().pages_used == 0


def test_drafts_as_rows_keep_their_adapters() -> None:
    """Rows of 3, 1 and 2 tokens, then a chunk, each with an adapter or none."""
    starts = np.array([0, 3, 4, 6, 40], np.int32)
    ids, positions = np.arange(40, dtype=np.int32), np.arange(40, dtype=np.int32)
    wanted = np.array([*range(6), 39], np.int32)
    pages = np.arange(4, dtype=np.int32)[:, None]
    adapters = np.array([2, NONE, 0, 1], np.int32)
    batch = StepBatch(ids, positions, starts, pages, wanted, adapters)
    rows = with_drafts_as_rows(batch)
    assert rows.query_start_loc.tolist() == [0, 1, 2, 3, 4, 5, 6, 40]
    assert rows.adapters_R is not None
    assert rows.adapters_R.tolist() == [2, 2, 2, NONE, 0, 0, 1]
    assert (rows.slots_T == batch.slots_T).all()
    assert with_drafts_as_rows(replace(batch, adapters_R=None)).adapters_R is None


def test_cached_prefixes_are_not_shared_between_adapters(
    served: Served, made: dict[str, Made]
) -> None:
    prompt = tokens(40)
    hits = []
    for name in (None, "queries", "mlp", "queries", None):
        before = served.engine.stats().prefix_tokens_hit
        assert served.submit(prompt, name).ids == alone(
            served.runner._model if name is None else made[name].merged, prompt, eos_token_id=[]
        )
        hits.append(served.engine.stats().prefix_tokens_hit - before)
    assert hits == [0, 0, 0, 32, 32]


def test_samples_and_beams_of_an_adapter(served: Served, made: dict[str, Made]) -> None:
    prompt, adapter = tokens(20), served.adapters["everything"]
    callers = [Caller(), Caller()]
    params = [SamplingParams(max_tokens=8, temperature=0)] * 2
    served.engine.submit_many(prompt, params, callers, adapter)
    found = Caller()
    sampling = SamplingParams(max_tokens=8)
    served.engine.beam_search(prompt, sampling, BeamParams(3, 1), found, adapter)
    beside = served.submit(prompt, "queries")
    merged = made["everything"].merged
    for caller in callers:
        assert caller.ids == alone(merged, prompt, max_new_tokens=8, eos_token_id=[])
    (best,) = found.beams
    assert best == alone(merged, prompt, max_new_tokens=8, num_beams=3, eos_token_id=[])
    assert beside.ids == alone(made["queries"].merged, prompt, eos_token_id=[])


def test_steps_without_adapters_are_plain(served: Served) -> None:
    """No cost: the batch does not even say that there could be adapters."""
    batches: list[StepBatch] = []
    served.runner.before = batches.append  # type: ignore[attr-defined]
    served.submit(tokens(20), None).wait()
    assert batches and all(batch.adapters_R is None for batch in batches)
    served.submit(tokens(20), "mlp").wait()
    assert batches[-1].adapters_R is not None


def test_the_least_recently_used_adapter_is_evicted_but_never_one_in_use(
    base: GPTJForCausalLM, made: dict[str, Made]
) -> None:
    gate = Gate()
    runner = WatchedRunner(base, 32, gate)
    slots = AdapterSlots(runner, LoRALimits(max_loras=2))
    engine = Engine(runner, eos_ids=[EOS])
    first, second = (slots.load(made[name].weights()) for name in ("queries", "everything"))
    blocker = held(engine, gate)
    caller = Caller()
    engine.submit([5, 6, 7], SamplingParams(max_tokens=6, temperature=0), caller, first)
    first.release()
    second.release()
    assert second.hold() and first.hold()  # second is now the least recently used
    first.release()
    with pytest.raises(SlotsInUseError, match="max_loras"):
        slots.load(made["mlp"].weights())
    second.release()
    third = slots.load(made["mlp"].weights())
    assert third.slot == second.slot and slots.evictions == 1
    assert not second.hold()
    with pytest.raises(SlotsInUseError):  # the first is in a request that waits, the third is held
        slots.load(made["rank 64"].weights())
    gate.open()
    blocker.wait()
    assert caller.ids == alone(made["queries"].merged, [5, 6, 7], max_new_tokens=6)
    fourth = slots.load(made["rank 64"].weights())
    assert fourth.slot == first.slot and slots.loads == 4
    engine.close()


@pytest.mark.parametrize("how", ["end", "cancel", "cancel waiting", "refused", "failed", "close"])
def test_a_finished_request_releases_its_adapter(
    base: GPTJForCausalLM, made: dict[str, Made], how: str
) -> None:
    gate = Gate()
    runner = WatchedRunner(base, 32, gate)
    slots = AdapterSlots(runner, LoRALimits(max_loras=1))
    engine = Engine(runner, eos_ids=[], max_num_seqs=1, max_queued=1)
    adapter = slots.load(made["queries"].weights())
    params = SamplingParams(max_tokens=6, temperature=0)
    blocker = held(engine, gate)
    caller = Caller()
    ticket = engine.submit([5, 6], params, caller, adapter)
    assert adapter.uses == 2
    if how == "refused":
        with pytest.raises(QueueFullError):
            engine.submit([5, 6], params, Caller(), adapter)
        assert adapter.uses == 2
    if how == "cancel waiting":
        ticket.cancel()
        assert adapter.uses == 1
    if how == "cancel":
        caller._then = lambda event: ticket.cancel()
    if how == "failed":
        started = threading.Event()

        def fail(batch: StepBatch) -> None:
            if batch.adapters_R is not None:
                started.set()
                raise RuntimeError("a step failed")

        runner.before = fail
    gate.open()
    if how == "close":
        engine.close()
    caller.wait()
    blocker.wait()
    engine.close()
    assert adapter.uses == 1

"""The training loop on real ranks (gloo) without Ray, against a plain PyTorch loop.

Each group of ranks is started once and trains several times, since starting costs the most.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import os
import platform
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import boto3
import pytest
import torch
import torch.multiprocessing as multiprocessing
import yaml
from packed_rows import loss_alone
from safetensors.torch import load_file
from task_data import make_data

from gptj import GPTJConfig, GPTJForCausalLM, storage
from gptj.adapters.base import Base
from gptj.checkpoints.manifest import Manifest, describe, verify
from gptj.data.batches import BatchOrder
from gptj.errors import CheckpointError
from gptj.model import GPTJForQuestionAnswering, GPTJForSequenceClassification
from gptj.storage.lease import LeaseLostError
from gptj.training import loop, progress
from gptj.training.dataset import node_data
from gptj.training.deepspeed_config import deepspeed_config
from gptj.training.evaluation import evaluate
from gptj.training.failures import UnrecoverableError
from gptj.training.loader import StepBatches
from gptj.training.loop import Worker, train
from gptj.training.model_config import make_config
from gptj.training.settings import Settings, SettingsError, read_settings
from gptj.training.state import (
    Progress,
    _end,
    check_resumable,
    checkpoint_name,
    checkpoint_step,
    delete_old_checkpoints,
    delete_unfinished_checkpoints,
    is_complete,
    latest_checkpoint,
    manifest_name,
    rank_manifest,
    read_progress,
    upload_state,
)
from gptj.training.tasks import TASKS, AnyTask
from gptj.training.tokenizer import prepare_tokenizer
from gptj.training.trackers import Trackers
from jobs import evaluate as evaluate_job

STEPS = 6
PICTURED = "stage-2"
# Ranks are forked from a process that has imported what takes seconds.
PRELOADED = [
    *("gptj.training.loop", "deepspeed", "torch._dynamo"),
    *("torch.utils.tensorboard", "matplotlib.figure"),
]
PERSISTENT = 500  # numbers: all of MODEL's vectors, and none of its matrices
MODEL = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 32}


def settings_of(folder: Path, run: str, **fields: Any) -> Settings:
    """A tiny run: rows of different lengths, batches of 8 in micro-batches."""
    values: dict[str, Any] = {
        "run": run,
        "storage": str(folder),
        "steps": STEPS,
        "batch_size": 8,
        "micro_batch_size": 4,
        "log_every": 1,
        "checkpoint_every": 3,
        "data": {"train": str(folder / "train.jsonl"), "sequence_length": 32},
        "model": {"preset": "tiny", "config": MODEL},
        "tokenizer": {"vocab_size": 300},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2, "gradient_clipping": 0.5},
        "deepspeed": {"stage": 0},
    }
    for key, value in fields.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    for key in ("train", "evaluation"):
        if key in values["data"]:
            values["data"][key] = values["data"][key].format(folder=folder)
    return Settings(**values)


def write_text(folder: Path) -> None:
    """A text that does not fill its last row of tokens: batches have unequal counts."""
    words = [f"word{n} is {'very ' * (n % 5)}good." for n in range(101)]
    (folder / "train.jsonl").write_text(json.dumps({"text": " ".join(words)}) + "\n")
    pairs = [{"prompt": word[: 8 + n % 4], "completion": word[8:]} for n, word in enumerate(words)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def releasing(settings: Settings, device_type: str, world_size: int) -> dict[str, Any]:
    """As shipped, but with a model of 6B's proportions: at stage 3 all matrices are released.

    DeepSpeed keeps parameters of up to 100,000 numbers, which here would be all of them.
    """
    plan = deepspeed_config(settings, device_type, world_size)
    if settings.deepspeed.stage == 3:
        plan["zero_optimization"]["stage3_param_persistence_threshold"] = PERSISTENT
    return plan


def check_released(model: torch.nn.Module) -> None:
    """Between steps a rank holds its own part of each matrix alone; a tiny head is kept whole."""
    for name, parameter in model.named_parameters():
        large = parameter.ds_numel > PERSISTENT  # type: ignore[attr-defined]
        tiny = name in ("score.weight", "qa_outputs.weight")
        assert large == (len(parameter.ds_shape) > 1 and not tiny), name  # type: ignore[attr-defined]
        assert parameter.ds_persist != large, name  # type: ignore[attr-defined]
        assert not large or parameter.ds_status.name == "NOT_AVAILABLE", name  # type: ignore[attr-defined]


def ended(settings: Settings, rank: int) -> Path:
    """Where a rank writes why its run ended before its time."""
    return Path(settings.storage, f"{settings.run}.rank-{rank}")


class NoPicture:
    """In place of a curve, which takes longer to draw than such a run's steps."""

    def savefig(self, path: Path, dpi: int) -> None:
        path.touch()


def rank_main(rank: int, world_size: int, port: int, runs: list[Settings]) -> None:
    """A rank's runs, on a node of its own where there is a folder for one."""
    if (node := Path(f"../node-{rank}").absolute()).exists():
        os.chdir(node)
        tempfile.tempdir = str(node)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank)
    )
    os.environ["WORLD_SIZE"] = str(world_size)
    torch.set_num_threads(1)
    models: list[Any] = []
    build_model = loop.build_model
    loop.build_model = lambda *arguments: models.append(build_model(*arguments)) or models[-1]
    loop.deepspeed_config = releasing
    save_state = loop.save_state

    def checked_save(engine: Any, *arguments: Any) -> None:
        save_state(engine, *arguments)
        if engine.zero_optimization_stage() == 3:
            check_released(models[-1])
        if engine.zero_optimization_stage() == 0:  # a worker alone does not copy its gradients
            assert engine.enable_backward_allreduce == (world_size > 1)

    loop.save_state = checked_save
    draw_curve = progress.draw_curve
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    for settings in runs:
        pictured = settings.run == PICTURED
        progress.draw_curve = draw_curve if pictured else lambda history, run: NoPicture()

        def report(
            metrics: dict[str, float],
            folder: Path,
            name: str,
            fence: Callable[[], None],
            settings: Settings = settings,
        ) -> None:
            upload_state(folder, storage.join(settings.folder, name), rank, world_size, fence)

        def stop(settings: Settings = settings) -> str | None:
            """One rank alone is told, and only the first time."""
            told = rank == 1 and settings.run == "stopped" and not ended(settings, rank).exists()
            return "the test says so" if told else None

        try:
            train(settings, Worker(rank, world_size, torch.device("cpu"), report, stop=stop))
        except (SettingsError, CheckpointError, UnrecoverableError) as error:  # of all
            ended(settings, rank).write_text(str(error))
    torch.distributed.destroy_process_group()


def log_of(settings: Settings) -> Path:
    return Path(settings.folder).with_suffix(".log")


def logging_rank_main(rank: int, world_size: int, port: int, runs: list[Settings]) -> None:
    logging.basicConfig(filename=log_of(runs[0]), level=logging.INFO)
    rank_main(rank, world_size, port, runs)


def run_ranks(world_size: int, runs: list[Settings], main: Callable[..., None] = rank_main) -> None:
    """Have `main` train all runs, one after the other, on as many ranks."""
    for settings in runs:
        prepare_tokenizer(settings)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(PRELOADED)
    multiprocessing.start_processes(
        begin, (main, world_size, port, runs), nprocs=world_size, start_method="forkserver"
    )


def begin(rank: int, main: Callable[..., None], *arguments: Any) -> None:
    """A rank, without what takes longer than such a run's steps."""
    gc.freeze()  # stage 3 collects garbage: not among the modules
    # Fills new memory with NaN, which shows where it is used before anything is written to it.
    torch.use_deterministic_algorithms(True, warn_only=True)
    loop.matrix_peak = lambda device, dtype: 1e12
    main(rank, *arguments)


def logged(settings: Settings, name: str) -> list[float]:
    lines = Path(settings.folder, "history.jsonl").read_text().splitlines()
    return [point[name] for point in map(json.loads, lines) if name in point]


def losses(settings: Settings) -> list[float]:
    return logged(settings, "loss")


class Reference(NamedTuple):
    losses: list[float]
    norms: list[float]  # of the gradients, before they are clipped
    rates: list[float]
    weights: dict[str, torch.Tensor]


# Warm-up over two steps, then half a cosine from 1 to 0.1.
RATES = [1e-2 * share for share in (1 / 3, 2 / 3, 1.0, 0.868198, 0.55, 0.231802)]


REFERENCES: dict[str, Reference] = {}


def reference(settings: Settings, rates: list[float] = RATES) -> Reference:
    """The same for all runs on the same data: it knows no stages, precisions or micro-batches."""
    key = json.dumps([settings.data.model_dump(), settings.model.config, settings.seed, rates])
    if key not in REFERENCES:
        REFERENCES[key] = compute_reference(settings, rates)
    return REFERENCES[key]


def compute_reference(settings: Settings, rates: list[float]) -> Reference:
    """transformers' model, PyTorch's AdamW in fp32, each global batch as a whole."""
    import transformers  # not for the ranks, which import this module

    tokenizer = prepare_tokenizer(settings)
    data = make_data(settings, tokenizer).train
    config = make_config(settings, tokenizer, data.labels)
    torch.manual_seed(settings.seed)
    start = GPTJForCausalLM(config)
    model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**config.to_dict()))
    model.load_state_dict(start.state_dict())
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    order = BatchOrder(len(data), 8, settings.seed)
    found, norms = [], []
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = data.collate([data[i] for i in order.indices(step)])
        loss = loss_alone(model, batch) if "cu_seqlens" in batch else model(**batch).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return Reference(found, norms, rates, model.state_dict())


SHIPPED = yaml.safe_load(
    (Path(__file__).parents[2] / "k8s/training/base/finetune.yaml").read_text()
)
VARIANTS: dict[str, dict[str, Any]] = {
    # Stage 3 first: it needs the ranks before DeepSpeed has been initialised by another run.
    **{f"stage-{stage}": {"deepspeed": {"stage": stage}} for stage in (3, 0, 1, 2)},
    "accumulating": {"deepspeed": {"stage": 2}, "micro_batch_size": 1},
    # Rows of several prompts and completions, which the reference computes one by one.
    "packed-recomputing-3": {
        "deepspeed": {"stage": 3},
        "data": {"train": "{folder}/pairs.jsonl"},
        "model": {"gradient_checkpointing": True},
    },
    "tied-2": {
        "deepspeed": {"stage": 2},
        "model": {"config": {**MODEL, "tie_word_embeddings": True}},
    },
    "tied-selective-3": {
        "deepspeed": {"stage": 3},
        "model": {
            "config": {**MODEL, "tie_word_embeddings": True},
            "gradient_checkpointing": "selective",
        },
    },
    "offloading-2": {"deepspeed": {"stage": 2, "offload_optimizer": True}},
    "offloading-3": {
        "deepspeed": {"stage": 3, "offload_optimizer": True, "offload_parameters": True}
    },
    **{f"bf16-{stage}": {"deepspeed": {"stage": stage, "precision": "bf16"}} for stage in (0, 2)},
    **{
        f"8bit-{stage}": {"deepspeed": {"stage": stage}, "optimizer": {"moments": "8bit"}}
        for stage in (0, 2, 3)
    },
    # As k8s/training/base/finetune.yaml trains GPT-J.
    "bf16-3": {
        "deepspeed": SHIPPED["deepspeed"],
        "model": {"gradient_checkpointing": SHIPPED["model"]["gradient_checkpointing"]},
    },
}
# The same run twice; one is told to stop at its first step, which is to be evaluated.
MEASURED: dict[str, Any] = {
    "data": {"evaluation": "{folder}/train.jsonl"},
    "evaluate_every": 1,
    "model": {"config": {**MODEL, "resid_pdrop": 0.2}},
    "deepspeed": {"stage": 2},
}
# One step at each stage in half precision, whose later losses are too coarse to show it.
FIRST_STEPS: dict[str, dict[str, Any]] = {
    f"first-{stage}": {
        "steps": 1,
        "optimizer": {"warmup_steps": 0},
        "deepspeed": {"stage": stage, "precision": "bf16"},
    }
    for stage in (0, 1, 2, 3)
}
# What ends before its time, and what must be said then.
ENDING: dict[str, tuple[dict[str, Any], str]] = {
    # Weights of 1e30 are finite, and nothing that they compute is.
    **{
        f"too-fast-{stage}": (
            {
                "steps": 1,
                "optimizer": {"learning_rate": 1e30, "warmup_steps": 0},
                "deepspeed": {"stage": stage},
            },
            r"the loss with the new weights is nan at step 1\..*There is no checkpoint yet",
        )
        for stage in (0, 3)
    },
    # The first step's weights still give a loss, and no gradients any more.
    "too-fast-later": (
        {
            "checkpoint_every": 1,
            "keep_checkpoints": 1,
            "optimizer": {"learning_rate": 1e4, "warmup_steps": 0, "weight_decay": 0},
            "deepspeed": {"stage": 2},
        },
        r"the gradient norm is (nan|inf) at step 2\..* The last good checkpoint is "
        r".*checkpoint-00000001$",
    ),
    "other-rows": (
        {"data": {"train": "rows.jsonl"}},
        r"the workers have read different data from data\.train=rows\.jsonl: worker 0 1 rows "
        r"\(sha256 \w+…\), worker 1 2 rows \(sha256 \w+…\)",
    ),
    "no-rows": (
        {"data": {"train": "train.jsonl", "evaluation": "held-out.jsonl"}},
        r"worker 1 could not read the data: .*held-out\.jsonl",
    ),
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All variants, each trained by two ranks, which have a folder each as on two nodes."""
    folder = tmp_path_factory.mktemp("two-ranks")
    write_text(folder)
    line = (folder / "train.jsonl").read_text()
    for rank in (0, 1):
        (folder / f"node-{rank}").mkdir()
        (folder / f"node-{rank}" / "train.jsonl").write_text(line)
        (folder / f"node-{rank}" / "rows.jsonl").write_text(line * (rank + 1))
    (folder / "node-0" / "held-out.jsonl").write_text(line)
    variants = [
        *VARIANTS.items(),
        *FIRST_STEPS.items(),
        *((name, fields) for name, (fields, _) in ENDING.items()),
        *((name, MEASURED) for name in ("unstopped", "stopped", "stopped")),
    ]
    with contextlib.chdir(folder / "node-0"):
        run_ranks(2, [settings_of(folder, name, workers={"count": 2}, **v) for name, v in variants])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in VARIANTS if "bf16" not in name and "8bit" not in name]
)
def test_two_ranks_train_like_plain_pytorch(name: str, two_ranks: Path) -> None:
    """Losses of all steps and final weights; only the order of summation may differ.

    The last batch row is shorter, so ranks and micro-batches hold different numbers of tokens:
    a mean of means would be off by 1e-3.
    """
    settings = settings_of(two_ranks, name, workers={"count": 2}, **VARIANTS[name])
    expected, norms, rates, weights = reference(settings)
    assert losses(settings) == pytest.approx(expected, abs=2e-5)
    assert expected[-1] < expected[0] - 0.5
    assert logged(settings, "gradient_norm") == pytest.approx(norms, rel=1e-3)
    assert logged(settings, "learning_rate") == pytest.approx(rates, rel=1e-5)
    model = GPTJForCausalLM.from_pretrained(settings.model_folder)
    for key, weight in model.state_dict().items():
        torch.testing.assert_close(weight, weights[key], rtol=0, atol=2e-3)  # Adam near zero
    verify(settings.model_folder)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_half_precision_trains_and_is_exported(stage: int, two_ranks: Path) -> None:
    """At stage 3 with the shipped settings: gradient checkpointing over released parameters."""
    settings = settings_of(
        two_ranks, f"bf16-{stage}", workers={"count": 2}, **VARIANTS[f"bf16-{stage}"]
    )
    assert losses(settings) == pytest.approx(reference(settings).losses, rel=0.05)
    assert GPTJForCausalLM.from_pretrained(settings.model_folder).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_8_bit_moments_train_like_fp32_moments(stage: int, two_ranks: Path) -> None:
    name = f"8bit-{stage}"
    settings = settings_of(two_ranks, name, workers={"count": 2}, **VARIANTS[name])
    expected = reference(settings).losses
    assert losses(settings) == pytest.approx(expected, rel=3e-3)
    assert losses(settings) != pytest.approx(expected, rel=1e-6)
    shards = Path(settings.folder, f"checkpoint-{STEPS:08}").glob("*.safetensors")
    kinds = {name.partition("/")[0] for shard in shards for name in load_file(shard)}
    assert {"master", "state1", "absmax1", "state2", "absmax2"} <= kinds


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST_STEPS)
def test_the_first_update_is_adams_at_every_stage(name: str, two_ranks: Path) -> None:
    """Adam's first update is the learning rate, 1e-2, wherever there is a gradient.

    In bf16 weights are rounded by 2e-5 on average, and gradients near zero change their sign. An
    optimizer that had taken a step before would be off by a quarter of the learning rate.
    """
    settings = settings_of(two_ranks, name, workers={"count": 2}, **FIRST_STEPS[name])
    expected = reference(settings, [1e-2])
    model = GPTJForCausalLM.from_pretrained(settings.model_folder, dtype="float32")
    off = torch.cat(
        [(w - expected.weights[key]).abs().flatten() for key, w in model.state_dict().items()]
    )
    assert off.mean() < 3e-4
    assert logged(settings, "gradient_norm") == pytest.approx(expected.norms, rel=2e-2)
    assert logged(settings, "learning_rate") == [1e-2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDING)
def test_unrecoverable_errors_end_all_ranks_with_the_reason(name: str, two_ranks: Path) -> None:
    fields, message = ENDING[name]
    settings = settings_of(two_ranks, name, workers={"count": 2}, **fields)
    for rank in (0, 1):
        assert re.search(message, ended(settings, rank).read_text()), ended(settings, rank)
    assert not Path(settings.model_folder).exists()


@pytest.mark.slow
def test_a_stopped_run_saves_its_step_and_resumes_unchanged(
    two_ranks: Path,
) -> None:
    """Its first step, which was to be evaluated: that comes first when the run goes on."""
    stopped = settings_of(two_ranks, "stopped", workers={"count": 2}, **MEASURED)
    for rank in (0, 1):
        assert ended(stopped, rank).read_text() == (
            f"stopped after step 1 of 6: the test says so. {stopped.folder}/checkpoint-00000001 is "
            f"saved, and the same command resumes from it"
        )
    whole = settings_of(two_ranks, "unstopped", workers={"count": 2}, **MEASURED)
    for name in ("loss", "evaluation_loss"):
        assert len(logged(whole, name)) == STEPS
        assert logged(stopped, name) == pytest.approx(logged(whole, name), abs=1e-6)


@pytest.mark.slow
def test_the_last_good_checkpoint_is_kept_when_a_training_diverges(two_ranks: Path) -> None:
    """Its weights are finite, and so is what they compute."""
    settings = settings_of(
        two_ranks, "too-fast-later", workers={"count": 2}, **ENDING["too-fast-later"][0]
    )
    kept = latest_checkpoint(settings.folder)
    assert kept is not None
    assert kept in ended(settings, 0).read_text()
    assert len(list(Path(settings.folder).glob("checkpoint-*"))) == 1
    model = GPTJForCausalLM(GPTJConfig(vocab_size=300, **MODEL))
    weights = dict(model.named_parameters())
    for shard in Path(kept).glob("shard-*.safetensors"):
        for key, part in load_file(shard).items():
            kind, start, name = key.split("/")
            if kind == "master":
                weights[name].data.view(-1)[int(start) :][: len(part)].copy_(part)
    tokens = torch.arange(20)[None]
    assert bool(model(tokens).logits.isfinite().all())


@pytest.mark.slow
def test_a_runs_output_files(two_ranks: Path) -> None:
    """The model with tokenizer and history, a curve, TensorBoard's files, a shard a rank."""
    import transformers

    settings = settings_of(two_ranks, "stage-2", workers={"count": 2}, **VARIANTS["stage-2"])
    folder = Path(settings.folder)
    training = json.loads((folder / "model" / "training.json").read_text())
    assert training["steps"] == STEPS
    assert training["settings"]["deepspeed"]["stage"] == 2
    assert [p["step"] for p in training["history"] if "loss" in p] == list(range(1, STEPS + 1))
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list((folder / "tensorboard").iterdir())
    last = folder / f"checkpoint-{STEPS:08}"
    shards = sorted(path.name for path in last.glob("shard-*"))
    assert shards == [f"shard-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    assert theirs.config.vocab_size == 300
    assert len(transformers.AutoTokenizer.from_pretrained(folder / "model")) == 300


@pytest.fixture(scope="module")
def continued(two_ranks: Path) -> dict[str, Settings]:
    """Runs that begin with the model of another one, as it is and under another head."""
    (two_ranks / "labels.jsonl").write_text(
        "".join(json.dumps({"text": f"word{n} good.", "label": n % 3}) + "\n" for n in range(24))
    )
    # Its configuration says of two matrices that they are one.
    source, untied = two_ranks / "stage-1" / "model", two_ranks / "untied-model"
    shutil.copytree(source, untied, ignore=shutil.ignore_patterns("manifest.json"))
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    text = {"data": {"train": str(two_ranks / "train.jsonl"), "sequence_length": 32}}
    tasks: dict[str, dict[str, Any]] = {
        "text": text,
        "untied": {**text, "model": {"checkpoint": str(untied)}},
        "labels": {
            "task": "classification",
            "data": {
                "train": str(two_ranks / "labels.jsonl"),
                "sequence_length": 32,
                "label_names": ["a", "b", "c"],
            },
        },
    }
    runs = {
        f"{name}-{stage}": Settings(
            run=f"{name}-{stage}",
            storage=str(two_ranks),
            steps=2,
            batch_size=8,
            micro_batch_size=4,
            log_every=1,
            deepspeed={"stage": stage},  # type: ignore[arg-type]
            workers={"count": 2},  # type: ignore[arg-type]
            **{"model": {"checkpoint": str(source)}, **fields},
        )
        for stage in (2, 3)
        for name, fields in tasks.items()
    }
    # A new model, on the sample.
    runs["questions-3"] = settings_of(
        two_ranks,
        "questions-3",
        task="question-answering",
        steps=2,
        data={
            "train": "sample://questions",
            "evaluation": "sample://questions/evaluation",
            "sequence_length": 96,
            "stride": 16,
        },
        model={"config": {**MODEL, "n_positions": 128}},
        optimizer={"warmup_steps": 1},
        deepspeed={"stage": 3},
        workers={"count": 2},
    )
    run_ranks(2, list(runs.values()))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text", "untied"])
@pytest.mark.parametrize("stage", [2, 3])
def test_training_starts_from_the_checkpoints_weights(
    stage: int, task: str, continued: dict[str, Settings]
) -> None:
    """The first loss is the loss of the loaded model on the first batch."""
    settings = continued[f"{task}-{stage}"]
    model = GPTJForCausalLM.from_pretrained(settings.model.checkpoint)
    data = make_data(settings, prepare_tokenizer(settings)).train
    indices = BatchOrder(len(data), 8, settings.seed).indices(0)
    batch = data.collate([data[i] for i in indices])
    with torch.no_grad():
        expected = model(**batch).loss.item()
    assert losses(settings)[0] == pytest.approx(expected, abs=1e-5)
    assert expected < 5  # a new model's is 5.7


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_language_model_becomes_a_classifier_with_named_labels(
    stage: int, continued: dict[str, Settings]
) -> None:
    settings = continued[f"labels-{stage}"]
    model = GPTJForSequenceClassification.from_pretrained(settings.model_folder)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    before = GPTJForCausalLM.from_pretrained(settings.model.checkpoint)
    distance = (model.transformer.wte.weight - before.transformer.wte.weight).abs().max()
    assert 0 < distance < 0.05  # two steps away from it, and not from new weights
    training = json.loads(Path(settings.model_folder, "training.json").read_text())
    assert training["checkpoint"] == asdict(Base.at(settings.model.checkpoint))
    assert training["checkpoint"]["digest"]
    assert losses(settings)[0] == pytest.approx(1.0986, abs=0.1)  # ln 3


@pytest.mark.slow
def test_two_ranks_learn_to_answer_questions_at_stage_3(continued: dict[str, Settings]) -> None:
    settings = continued["questions-3"]
    verify(settings.model_folder)
    training = json.loads(Path(settings.model_folder, "training.json").read_text())
    assert training["metrics"].keys() == {"loss", "exact_match", "f1"}
    assert training["checkpoint"] is None
    assert (training["workers"], training["device"]) == (2, platform.machine())
    assert losses(settings)[1] < losses(settings)[0]
    GPTJForQuestionAnswering.from_pretrained(settings.model_folder)


VARIED_TASKS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], set[str]]] = {
    "multi-label": (
        {"task": "classification"},
        [
            {"text": "red and round", "label": ["red", "round"]},
            {"text": "red and flat", "label": ["red"]},
            {"text": "neither here nor there", "label": []},
        ],
        {"loss", "accuracy", "f1"},
    ),
    "numbered": (
        {"task": "classification", "data": {"label_names": ["neg", "pos"]}},
        [{"text": "bad and worse", "label": 0}, {"text": "good and better", "label": 1}],
        {"loss", "accuracy", "f1"},
    ),
    "regression": (
        {"task": "classification", "data": {"problem_type": "regression"}},
        [{"text": "much", "label": 9}, {"text": "little", "label": 1}],
        {"loss", "mse", "pearson"},
    ),
    "answers": (
        {"task": "question-answering", "data": {"stride": 4}},
        [
            {
                "question": "Who?",
                "context": "It was Ann who came by train that day.",
                "answers": {"text": ["Ann"], "answer_start": [7]},
            },
            {
                "question": "Why?",
                "context": "Nobody knows.",
                "answers": {"text": [], "answer_start": []},
            },
        ],
        {"loss", "exact_match", "f1"},
    ),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Settings]:
    """A run a task, by one rank, on a handful of rows that it must learn by heart."""
    folder = tmp_path_factory.mktemp("tasks")
    runs = {}
    for name, (fields, rows, _) in VARIED_TASKS.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"train": str(path), "evaluation": str(path), **fields.get("data", {})}
        more = {**fields, "data": data, "steps": 60, "log_every": 20, "evaluate_every": 30}
        runs[name] = settings_of(folder, name, batch_size=4, **more)
    run_ranks(1, list(runs.values()))
    return runs


@pytest.mark.slow
def test_further_data_with_only_ones_is_read_as_the_models_training_read_it(
    tasks: dict[str, Settings], tmp_path: Path
) -> None:
    model = tasks["numbered"].model_folder
    path = tmp_path / "ones.jsonl"
    path.write_text('{"text": "good and better", "label": 1}\n' * 4)
    measured = evaluate_job.measure(evaluate_job.read_settings([model, str(path), "device=cpu"]))
    assert measured["accuracy"] == 1
    words = [f"data.train={path}", "task=classification", f"storage={tmp_path}"]
    further = read_settings([*words, f"model.checkpoint={model}", "data.sequence_length=16"])
    data = node_data(further, prepare_tokenizer(further), tmp_path).train
    assert [data[index].target.tolist() for index in range(len(data))] == [1] * 4
    for name, other in tasks.items():
        training = json.loads(Path(other.model_folder, "training.json").read_text())
        assert (training["labels"] is None) == (name in ("regression", "answers"))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIED_TASKS)
def test_each_task_learns_its_rows_and_is_evaluated(name: str, tasks: dict[str, Settings]) -> None:
    settings = tasks[name]
    training = json.loads(Path(settings.model_folder, "training.json").read_text())
    metrics = training["metrics"]
    assert set(metrics) == VARIED_TASKS[name][2]
    if name == "regression":
        assert metrics["mse"] < 0.5
    else:
        assert metrics.get("accuracy", metrics.get("exact_match")) == 1
    evaluated = [p for p in training["history"] if "evaluation_loss" in p]
    assert [p["step"] for p in evaluated] == [30, 60]
    assert evaluated[1]["evaluation_loss"] < evaluated[0]["evaluation_loss"]


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Settings]:
    """A run that learns its few rows by heart and gets worse at others; and an extended one."""
    folder = tmp_path_factory.mktemp("selected")
    write_text(folder)
    (folder / "few.jsonl").write_text('{"text": "word1 is good. word2 is very good. word3"}\n')
    (folder / "other.jsonl").write_text('{"text": "word1 is very very good. word77 is good."}\n')
    fields: dict[str, Any] = {
        "data": {"train": str(folder / "few.jsonl"), "evaluation": str(folder / "other.jsonl")},
        "steps": 60,
        "evaluate_every": 3,
        "early_stopping": 3,
        "keep_checkpoints": 1,
    }
    before = {**fields, "export": "last", "early_stopping": None, "steps": 30}
    runs = {
        "best": settings_of(folder, "best", **fields),
        "impatient": settings_of(folder, "patient", **{**fields, "early_stopping": 1}),
        "patient": settings_of(folder, "patient", **fields),
        "last": settings_of(folder, "later", **before),
        "later": settings_of(folder, "later", **{**before, "export": "best", "steps": 36}),
        "short": settings_of(folder, "longer", steps=4, optimizer={"schedule": "constant"}),
        "longer": settings_of(folder, "longer", steps=6, optimizer={"schedule": "constant"}),
        "at-once": settings_of(folder, "at-once", steps=6, optimizer={"schedule": "constant"}),
    }
    run_ranks(1, list(runs.values()))
    return runs


@pytest.mark.slow
def test_the_best_model_is_exported_and_a_run_without_a_better_one_ends(
    selected: dict[str, Settings],
) -> None:
    settings = selected["best"]
    training = json.loads(Path(settings.model_folder, "training.json").read_text())
    found = logged(settings, "evaluation_loss")
    best = min(found)
    assert len(found) == found.index(best) + 1 + 3
    assert training["best"]["step"] == 3 * (found.index(best) + 1) < training["steps"] < 60
    assert training["metrics"]["loss"] == best < found[-1]
    tokenizer = prepare_tokenizer(settings)
    data = make_data(settings, tokenizer).evaluation
    assert data is not None
    model = GPTJForCausalLM.from_pretrained(settings.model_folder)
    measured = evaluate(TASKS["causal-lm"], model, data, batch_size=4, device="cpu")
    assert measured["loss"] == pytest.approx(best, abs=1e-5)
    kept = sorted(path.name for path in Path(settings.folder).glob("checkpoint-*"))
    steps = [training["best"]["step"], training["steps"]]
    assert kept == [f"checkpoint-{step:08}" for step in steps]


@pytest.mark.slow
def test_a_run_that_stopped_early_continues_with_more_patience(
    selected: dict[str, Settings],
) -> None:
    best, patient = selected["best"], selected["patient"]
    assert logged(patient, "evaluation_loss") == pytest.approx(logged(best, "evaluation_loss"))
    assert is_complete(best)
    assert is_complete(best.model_copy(update={"early_stopping": 2}))
    for patience in (4, None):
        assert not is_complete(best.model_copy(update={"early_stopping": patience}))
    with pytest.raises(SettingsError, match=r"after step \d+, and the last 3 evaluations were"):
        is_complete(best.model_copy(update={"steps": 80}))
    # A model of an earlier version does not say so, but its last checkpoint does.
    training = json.loads(Path(best.model_folder, "training.json").read_text())
    assert (training.pop("stopped_early"), training.pop("worse")) == (True, 3)
    assert _end(training, best.folder) == (True, 3)
    assert _end({**training, "settings": {"early_stopping": 4}}, best.folder) == (False, 3)
    assert not is_complete(best.model_copy(update={"steps": 80, "early_stopping": 4}))


@pytest.mark.slow
def test_a_run_whose_patience_ended_at_its_last_step_is_not_extended_by_nothing(
    selected: dict[str, Settings], tmp_path: Path
) -> None:
    """It took all its steps, but it would take no further one."""
    best = selected["best"]
    shutil.copytree(best.folder, tmp_path / best.run)
    whole = best.model_copy(update={"storage": str(tmp_path)})
    file = Path(whole.model_folder, "training.json")
    training = json.loads(file.read_text())
    file.write_text(json.dumps({**training, "stopped_early": False}))
    files = describe(whole.model_folder, list(Manifest.read(whole.model_folder).files)).files
    (file.parent / "manifest.json").unlink()
    Manifest(whole.model_folder, files).write()
    assert is_complete(whole)
    with pytest.raises(SettingsError, match=r"the last 3 evaluations were .* takes no further"):
        is_complete(whole.model_copy(update={"steps": 80}))
    assert not is_complete(whole.model_copy(update={"steps": 80, "early_stopping": 4}))


@pytest.mark.slow
def test_export_best_chooses_among_the_models_since_it_was_set(
    selected: dict[str, Settings],
) -> None:
    """The best of all, long before, was not kept."""
    later = selected["later"]
    training = json.loads(Path(later.model_folder, "training.json").read_text())
    found = dict(zip(range(3, 37, 3), logged(later, "evaluation_loss"), strict=True))
    assert min(found, key=lambda step: found[step]) < 30
    best = min((33, 36), key=lambda step: found[step])
    assert (training["best"]["step"], training["best"]["kept"]) == (best, True)
    assert training["metrics"]["loss"] == found[best]


@pytest.mark.parametrize(
    ("task", "metrics", "than", "better"),
    [
        ("causal-lm", {"loss": 1.0}, {"loss": 2.0}, True),
        ("causal-lm", {"loss": 1.0}, {"loss": 1.0}, False),
        ("classification", {"loss": 1.0, "f1": 0.0}, {"loss": 2.0, "f1": 0.0}, True),
        ("classification", {"loss": 2.0, "f1": 1.0}, {"loss": 1.0, "f1": 1.0}, False),
        ("classification", {"loss": 2.0, "f1": 0.5}, {"loss": 1.0, "f1": 0.4}, True),
        ("classification", {"loss": 1.0, "mse": 0.5}, {"loss": 1.0, "mse": 0.4}, False),
        ("question-answering", {"loss": 1.0, "f1": 0.5}, {"loss": 2.0, "f1": 0.5}, True),
        ("causal-lm", {"loss": math.nan}, {"loss": 2.0}, False),
        ("causal-lm", {"loss": 2.0}, {"loss": math.nan}, True),
        ("causal-lm", {"loss": 2.0}, {"loss": None}, True),
        ("classification", {"loss": math.nan, "f1": 0.5}, {"loss": 1.0, "f1": 0.5}, False),
    ],
)
def test_equal_scores_are_ranked_by_their_losses(
    task: str, metrics: dict[str, float], than: dict[str, Any], better: bool
) -> None:
    assert TASKS[task].is_better(metrics, than) == better


@pytest.mark.slow
def test_an_extended_run_says_how_its_learning_rate_jumps(
    tmp_path: Path,
) -> None:
    write_text(tmp_path)
    optimizer = {"learning_rate": 0.01, "schedule": "linear", "final_share": 0.0, "warmup_steps": 0}
    runs = [settings_of(tmp_path, "r", steps=steps, optimizer=optimizer) for steps in (2, 4, 4)]
    run_ranks(1, runs, logging_rank_main)
    log = log_of(runs[0]).read_text()
    assert "the schedule has 4 steps instead of 2: the learning rate is now 0.005, not 0" in log
    assert log.count("the schedule has") == 1


@pytest.mark.slow
def test_a_finished_run_is_extended_as_if_it_had_never_ended(
    selected: dict[str, Settings],
) -> None:
    """Where the learning rate does not depend on the number of steps."""
    longer, whole = selected["longer"], selected["at-once"]
    assert losses(longer) == pytest.approx(losses(whole), abs=1e-6)
    assert len(losses(longer)) == 6
    assert is_complete(longer)
    ours, theirs = (
        GPTJForCausalLM.from_pretrained(each.model_folder).state_dict() for each in (longer, whole)
    )
    for key, weight in ours.items():
        torch.testing.assert_close(weight, theirs[key], rtol=0, atol=1e-6)
    training = json.loads(Path(longer.model_folder, "training.json").read_text())
    assert (training["steps"], training["settings"]["steps"]) == (6, 6)
    assert {"python", "torch", "deepspeed", "gptj-platform"} <= training["versions"].keys()
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", training["git_commit"])
    assert training["data"]["train"]["sha256"]
    verify(longer.model_folder)


RESUMED: dict[str, dict[str, Any]] = {
    **{str(stage): {"deepspeed": {"stage": stage}} for stage in (0, 2, 3)},
    "0-bf16": {"deepspeed": {"stage": 0, "precision": "bf16"}},
    "2-8bit": {"deepspeed": {"stage": 2, "precision": "bf16"}, "optimizer": {"moments": "8bit"}},
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with dropout, undisturbed and from the checkpoint in the middle, at stages 2 and 3."""
    folder = tmp_path_factory.mktemp("resumed")
    write_text(folder)
    whole, again = [], []
    for name, fields in RESUMED.items():
        for kind, runs in (("whole", whole), ("again", again)):
            runs.append(
                settings_of(
                    folder,
                    f"{kind}-{name}",
                    checkpoint_every=3,
                    workers={"count": 2},
                    model={"config": {**MODEL, "resid_pdrop": 0.2}},
                    **fields,
                )
            )
    run_ranks(2, whole)
    for first, second in zip(whole, again, strict=True):
        storage.upload_folder(
            Path(first.folder, "checkpoint-00000003"),
            storage.join(second.folder, "checkpoint-00000003"),
        )
    other = Settings(**{**again[0].model_dump(exclude_unset=True), "run": "other-loss"})
    shutil.copytree(Path(again[0].folder), other.folder)
    store_another_loss(Path(other.folder, "checkpoint-00000003"))
    run_ranks(2, [*again, other])
    return folder


def store_another_loss(checkpoint: Path) -> None:
    """As if the checkpoint had been written with other code, or over other frozen weights."""
    path = checkpoint / "progress.json"
    progress = json.loads(path.read_text())
    progress["probe"]["loss"] *= 1.001
    progress["probe"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(progress))
    name = "manifest-00000-of-00002.json"
    files = Manifest.read(str(checkpoint), name)
    assert files is not None
    (checkpoint / name).unlink()
    describe(str(checkpoint), list(files.files)).write(name)


@pytest.mark.slow
def test_a_run_does_not_resume_if_the_probe_loss_differs(resumed: Path) -> None:
    settings = settings_of(resumed, "other-loss")
    for rank in (0, 1):
        assert re.search(
            r"resumes from .*/checkpoint-00000003 is not the one that was saved: its loss on the "
            r"checkpoint's probe batch was [\d.]+ and is now [\d.]+\. Since then torch was "
            r"1\.0 and is 2\.",
            ended(settings, rank).read_text(),
        )
    assert not Path(settings.model_folder).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_undisturbed_one(name: str, resumed: Path) -> None:
    """Data, optimizer, schedule and dropout's random state all go on: 1e-6 on each loss."""
    whole = settings_of(resumed, f"whole-{name}")
    again = settings_of(resumed, f"again-{name}")
    assert losses(again) == pytest.approx(losses(whole), abs=0 if "8bit" in name else 1e-6)
    assert len(losses(again)) == STEPS
    expected = GPTJForCausalLM.from_pretrained(whole.model_folder).state_dict()
    found = GPTJForCausalLM.from_pretrained(again.model_folder).state_dict()
    for key, weight in found.items():
        torch.testing.assert_close(weight, expected[key], rtol=0, atol=1e-6)


# Who goes on with a checkpoint of two workers: which variant, how many workers, other settings.
# Batches of 8 do not divide among three, of whom one computes an empty micro-batch.
ELSEWHERE: dict[str, tuple[str, int, dict[str, Any]]] = {
    "0-on-1": ("stage-0", 1, {}),
    "2-on-1": ("stage-2", 1, {"micro_batch_size": 3}),
    "3-on-1": ("stage-3", 1, {}),
    "0-on-1-at-stage-3": ("stage-0", 1, {"deepspeed": {"stage": 3}}),
    "bf16-0-on-1-at-stage-3": ("bf16-0", 1, {"deepspeed": {"stage": 3}}),
    "0-on-3": ("stage-0", 3, {}),
    "1-on-3": ("stage-1", 3, {"micro_batch_size": 1}),
    "2-on-3": ("stage-2", 3, {}),
    "bf16-2-on-3": ("bf16-2", 3, {}),
    "3-on-3": ("stage-3", 3, {"micro_batch_size": 1}),
    "3-on-3-at-stage-0": ("stage-3", 3, {"deepspeed": {"stage": 0}}),
    "2-on-3-at-stage-3": ("stage-2", 3, {"deepspeed": {"stage": 3}}),
}


def whole_of(folder: Path, run: str) -> Settings:
    """The undisturbed run that another one goes on from the middle of."""
    name = ELSEWHERE[run][0]
    return settings_of(folder, name, workers={"count": 2}, **VARIANTS[name])


@pytest.fixture(scope="module")
def resumed_elsewhere(two_ranks: Path) -> Path:
    runs: dict[int, list[Settings]] = {}
    for run, (name, workers, fields) in ELSEWHERE.items():
        spread = {**VARIANTS[name]["deepspeed"], **fields.get("deepspeed", {})}
        more = {**fields, "deepspeed": spread, "workers": {"count": workers}}
        again = settings_of(two_ranks, run, **more)
        step = "checkpoint-00000003"
        source = Path(whole_of(two_ranks, run).folder, step)
        storage.upload_folder(source, storage.join(again.folder, step))
        runs.setdefault(workers, []).append(again)
    for workers, each in runs.items():
        run_ranks(workers, sorted(each, key=lambda run: -run.deepspeed.stage))
    return two_ranks


@pytest.mark.slow
@pytest.mark.parametrize("run", ELSEWHERE)
def test_a_run_resumes_with_any_number_of_workers_at_any_stage(
    run: str, resumed_elsewhere: Path
) -> None:
    """The same rows, moments and learning rates: in fp32 only the order of summation differs."""
    whole = whole_of(resumed_elsewhere, run)
    again = whole.model_copy(update={"run": run})
    half = "bf16" in run
    assert losses(again) == pytest.approx(losses(whole), abs=5e-2 if half else 1e-5)
    assert len(losses(again)) == STEPS
    # It did not begin anew: the first steps' speeds are those that the checkpoint has.
    speeds, before = (logged(run, "tokens_per_second") for run in (again, whole))
    assert speeds[:3] == before[:3]
    assert speeds[3:] != before[3:]
    assert logged(again, "learning_rate") == pytest.approx(logged(whole, "learning_rate"))
    assert logged(again, "gradient_norm") == pytest.approx(
        logged(whole, "gradient_norm"), rel=5e-2 if half else 1e-3
    )
    expected = GPTJForCausalLM.from_pretrained(whole.model_folder, dtype="float32").state_dict()
    found = GPTJForCausalLM.from_pretrained(again.model_folder, dtype="float32").state_dict()
    for key, weight in found.items():
        torch.testing.assert_close(weight, expected[key], rtol=0, atol=5e-2 if half else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["missing", "truncated", "altered", "no manifest"])
def test_a_damaged_checkpoint_is_refused_by_name(kind: str, resumed: Path, tmp_path: Path) -> None:
    source = Path(resumed, "whole-2", "checkpoint-00000006")
    storage.upload_folder(source, str(tmp_path / "damaged"))
    shard = tmp_path / "damaged" / "shard-00001-of-00002.safetensors"
    named = shard.name
    content = bytearray(shard.read_bytes())
    if kind == "missing":
        shard.unlink()
    elif kind == "truncated":
        shard.write_bytes(content[:-1])
    elif kind == "altered":
        # Sizes are looked at first; hashes only when the rank copies the file.
        progress = tmp_path / "damaged" / "progress.json"
        progress.write_text(progress.read_text().replace('"step": 6', '"step": 5'))
        named = "progress.json"
    else:
        named = "manifest-00001-of-00002.json"
        (tmp_path / "damaged" / named).unlink()
    settings = settings_of(resumed, "whole-2")
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
        check_resumable(settings, str(tmp_path / "damaged"))


@pytest.mark.slow
def test_a_run_only_resumes_with_its_original_settings(resumed: Path) -> None:
    folder = str(Path(resumed, "whole-2"))
    address = latest_checkpoint(folder)
    assert address is not None
    assert address.endswith("checkpoint-00000006")
    fields: dict[str, Any] = {
        "checkpoint_every": 3,
        "workers": {"count": 2},
        "model": {"config": {**MODEL, "resid_pdrop": 0.2}},
        "deepspeed": {"stage": 2},
    }
    same = settings_of(resumed, "whole-2", **fields)
    assert check_resumable(same, address).step == 6
    other = settings_of(resumed, "whole-2", **{**fields, "seed": 1})
    message = (
        r"seed was 0 and is now 1.* may change .*deepspeed.stage, .*log_every, .*workers.count.*"
        r"model.checkpoint=.*/model$"
    )
    with pytest.raises(SettingsError, match=message):
        check_resumable(other, address)


@pytest.mark.slow
def test_a_complete_run_is_recognized_by_its_model_and_settings(two_ranks: Path) -> None:
    fields = {"workers": {"count": 2}, "deepspeed": {"stage": 2}}
    assert is_complete(settings_of(two_ranks, "stage-2", **fields))
    assert not is_complete(settings_of(two_ranks, "never-begun", **fields))
    message = r"with other settings: steps was 6 and is .*with model.checkpoint=.*/model it starts"
    with pytest.raises(SettingsError, match=message):
        is_complete(settings_of(two_ranks, "stage-2", **fields, steps=5))
    assert not is_complete(settings_of(two_ranks, "stage-2", **fields, steps=7))  # extended


def test_a_tokenizer_is_retrained_until_a_checkpoint_depends_on_it(tmp_path: Path) -> None:
    write_text(tmp_path)
    assert len(prepare_tokenizer(settings_of(tmp_path, "r", tokenizer={"vocab_size": 300}))) == 300
    settings = settings_of(tmp_path, "r", tokenizer={"vocab_size": 280})
    assert len(prepare_tokenizer(settings)) == 280
    storage.write_bytes(str(tmp_path / "r" / "checkpoint-1" / "manifest-00000-of-00001.json"), b"")
    settings = settings_of(tmp_path, "r", tokenizer={"vocab_size": 290})
    assert len(prepare_tokenizer(settings)) == 280


def test_a_ranks_manifest_is_its_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that dies while it copies its shard leaves no checkpoint."""
    folder, kept = tmp_path / "local", str(tmp_path / "run" / "checkpoint-00000001")
    for name in ("shard.safetensors", "manifest-00000-of-00001.json"):
        storage.write_bytes(str(folder / name), b"x")

    def failing(path: Path, address: str) -> None:
        raise storage.UnreachableError(address)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "upload", failing)
        with pytest.raises(storage.UnreachableError):
            upload_state(folder, kept, 0, 1)
    assert latest_checkpoint(str(tmp_path / "run")) is None
    upload_state(folder, kept, 0, 1)
    assert latest_checkpoint(str(tmp_path / "run")) == kept


def test_a_late_worker_of_an_earlier_attempt_alters_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray has given it up, but its node is only cut off: its upload goes on after the next's."""
    monkeypatch.setattr(loop, "agree", lambda value: value)
    settings = Settings(run="run", storage=str(tmp_path))
    worker = Worker(0, 1, torch.device("cpu"), lambda *_: None)
    (early, first), (late, second) = (loop._begin_attempt(settings, worker) for _ in range(2))
    assert (first, second) == (1, 2)
    late.fence()
    with pytest.raises(LeaseLostError, match=r"run/attempts \(generation 2, ours was 1\)"):
        early.fence()
    addresses = []
    for attempt in (second, first):  # each has the same step to save
        local = tmp_path / str(attempt)
        (local / "shard.safetensors").parent.mkdir()
        (local / "shard.safetensors").write_text(str(attempt))
        describe(str(local), ["shard.safetensors"]).write(manifest_name(0, 1))
        addresses.append(storage.join(settings.folder, checkpoint_name(3, attempt)))
        upload_state(local, addresses[-1], 0, 1)
    assert latest_checkpoint(settings.folder) == latest_checkpoint(settings.folder, 3)
    assert latest_checkpoint(settings.folder, 3) == addresses[0]
    rank_manifest(addresses[0], 0, 1).check_files(["shard.safetensors"])
    assert latest_checkpoint(settings.folder, 4) is None
    assert [checkpoint_step(address) for address in addresses] == [3, 3]


def test_a_delayed_attempt_does_not_take_the_run_from_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers were slow to start: Ray has given them up, and started others since."""
    monkeypatch.setattr(loop, "agree", lambda value: value)
    settings = Settings(run="run", storage=str(tmp_path))
    delayed, live = (
        Worker(0, 1, torch.device("cpu"), lambda *_: None, fencing_token=(1, number))
        for number in (1, 2)
    )
    live, _ = loop._begin_attempt(settings, live)
    with pytest.raises(
        LeaseLostError,
        match=r"started later has already taken over.*if no such process is running, delete",
    ):
        loop._begin_attempt(settings, delayed)
    live.fence()


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_an_attempt_discards_what_dead_ones_were_uploading(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A later one may live; and others write elsewhere in the run's folder."""
    earlier = ["checkpoint-00000004/shard.safetensors", "checkpoint-00000005-attempt-0002/shard"]
    others = ["checkpoint-00000005-attempt-0003/shard", "data/train/shard", "model/shard"]
    folder = str(tmp_path)
    if kind == "s3":
        request.getfixturevalue("s3")
        client, folder = boto3.Session().client("s3"), f"s3://gptj/{secrets.token_hex(4)}"
        bucket, key = storage.split_s3(folder)
        for name in (*earlier, *others):
            client.create_multipart_upload(Bucket=bucket, Key=f"{key}/{name}")
    else:
        for name in (*earlier, *others):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"{name}.1a2b3c4d.unfinished").write_bytes(b"half")
    delete_unfinished_checkpoints(folder, 2)
    if kind == "s3":
        uploads = client.list_multipart_uploads(Bucket=bucket, Prefix=f"{key}/")["Uploads"]
        left = [upload["Key"].removeprefix(f"{key}/") for upload in uploads]
    else:
        suffix = ".1a2b3c4d.unfinished"
        paths = tmp_path.rglob(f"*{suffix}")
        left = [path.relative_to(tmp_path).as_posix().removesuffix(suffix) for path in paths]
    assert sorted(left) == others


@pytest.mark.parametrize("rank", [0, 1])
def test_an_upload_of_an_earlier_attempt_does_not_complete_what_the_next_has_deleted(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any rank: else it would look complete, and lack the files that were there already."""
    said: list[str | None] = []  # by rank 0

    def agree(value: str | None) -> str | None:
        said.append(value if value is not None else said[-1])
        return said[-1]

    monkeypatch.setattr(loop, "agree", agree)
    settings = Settings(run="run", storage=str(tmp_path))
    first = Worker(0, 2, torch.device("cpu"), lambda *_: None)
    workers = [loop._begin_attempt(settings, replace(first, rank=each))[0] for each in (0, 1)]
    local = tmp_path / "local"
    for name in ("progress.json", "shard.safetensors"):
        storage.write_bytes(str(local / name), b"x")
    describe(str(local), ["progress.json", "shard.safetensors"]).write(manifest_name(rank, 2))
    address = storage.join(settings.folder, checkpoint_name(3))
    storage.upload(local / "progress.json", storage.join(address, "progress.json"))
    upload = storage.upload

    def slow(path: Path, to: str) -> None:
        """The next attempt begins meanwhile."""
        if path.name == "shard.safetensors":
            loop._begin_attempt(settings, first)
            delete_unfinished_checkpoints(settings.folder, 2)
        upload(path, to)

    monkeypatch.setattr(storage, "upload", slow)
    with pytest.raises(LeaseLostError):
        upload_state(local, address, rank, 2, workers[rank].fence)
    names = {file.name for file in storage.list_files(address)}
    assert not any(name.startswith("manifest") for name in names)


@pytest.mark.parametrize("taken_over", [True, False])
def test_an_upload_whose_files_vanish_says_whether_the_run_was_taken_over(
    taken_over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(str(tmp_path / "local" / "shard.safetensors"), b"x")
    checks: list[Exception | None] = [None, LeaseLostError("taken over") if taken_over else None]

    def fence() -> None:
        if error := checks.pop(0):
            raise error

    def upload(path: Path, to: str) -> None:
        raise storage.NotFoundError(f"{to} does not exist")

    monkeypatch.setattr(storage, "upload", upload)
    with pytest.raises(LeaseLostError if taken_over else storage.NotFoundError):
        upload_state(tmp_path / "local", str(tmp_path / "run"), 0, 1, fence)
    assert not checks


def test_whoever_lost_the_run_during_an_upload_finishes_no_checkpoint(tmp_path: Path) -> None:
    """Nor does it touch one of those who have the run now."""
    folder, kept = tmp_path / "local", str(tmp_path / "run" / "checkpoint-00000001")
    for name in ("shard.safetensors", "manifest-00000-of-00001.json"):
        storage.write_bytes(str(folder / name), b"x")
    lost: list[Exception | None] = [None, LeaseLostError("taken over")]

    def fence() -> None:
        if error := lost.pop(0):
            raise error

    with pytest.raises(LeaseLostError):
        upload_state(folder, kept, 0, 1, fence)
    assert latest_checkpoint(str(tmp_path / "run")) is None
    upload_state(folder, kept, 0, 1)
    lost = [LeaseLostError("taken over")]
    with pytest.raises(LeaseLostError):
        upload_state(folder, kept, 0, 1, fence)
    assert latest_checkpoint(str(tmp_path / "run")) == kept


def test_a_checkpoint_needs_all_ranks_manifests(tmp_path: Path) -> None:
    """Not to go on from, and not to count among those that are kept."""
    for name, manifests in {
        "checkpoint-00000001": ["progress.json", "manifest-00001-of-00002.json"],
        "checkpoint-00000002": ["manifest-00000-of-00001.json"],
        "checkpoint-00000003": ["manifest-00000-of-00002.json", "manifest-00001-of-00002.json"],
        "checkpoint-00000004": ["manifest-00000-of-00002.json"],
    }.items():
        for manifest in manifests:
            storage.write_bytes(str(tmp_path / name / manifest), b"{}")
    assert latest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-00000003")
    delete_old_checkpoints(str(tmp_path), keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-00000002", "checkpoint-00000003", "checkpoint-00000004"]
    delete_old_checkpoints(str(tmp_path), keep=1)  # the unfinished newer one may be in the making
    assert len(list(tmp_path.iterdir())) == 2
    assert latest_checkpoint(str(tmp_path / "nothing")) is None


def test_linked_checkpoints_count_and_are_unlinked(tmp_path: Path) -> None:
    """Moved to another disk, or as the link `latest` beside them, which may lead nowhere."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    for step in (1, 2, 3):
        name = checkpoint_name(step)
        storage.write_bytes(str(disk / name / "manifest-00000-of-00001.json"), b"{}")
        run.mkdir(exist_ok=True)
        (run / name).symlink_to(disk / name)
    (run / "latest").symlink_to(run / checkpoint_name(1))
    delete_old_checkpoints(str(run), keep=1)
    assert sorted(path.name for path in run.iterdir()) == [checkpoint_name(3), "latest"]
    assert not (run / "latest").exists()
    assert latest_checkpoint(str(run)) == str(run / checkpoint_name(3))
    (disk / checkpoint_name(3) / "manifest-00000-of-00001.json").rename(disk / "manifest")
    (disk / checkpoint_name(3) / "half").touch()
    delete_unfinished_checkpoints(str(run), 1)
    assert [path.name for path in run.iterdir()] == ["latest"]
    assert sorted(path.name for path in disk.glob("*/*")) == [
        "half",
        *("manifest-00000-of-00001.json",) * 2,
    ]


def test_unfinished_shards_do_not_join_another_world_sizes_checkpoint(
    tmp_path: Path,
) -> None:
    """Ranks die as they save a step, and another number of ranks saves it again."""
    folder = tmp_path / "checkpoint-00000003"
    for ranks, workers in (((0,), 2), ((1, 2), 3)):
        for rank in ranks:
            storage.write_bytes(str(folder / f"manifest-{rank:05}-of-{workers:05}.json"), b"{}")
    assert latest_checkpoint(str(tmp_path)) is None
    with pytest.raises(CheckpointError, match=r"incomplete: manifest-00000-of-00003\.json is miss"):
        read_progress(str(folder))
    storage.write_bytes(str(folder / "manifest-00000-of-00003.json"), b"{}")
    assert latest_checkpoint(str(tmp_path)) == str(folder)


def test_shards_of_dead_ranks_do_not_join_the_next_checkpoint(tmp_path: Path) -> None:
    """Else rank 1's manifest of the first try would complete rank 0's of the second."""
    left, kept = tmp_path / "checkpoint-00000003", tmp_path / "checkpoint-00000002"
    for file in ("manifest-00001-of-00002.json", "shard-00001-of-00002.safetensors"):
        storage.write_bytes(str(left / file), b"{}")
    storage.write_bytes(str(kept / "manifest-00000-of-00001.json"), b"{}")
    storage.write_bytes(str(tmp_path / "data" / "train" / "index.json"), b"{}")
    delete_unfinished_checkpoints(str(tmp_path), 1)
    storage.write_bytes(str(left / "manifest-00000-of-00002.json"), b"{}")
    assert latest_checkpoint(str(tmp_path)) == str(kept)
    assert (tmp_path / "data" / "train" / "index.json").exists()


def loop_run(folder: Path, **fields: Any) -> Any:
    """What a run's loop keeps, of one worker, without an engine."""
    run = loop._Run.__new__(loop._Run)
    run.settings = Settings(run="run", storage=str(folder), steps=6, **fields)
    run.task, run.total = run.settings.task_definition, 6
    run.progress = Progress()
    run._log = run._upload = run._checkpoint_address = None
    run._stopping = False
    return run


def test_a_run_does_not_rewrite_the_checkpoint_it_resumed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to stop at a step that is to be evaluated, the run resumes with that evaluation."""
    run = loop_run(tmp_path, evaluate_every=2, keep_checkpoints=1, checkpoint_every=2)
    run.progress = Progress(step=2, unfinished=True, probe={})
    run._checkpoint_address = storage.join(run.settings.folder, "checkpoint-00000002")
    saved: list[int] = []
    evaluated: list[int] = []

    def step(*_: Any) -> None:
        run.progress.step += 1

    def evaluate(*_: Any) -> dict[str, float]:
        evaluated.append(run.progress.step)
        return {"loss": 1.0}

    monkeypatch.setattr(run, "_step", step)
    monkeypatch.setattr(run, "_evaluate", evaluate)
    monkeypatch.setattr(run, "_check_weights", lambda engine: None)
    monkeypatch.setattr(run, "_checkpoint", lambda *_: saved.append(run.progress.step))
    run._take_steps(None, None, None, None, None)
    assert evaluated == [2, 4, 6]
    assert saved == [4, 6]


@pytest.mark.parametrize(("half", "warned"), [(1e11, True), (4e11, False)])
def test_half_precision_that_a_cpu_is_slower_in_is_named(
    half: float,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = loop_run(tmp_path, deepspeed={"precision": "bf16"})
    run._log, run.worker = object(), Worker(0, 1, torch.device("cpu"), lambda *_: None)
    peaks = {torch.bfloat16: half, torch.float32: 2e11}
    monkeypatch.setattr(loop, "matrix_peak", lambda device, dtype: peaks[dtype])
    assert run._peak_of_all() == half
    named = "2.0 times as fast in fp32 as in bf16: deepspeed.precision=fp32" in caplog.text
    assert named == warned


def test_the_best_checkpoint_is_kept_until_a_better_one_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4 is better than step 1, but a run that dies now resumes from step 3."""
    run = loop_run(tmp_path, keep_checkpoints=1)
    folder = Path(run.settings.folder)
    for step in (1, 2, 3):
        manifest = folder / f"checkpoint-0000000{step}" / "manifest-00000-of-00001.json"
        storage.write_bytes(str(manifest), b"{}")
    run.progress.best = {"step": 4, "score": 2.0, "metrics": {}, "kept": True}
    run._log, run._trackers = object(), Trackers([])
    lost = False

    def fence() -> None:
        if lost:
            raise LeaseLostError("taken over")

    run.worker = Worker(0, 1, torch.device("cpu"), lambda *_: None, fence=fence)
    done: Future[float] = Future()
    done.set_result(0.0)
    run._upload = loop._Upload("checkpoint-00000003", 1, 0.0, done)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    run._finish_upload()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["checkpoint-00000001", "checkpoint-00000003"]
    lost = True  # and whoever has the run now may be resuming from any of them
    run._upload = loop._Upload("checkpoint-00000003", None, 0.0, done)
    with pytest.raises(LeaseLostError):
        run._finish_upload()
    assert sorted(path.name for path in folder.iterdir()) == names


def test_all_that_a_checkpoint_takes_from_the_steps_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The check of the weights, the files' writing, and the wait for the upload, the last too."""
    seconds, now = {"check": 1.0, "save": 20.0, "upload": 300.0}, [0.0]

    def spend(what: str) -> Callable[..., None]:
        def spent(*_: Any) -> None:
            now[0] += seconds[what]

        return spent

    class Uploader:
        """Begins when it is waited for."""

        def submit(self, upload: Callable[[], float]) -> Any:
            return SimpleNamespace(result=upload)

    run = loop_run(tmp_path)
    run.worker = Worker(0, 1, torch.device("cpu"), spend("upload"))
    run.attempt, run._scratch, run._part_bytes = 1, tmp_path, None
    run._uploader, run._trackers = Uploader(), Trackers([])
    run._log = SimpleNamespace(snapshot=list, publish=lambda *_: None)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(loop, "save_state", spend("save"))
    monkeypatch.setattr(run, "_check_weights", spend("check"))
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    caplog.set_level(logging.INFO)
    run._checkpoint(None, {})
    run._checkpoint(None, {})
    run._finish_upload()
    waits = [message for message in caplog.messages if "kept the steps waiting" in message]
    assert [message.partition("waiting for ")[2] for message in waits] == ["321.0 s"] * 2


def test_a_step_waits_for_the_slowest_ranks_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 logs the wait of whichever rank it was; it costs no further reduction."""
    run = loop_run(tmp_path)
    run.worker = Worker(0, 3, torch.device("cpu"), lambda *_: None)
    logged: list[Any] = []
    run._log = SimpleNamespace(step=lambda *given, **_: logged.append(given))
    run._flops, run._peak, run._gate = SimpleNamespace(count=lambda *_: 0.0), 0.0, None
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}], _global_grad_norm=1.0)
    engine = SimpleNamespace(train=lambda: None, optimizer=optimizer)
    loader = SimpleNamespace(next=lambda: (StepBatches([], 0, 8, 8, 8, 8), 0.25))
    reduced: list[Any] = []

    def add_others(counts: torch.Tensor) -> torch.Tensor:
        reduced.append(counts)
        others = torch.zeros_like(counts)
        if len(counts) > 1:
            others[-2], others[-1] = 7.5, 0.5
        return counts + others

    monkeypatch.setattr(run, "_sum", add_others)
    run._step(engine, None, loader)
    ((*_, waited),) = logged
    assert waited == 7.5
    assert len(reduced) == 2  # counts and loss


def test_a_checkpoint_of_an_older_version_is_refused_by_name(tmp_path: Path) -> None:
    record = {"size": 1, "sha256": "0" * 64}
    manifest = {"format": 1, "files": {"zero/mp_rank_00_model_states.pt": record}}
    storage.write_bytes(
        str(tmp_path / "manifest-00000-of-00001.json"), json.dumps(manifest).encode()
    )
    with pytest.raises(CheckpointError, match="was written by an older version"):
        read_progress(str(tmp_path))


def task_of(head: type[Any]) -> AnyTask:
    return next(task for task in TASKS.values() if task.head is head)


@pytest.mark.parametrize("cls", [GPTJForSequenceClassification, GPTJForQuestionAnswering])
def test_micro_batches_add_up_to_the_whole_batch(cls: type[Any]) -> None:
    """Unequal ones too: gradients of sums over items, and not of means of means."""
    torch.manual_seed(0)
    model = cls(GPTJConfig(vocab_size=50, pad_token_id=0, **MODEL))
    batch = {"input_ids": torch.randint(1, 50, (5, 9)), "attention_mask": torch.ones(5, 9).long()}
    if cls is GPTJForSequenceClassification:
        batch["labels"] = torch.tensor([0, 1, 1, 0, 1])
    else:
        batch["start_positions"] = torch.tensor([0, 1, 2, 3, 4])
        batch["end_positions"] = torch.tensor([0, 3, 2, 8, 7])
    whole = model(**batch).loss
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 1), slice(1, 5))]
    sums = [task_of(cls).forward(model, part, len(part["input_ids"]))[0] for part in parts]
    torch.testing.assert_close(sum(sums) / 5, whole)


@pytest.mark.parametrize(
    "cls", [GPTJForCausalLM, GPTJForSequenceClassification, GPTJForQuestionAnswering]
)
def test_padding_affects_neither_loss_nor_gradients(cls: type[Any]) -> None:
    """More padding, and other ids on it, change neither the loss nor a gradient."""
    torch.manual_seed(0)
    model = cls(GPTJConfig(vocab_size=50, **MODEL))
    gradients = []
    for padding, pad_id in ((1, 3), (9, 4)):
        ids = torch.cat((torch.arange(20).view(2, 10), torch.full((2, padding), pad_id)), dim=1)
        mask = torch.cat((torch.ones(2, 10), torch.zeros(2, padding)), dim=1).long()
        batch = {"input_ids": ids, "attention_mask": mask}
        if cls is GPTJForCausalLM:
            batch["labels"] = ids.masked_fill(mask == 0, -100)
        elif cls is GPTJForSequenceClassification:
            batch["labels"] = torch.tensor([0, 1])
        else:
            batch["start_positions"] = torch.tensor([1, 4])
            batch["end_positions"] = torch.tensor([9, 5])
        model.zero_grad()
        loss, _ = task_of(cls).forward(model, batch, 2)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-6)

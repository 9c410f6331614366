"""The accuracy of gptj.training.memory: measured peaks of runs on CPUs beside its predictions.

    python -m gptj_bench.training_memory [CASE …] [--width 512] [--layers 6]

Each case trains a model with GPT-J's vocabulary for two steps with DeepSpeed, in its own processes,
on text that needs no download. The peak is that of a rank's physical memory (VmHWM, reset when
training begins), of several ranks the largest. Prints one JSON object per line, then a table.

glibc's malloc returns freed blocks of more than 32 MiB to the system and keeps smaller ones, with
gaps. A model as small as here has many of these, a large one few: so blocks from 1 MiB on are
returned here too, unless `--default-malloc`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from gptj import GPTJConfig, GPTJForCausalLM, GPTJTokenizer
from gptj.serialization.json_object import to_json
from gptj.storage.local import make_folder
from gptj.training.dataset import node_data
from gptj.training.loop import Worker, train
from gptj.training.memory import as_long_as, known_config
from gptj.training.memory_plan import plan_memory
from gptj.training.settings import Settings
from gptj.training.tasks import TASKS
from gptj.training.tokenizer import prepare_tokenizer
from gptj_local.processes import HOST, free_ports
from jobs import finetune  # noqa: F401  # Ray and all else that a worker has in memory

M_MMAP_THRESHOLD = -3  # glibc's number of the option
RETURNED = 2**20  # bytes of a freed block from which on it is returned

CASES: dict[str, dict[str, Any]] = {
    "fp32, stage 0": {},
    "bf16, stage 0": {"deepspeed": {"stage": 0, "precision": "bf16"}},
    "fp32, stage 2": {"deepspeed": {"stage": 2}},
    "bf16, stage 2, 2 workers": {
        "deepspeed": {"stage": 2, "precision": "bf16"},
        "workers": {"count": 2},
        "batch_size": 4,
    },
    "bf16, stage 3, 2 workers": {
        "deepspeed": {"stage": 3, "precision": "bf16"},
        "workers": {"count": 2},
        "batch_size": 4,
    },
    "fp32, stage 3": {"deepspeed": {"stage": 3}},
    "16 rows": {"micro_batch_size": 16, "batch_size": 16},
    "16 rows, gradient checkpointing": {
        "micro_batch_size": 16,
        "batch_size": 16,
        "model": {"gradient_checkpointing": True},
    },
    "16 rows, selective": {
        "micro_batch_size": 16,
        "batch_size": 16,
        "model": {"gradient_checkpointing": "selective"},
    },
    "4 micro-batches": {"batch_size": 8},
    "LoRA, fp32": {"adapter": {}},
    "LoRA, bf16, 16 rows": {
        "adapter": {},
        "deepspeed": {"stage": 2, "precision": "bf16"},
        "micro_batch_size": 16,
        "batch_size": 16,
    },
    "classification": {"task": "classification"},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--default-malloc", action="store_true", help="keep small freed blocks")
    given = parser.parse_args(arguments)
    shape = {"n_embd": given.width, "n_layer": given.layers, "n_head": 8, "rotary_dim": 32}
    rows = []
    with tempfile.TemporaryDirectory(prefix="gptj-memory-") as name:
        for number, case in enumerate(given.cases or CASES):
            folder = Path(name) / str(number)
            rows.append(measure(folder, case, CASES[case], shape, given.default_malloc))
            print(to_json(rows[-1]), flush=True)
    print("| run | predicted, GB | measured, GB | off by |\n|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['case']} | {row['predicted'] / 1e9:.2f} | {row['measured'] / 1e9:.2f} | "
            f"{row['predicted'] / row['measured'] - 1:+.0%} |"
        )


def measure(
    folder: Path, case: str, fields: dict[str, Any], shape: dict[str, int], default_malloc: bool
) -> dict[str, Any]:
    """A case's prediction and its measurement, in bytes."""
    make_folder(folder)
    config = GPTJConfig(vocab_size=50400, n_positions=256, **shape)
    settings = make_settings(folder, fields, config)
    tokenizer = prepare_tokenizer(settings)
    make_folder(folder / "node")
    longest = node_data(settings, tokenizer, folder / "node").train.longest
    (port,) = free_ports(1)
    spawn(_rank, (port, settings, folder, default_malloc), nprocs=settings.workers.most)
    peaks = [int((folder / f"peak-{n}").read_text()) for n in range(settings.workers.most)]
    plan = plan_memory(as_long_as(settings, longest), known_config(settings), on_gpu=False)
    return {
        "case": case,
        "predicted": plan.device_bytes,
        "measured": max(peaks),
        "parts": dict(plan.device),
        "ranks": peaks,
    }


def make_settings(folder: Path, fields: dict[str, Any], config: GPTJConfig) -> Settings:
    task = fields.get("task", "causal-lm")
    values: dict[str, Any] = {
        "storage": str(folder),
        "steps": 2,
        "batch_size": 2,
        "micro_batch_size": 2,
        # Set, or the sample would be evaluated too, which would take most of the time.
        "data": {"train": f"{TASKS[task].sample}/evaluation", "sequence_length": 256},
        "deepspeed": {"stage": 0},
        **fields,
    }
    shape = {k: v for k, v in config.to_dict().items() if k in GPTJConfig.__annotations__}
    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "rotary_dim")
    model = dict(values.pop("model", {}))
    if "adapter" in values:
        tokenizer = GPTJTokenizer.train(["a base model"], vocab_size=300)
        GPTJForCausalLM(config).save_pretrained(folder / "base", tokenizer=tokenizer)
        model["checkpoint"] = str(folder / "base")
    else:
        model["config"] = {name: shape[name] for name in names}
    return Settings(**{**values, "model": model})


def _rank(rank: int, port: int, settings: Settings, folder: Path, default_malloc: bool) -> None:
    if not default_malloc:
        assert ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, RETURNED)
    world = settings.workers.most
    os.environ.update(MASTER_ADDR=HOST, MASTER_PORT=str(port), WORLD_SIZE=str(world))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    Path("/proc/self/clear_refs").write_text("5")
    train(settings, Worker(rank, world, torch.device("cpu"), lambda *_: None))
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    (folder / f"peak-{rank}").write_text(str(int(peak.split()[1]) * 1024))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

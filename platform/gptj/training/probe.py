"""Check that a resumed run computes what it did before, by the loss on a stored batch.

Manifests prove that a checkpoint's files are unchanged, but not what lies outside it: the frozen
weights under an adapter, the code, PyTorch's kernels. A checkpoint therefore contains a few
training rows, as model inputs, and their loss when it was saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptj.errors import CheckpointError
from gptj.training.evaluation import evaluating
from gptj.training.provenance import provenance
from gptj.training.tasks import AnyTask, Data

ROWS = 4  # at most
# Relative tolerance of the loss, by precision: the order of summation depends on the device and the
# number of threads.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3, "fp16": 5e-3}


@dataclass(frozen=True)
class Probe:
    """Rows and the checkpointed model's loss on them, as stored in `progress.json`.

    Attributes:
        batch: the model's inputs by name: dtype, and values as nested lists.
        items: number of items that the loss averages over.
        loss: None until measured.
        versions: packages and commit that measured it.
    """

    batch: dict[str, dict[str, Any]]
    items: int
    loss: float | None = None
    versions: Mapping[str, str | None] | None = None

    @classmethod
    def first_rows(cls, data: Data, rows: list[int]) -> Probe:
        """A probe of the first ROWS of `rows`."""
        batch = data.collate([data[row] for row in rows[:ROWS]])
        stored = {
            name: {"dtype": str(tensor.dtype).removeprefix("torch."), "values": tensor.tolist()}
            for name, tensor in batch.items()
        }
        return cls(stored, max(1, data.count_items(batch)))

    def measure(self, task: AnyTask, model: nn.Module, device: torch.device) -> float:
        """The model's loss, without dropout. At ZeRO stage 3 all ranks must call this."""
        inputs: dict[str, Tensor] = {
            name: torch.tensor(each["values"], dtype=getattr(torch, each["dtype"]), device=device)
            for name, each in self.batch.items()
        }
        with evaluating(model):
            return float(task.forward(model, inputs, self.items)[0]) / self.items

    def with_loss(self, loss: float) -> dict[str, Any]:
        """The fields of this probe with `loss` and the current versions."""
        return asdict(Probe(self.batch, self.items, loss, versions()))

    def check(self, found: float, precision: str, address: str) -> None:
        """CheckpointError if `found`, the loss after loading `address`, is not the saved one."""
        if self.loss is None:
            return
        if math.isclose(found, self.loss, rel_tol=TOLERANCE[precision], abs_tol=1e-6):
            return
        raise CheckpointError(
            f"the model that resumes from {address} is not the one that was saved: its loss on the "
            f"checkpoint's probe batch was {self.loss:.6g} and is now {found:.6g}. "
            f"{_differences(self.versions or {})}. Restore what it was saved with, or choose "
            f"another run="
        )


def versions() -> dict[str, str | None]:
    """Versions of everything that affects a loss."""
    known = provenance()
    return {**known["versions"], "git commit": known["git_commit"]}


def _differences(before: Mapping[str, str | None]) -> str:
    now = versions()
    changed = [
        f"{name} was {before.get(name)} and is {now.get(name)}"
        for name in dict.fromkeys((*before, *now))
        if before.get(name) != now.get(name)
    ]
    if changed:
        return f"Since then {', '.join(changed)}"
    return (
        "Versions are the same, so the code or weights that are not in the checkpoint, such as "
        "those under an adapter, have changed"
    )

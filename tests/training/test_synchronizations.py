"""How often a training step waits for its device: once, for the loss and the gradient norm.

A GPU runs behind the host until the host reads a value from it, or copies one to it that is not
pinned. Without one, this follows which tensors would be there, from the weights and from what is
moved, and counts the values read and the copies that wait. What
DeepSpeed reads, and the first reduction of several ranks, is not included.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gptj import GPTJConfig, GPTJForCausalLM
from gptj.model import GPTJForQuestionAnswering, GPTJForSequenceClassification, GPTJPreTrainedModel
from gptj.training import loop
from gptj.training.loader import StepBatches, to_device
from gptj.training.loop import Worker
from gptj.training.settings import Settings
from gptj.training.state import Progress

CONFIG = GPTJConfig(
    vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, rotary_dim=2, pad_token_id=0
)
# What hands a tensor's values to Python.
READS = {
    *(Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item),
    *(Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.nonzero, torch.nonzero),
    *(Tensor.__contains__, Tensor.unique, torch.equal, torch.allclose),
}


class Reads(TorchFunctionMode):
    """Records values read from tensors that would be on a device, and copies to it that wait."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self._there = {id(each): each for each in weights}  # keeps them, and so their ids
        self.found: list[str] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        values = [*args, *kwargs.values()]
        flat = [each for value in values for each in (value if _many(value) else [value])]
        there = any(id(each) in self._there for each in flat)
        if there and function in READS:
            self.found.append(function.__name__)
        result = function(*args, **kwargs)
        if function is Tensor.to and any(isinstance(value, torch.device) for value in values):
            # Also one converted on the way, which is copied from memory that is not pinned.
            converted = any(isinstance(value, torch.dtype) for value in values)
            if not there and (converted or not kwargs.get("non_blocking")):
                self.found.append("to")
            there, result = True, result.clone()  # another tensor than the host's
        if there:
            for each in result if _many(result) else [result]:
                if isinstance(each, Tensor):
                    self._there[id(each)] = each
        return result


def _many(value: Any) -> bool:
    return isinstance(value, (list, tuple))


class Engine:
    """A step in plain PyTorch, with DeepSpeed's interface and none of its own reads."""

    def __init__(self, model: GPTJPreTrainedModel) -> None:
        self.module = model
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}], _global_grad_norm=None)
        self.backward = Tensor.backward
        self.train = model.train

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def is_gradient_accumulation_boundary(self) -> bool:
        return True

    def step(self) -> None:
        gradients = [each.grad for each in self.module.parameters() if each.grad is not None]
        weight = next(self.module.parameters())  # so that the norm is on the device, too
        self.optimizer._global_grad_norm = (
            torch.nn.utils.get_total_norm(gradients) + 0 * weight.detach().sum()
        )


def batch(padded: bool, **labels: list[Any]) -> dict[str, Tensor]:
    mask = torch.ones(2, 8, dtype=torch.long)
    if padded:
        mask[1, 5:] = 0
    ids = torch.arange(16).view(2, 8) + 1
    named = {name: torch.tensor(value) for name, value in labels.items()}
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, **named}


TOKENS = list(range(1, 9))
CASES: dict[str, tuple[type[Any], dict[str, list[Any]]]] = {
    "causal-lm": (GPTJForCausalLM, {"labels": [TOKENS, TOKENS]}),
    "classification": (GPTJForSequenceClassification, {"labels": [0, 1]}),
    "question-answering": (
        GPTJForQuestionAnswering,
        {"start_positions": [1, 2], "end_positions": [3, 4]},
    ),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("task", CASES)
def test_a_step_reads_its_device_once(task: Any, padded: bool) -> None:
    head, labels = CASES[task]
    model = head(CONFIG)
    engine, batches = Engine(model), [batch(padded, **labels) for _ in range(3)]
    run: Any = loop._Run.__new__(loop._Run)
    run.settings = Settings(run="run", steps=6, task=task)
    run.task, run.total, run.progress = run.settings.task_definition, 6, Progress()
    run.worker = Worker(0, 1, torch.device("cpu"), lambda *_: None)
    run._log = run._gate = None
    data = SimpleNamespace(count_items=lambda batch: 2)
    loader = SimpleNamespace(next=lambda: (StepBatches(batches, 3, 6, 48, 8, 48), 0.0))
    weights = [each for module in model.modules() for each in module._parameters.values()]
    with Reads([each for each in weights if each is not None]) as reads:
        run._step(engine, data, loader)
    assert reads.found == ["tolist"]


def test_what_is_moved_is_not_read() -> None:
    """The counter itself: a mask that were on the device would be asked whether it is all ones."""
    moved = {name: tensor.clone() for name, tensor in batch(True).items()}
    with Reads([]) as reads:
        there = to_device(moved, torch.device("cpu"))
        assert there["attention_mask"] is moved["attention_mask"]
        bool(there["attention_mask"].all())
        assert reads.found == []
        bool(there["input_ids"].all())
        int((there["input_ids"] + 1).sum())
        moved["attention_mask"].to(torch.device("cpu"))
        moved["attention_mask"].to(torch.device("cpu"), torch.bool, non_blocking=True)
    assert reads.found == ["__bool__", "__int__", "to", "to"]

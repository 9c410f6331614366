"""The tasks by name; each has a file with its data, head, loss and metrics."""

from __future__ import annotations

from typing import Any

from gptj.config import GPTJConfig
from gptj.data.shards import TaskName
from gptj.training.tasks.base import Data, Part, Task
from gptj.training.tasks.causal_lm import CausalLM
from gptj.training.tasks.classification import Classification
from gptj.training.tasks.question_answering import QuestionAnswering

__all__ = ["TASKS", "AnyTask", "Data", "Part", "Task", "TaskName", "task_of"]

AnyTask = Task[Any]
TASKS: dict[TaskName, AnyTask] = {
    task.name: task for task in (CausalLM(), Classification(), QuestionAnswering())
}


def task_of(config: GPTJConfig, checkpoint: str) -> AnyTask:
    """The task of the model's head; ValueError if there is none."""
    heads = {task.head.__name__: task for task in TASKS.values()}
    for name in config.architectures or []:
        if name in heads:
            return heads[name]
    raise ValueError(
        f"{checkpoint}: config.json has architectures={config.architectures}, which must name "
        f"one of {', '.join(heads)}"
    )

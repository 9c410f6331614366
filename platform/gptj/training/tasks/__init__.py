"""The tasks by name; each has a file with its data, head, loss and metrics."""

from __future__ import annotations

from typing import Any

from gptj.data.shards import TaskName
from gptj.training.tasks.base import Data, Part, Task
from gptj.training.tasks.causal_lm import CausalLM
from gptj.training.tasks.classification import Classification
from gptj.training.tasks.question_answering import QuestionAnswering

__all__ = ["TASKS", "AnyTask", "Data", "Part", "Task", "TaskName"]

AnyTask = Task[Any]
TASKS: dict[TaskName, AnyTask] = {
    task.name: task for task in (CausalLM(), Classification(), QuestionAnswering())
}

"""How good a model is: a model and data in, numbers out, computed on one rank or on many.

Each rank collects a part (sums and predictions, plain values); the metrics come from all parts.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gptj.data.causal_lm import CausalLMData
from gptj.data.classification import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ClassificationData
from gptj.data.question_answering import (
    QuestionAnsweringData,
    answer_loss,
    candidates,
    null_logit,
)
from gptj.data.words import Words

MAX_ANSWER_TOKENS = 30  # as in Hugging Face's evaluation of SQuAD

Array = np.ndarray[Any, Any]


class Data(Protocol):
    """What training and evaluation ask of a data set; each task in gptj.data has one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def collate(self, examples: list[Any]) -> dict[str, Tensor]: ...

    def count_items(self, batch: dict[str, Tensor]) -> int: ...

    def count_tokens(self, batch: dict[str, Tensor]) -> int: ...


@dataclass(frozen=True)
class Answer:
    """What one window says: its best span in characters, and how sure it is that there is none."""

    start: int
    end: int
    logit: float  # of the span; minus infinity if the window has none
    null_logit: float


@dataclass
class Part:
    """What one rank has seen; values that pickle, to be gathered from all ranks."""

    loss: float = 0.0  # summed over items
    items: int = 0
    # By the number of the example: a classifier's logits, a reader's answer.
    outputs: dict[int, Any] = field(default_factory=dict)


def evaluate(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int,
    device: torch.device | str,
    rank: int = 0,
    world: int = 1,
    reduce: Callable[[Part], Iterable[Part]] | None = None,
) -> dict[str, float]:
    """The task's metrics over all of `data`, see `metrics`.

    Args:
        batch_size: examples that a rank computes at a time.
        rank, world: this process among those that share the work; all of them must call this.
        reduce: this rank's part in, the parts of all ranks out, as by all_gather_object; needed
            where world is above 1.
    """
    if (world > 1) != (reduce is not None):
        raise ValueError(f"reduce gathers the parts of several ranks, and world is {world}")
    part = collect(model, data, batch_size=batch_size, device=device, rank=rank, world=world)
    return metrics(data, [part] if reduce is None else reduce(part))


def collect(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int,
    device: torch.device | str,
    rank: int = 0,
    world: int = 1,
) -> Part:
    """This rank's share of the examples, run through the model.

    Every rank calls the model equally often (ZeRO-3 gathers its weights for each call): one that
    has no examples left repeats some, and leaves the result out.
    """
    if batch_size < 1 or not 0 <= rank < world:
        raise ValueError(
            f"batch_size must be 1 or more and rank in [0, world), got batch_size={batch_size}, "
            f"rank={rank}, world={world}"
        )
    part = Part()
    with evaluating(model):
        for start in range(0, len(data), batch_size * world):
            first = start + rank * batch_size
            mine = range(first, min(first + batch_size, len(data)))
            batch = data.collate([data[index] for index in mine or range(1)])
            output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
            if mine:
                items = data.count_items(batch)
                part.loss += float(_loss(data, output, batch)) * items
                part.items += items
                part.outputs.update(zip(mine, _outputs(data, output, mine), strict=False))
    return part


def metrics(data: Data, parts: Iterable[Part]) -> dict[str, float]:
    """The numbers of a task, from the parts of all ranks.

    causal-lm: `loss`, `perplexity`, `tokens` (predicted ones).
    classification: `loss`, `accuracy`, `f1` (mean over the classes that occur).
    multi-label classification: `loss`, `accuracy` (of whole rows), `f1` (over all decisions).
    regression: `loss`, `mse`, and `pearson` (mean over outputs) unless a side is constant.
    question-answering: `loss`, `exact_match`, `f1`, as SQuAD counts, from 0 to 1, of answers in
    whole words, as the service gives them.
    """
    merged = Part()
    for part in parts:
        merged.loss += part.loss
        merged.items += part.items
        merged.outputs.update(part.outputs)
    loss = merged.loss / merged.items
    if isinstance(data, CausalLMData):
        return {"loss": loss, "perplexity": _exp(loss), "tokens": merged.items}
    if len(merged.outputs) != len(data):
        raise ValueError(f"parts of {len(merged.outputs)} examples, but there are {len(data)}")
    if isinstance(data, ClassificationData):
        logits = np.array([merged.outputs[index] for index in range(len(data))])
        return {"loss": loss, **_classified(logits, data.targets, data.labels.problem_type)}
    if isinstance(data, QuestionAnsweringData):
        return {"loss": loss, **_answered(data, merged.outputs)}
    raise TypeError(f"no metrics for a {type(data).__name__}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and as it was after that."""
    training = model.training
    model.eval()
    try:
        # Not inference_mode: ZeRO-3 keeps weights that it gathers here for the next training
        # step, which may not use tensors made in that mode.
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def unigram_perplexity(train: CausalLMData, evaluation: CausalLMData) -> float:
    """Perplexity of guessing by frequency alone, over the tokens that a model is measured on.

    Frequencies are those of the training tokens, one added to each of the vocabulary.
    """
    if train.vocabulary != evaluation.vocabulary:
        raise ValueError(
            f"both need one tokenizer, got vocabularies of {train.vocabulary} and "
            f"{evaluation.vocabulary} entries"
        )
    counts = np.bincount(train.tokens, minlength=train.vocabulary) + 1.0
    losses = -np.log(counts / counts.sum())
    return math.exp(losses[evaluation.predicted_tokens().numpy()].mean())


def exact_match(prediction: str, answer: str) -> float:
    """1 if both are the same words, by SQuAD's official rules."""
    return float(normalized(prediction) == normalized(answer))


def overlap_f1(prediction: str, answer: str) -> float:
    """F1 of the words that both have, by SQuAD's official rules."""
    ours, theirs = normalized(prediction).split(), normalized(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and surplus white space."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _loss(data: Data, output: Any, batch: dict[str, Tensor]) -> Tensor:
    """A batch's mean loss, which does not depend on how much padding is in it."""
    if isinstance(data, QuestionAnsweringData):
        return answer_loss(output.start_logits, output.end_logits, batch)
    loss: Tensor = output.loss
    return loss


def _outputs(data: Data, output: Any, examples: Sequence[int]) -> list[Any]:
    """What the metrics need of each example of a batch."""
    if isinstance(data, ClassificationData):
        logits: list[list[float]] = output.logits.float().cpu().tolist()
        return logits
    if isinstance(data, QuestionAnsweringData):
        starts = output.start_logits.double().cpu().numpy()
        ends = output.end_logits.double().cpu().numpy()
        return [
            _answer(data, example, starts[row], ends[row]) for row, example in enumerate(examples)
        ]
    return []


def _answer(data: QuestionAnsweringData, example: int, start: Array, end: Array) -> Answer:
    null = null_logit(start, end)
    words = Words(data.questions[data.question_of(example)].context)
    best = candidates(data.window(example), start, end, MAX_ANSWER_TOKENS, 1, words)
    if not best:
        return Answer(0, 0, -math.inf, null)
    return Answer(best[0].start, best[0].end, best[0].logit, null)


def _answered(data: QuestionAnsweringData, outputs: dict[int, Answer]) -> dict[str, float]:
    """Scores of each question's best span over its windows, against the best-fitting answer.

    "No answer" may win only where the data has questions without one.
    """
    windows: dict[int, list[Answer]] = {}
    for example, answer in outputs.items():
        windows.setdefault(data.question_of(example), []).append(answer)
    impossible = any(not question.answers for question in data.questions)
    exact, f1 = [], []
    for number, question in enumerate(data.questions):
        best = max(windows[number], key=lambda answer: answer.logit)
        prediction = question.context[best.start : best.end]
        if impossible and min(answer.null_logit for answer in windows[number]) > best.logit:
            prediction = ""
        answers = question.answers or ("",)
        exact.append(max(exact_match(prediction, answer) for answer in answers))
        f1.append(max(overlap_f1(prediction, answer) for answer in answers))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}


def _classified(logits_BC: Array, targets: Array, problem_type: str) -> dict[str, float]:
    if problem_type == REGRESSION:
        return _regressed(logits_BC, targets.reshape(logits_BC.shape))
    if problem_type == MULTI_LABEL:
        decisions, truth = logits_BC > 0, targets > 0.5  # a probability above one half
        whole_rows = (decisions == truth).all(axis=1)
        f1 = _f1(decisions & truth, decisions, truth)
        return {"accuracy": float(whole_rows.mean()), "f1": f1}
    assert problem_type == SINGLE_LABEL
    predictions = logits_BC.argmax(axis=1)
    occurring = np.union1d(predictions, targets)
    scores = [
        _f1((predictions == c) & (targets == c), predictions == c, targets == c) for c in occurring
    ]
    return {
        "accuracy": float((predictions == targets).mean()),
        "f1": float(np.mean(scores)),
    }


def _f1(hits: Array, predicted: Array, true: Array) -> float:
    """Twice the hits over all that was predicted or true; 0 where nothing was."""
    total = int(predicted.sum() + true.sum())
    return 2 * int(hits.sum()) / total if total else 0.0


def _regressed(outputs_BC: Array, targets_BC: Array) -> dict[str, float]:
    result = {"mse": float(((outputs_BC - targets_BC) ** 2).mean())}
    if (np.ptp(outputs_BC, axis=0) > 0).all() and (np.ptp(targets_BC, axis=0) > 0).all():
        correlations = [
            np.corrcoef(outputs_BC[:, column], targets_BC[:, column])[0, 1]
            for column in range(outputs_BC.shape[1])
        ]
        result["pearson"] = float(np.mean(correlations))
    return result


def _exp(loss: float) -> float:
    """e to the loss; infinite where a float has no room for it."""
    return math.exp(loss) if loss < math.log(np.finfo(float).max) else math.inf

"""Labels as written in files in, a classifier's targets out.

Labels are names. A number stands for the label of that name; if no label's name is a number, whole
numbers are class indices from 0. The notation is inferred from all rows of the training data and
applied to other files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from gptj.config import PROBLEM_TYPES, GPTJConfig
from gptj.data.json_rows import parse_json
from gptj.data.rows import DataError, Row, shown

REGRESSION, SINGLE_LABEL, MULTI_LABEL = PROBLEM_TYPES
MAX_LABELS = 20_000  # distinct labels to examine in full when inferring the notation

Array = np.ndarray[Any, Any]
LabelNames = Sequence[str] | Mapping[str, str]  # names in order, or values in the data -> names


@dataclass(frozen=True)
class LabelSet:
    """A classifier's labels: the names of its outputs in order, and how labels are read."""

    names: tuple[str, ...]
    problem_type: str  # one of gptj.config.PROBLEM_TYPES
    # Class index by value in the data, and whether lists are multi-hot; None: not yet known.
    written: Mapping[str, int] | None = field(default=None, compare=False)
    multi_hot: bool | None = field(default=None, compare=False)
    # Like `written`, in the data of the model's training: for data of which nothing else is known.
    trained: Mapping[str, int] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"problem_type must be one of {', '.join(PROBLEM_TYPES)}, got {self.problem_type!r}"
            )
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"label names must be one or more, all distinct, got {self.names}")
        if self.problem_type == SINGLE_LABEL and len(self.names) < 2:
            raise ValueError(f"all rows have the label {self.names[0]!r}: nothing to classify")

    @classmethod
    def of(cls, config: GPTJConfig, record: Mapping[str, Any] | None = None) -> LabelSet:
        """The labels that a model was trained on.

        Args:
            record: of its training (LabelSet.record), if known. It has no effect if the labels'
                names alone were written.
        """
        names = tuple(config.id2label[number] for number in range(config.num_labels))
        # Hugging Face's rule if problem_type is unset.
        default = REGRESSION if len(names) == 1 else SINGLE_LABEL
        found = cls(names, config.problem_type or default)
        written = dict((record or {}).get("written", {}))
        if written.keys() <= set(names) or not set(written.values()) <= set(range(len(names))):
            return found
        return replace(found, trained=written, multi_hot=(record or {}).get("multi_hot"))

    def record(self) -> dict[str, Any] | None:
        """How the data wrote the labels, as JSON for `of`; None for measured values."""
        if self.written is None:
            return None
        return {"written": dict(self.written), "multi_hot": self.multi_hot}

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.names))

    @property
    def is_nameless(self) -> bool:
        """Whether the names are generic: LABEL_0 to LABEL_n."""
        return self.names == _numbered_names(len(self.names))

    @property
    def may_count(self) -> bool:
        """Whether class numbers may be read too, as the model's training wrote no other numbers."""
        extra = (self.trained or {}).keys() - set(self.names)
        return not any(_counts_like(text) for text in extra)

    @property
    def expected(self) -> LabelNames:
        """What rows may have as a label, for `check_label`: the names, or also other values."""
        table = self.trained if self.written is None else self.written
        if table is None:
            return self.names
        values = {text: self.names[number] for text, number in table.items()}
        if self.written is None and self.may_count:
            return {**{str(number): name for number, name in self.id2label.items()}, **values}
        return values

    def translated(self, written: Mapping[str, str]) -> LabelSet:
        """The same labels, for data that writes them as the mapping's keys."""
        if unknown := [name for name in written.values() if name not in self.names]:
            raise ValueError(
                f"data.label_names translates to {unknown[0]!r}, which is not one of the labels "
                f"{_some(self.names)}"
            )
        numbers = {key: self.names.index(name) for key, name in written.items()}
        both = _by_name(self.names) | numbers
        return replace(self, written=both, multi_hot=None, trained=None)


class ReadLabels(NamedTuple):
    """The result of `read_labels`."""

    labels: LabelSet
    # (N) class indices, (N, C) 0 and 1, or (N) or (N, C) regression values
    targets: Array
    reading: str  # how the labels were interpreted, in words


def read_labels(
    rows: Sequence[Row],
    labels: LabelSet | None = None,
    names: LabelNames | None = None,
    problem_type: str | None = None,
) -> ReadLabels:
    """Read all rows' targets from their column `label`.

    Args:
        rows: one or more.
        labels: known from training; None: inferred, subject to the other two.
        names: the labels' names in order, or a mapping from values in the data to names.
        problem_type: one of gptj.config.PROBLEM_TYPES.

    Raises:
        DataError: naming the invalid row, or both readings of ambiguous labels.
    """
    found = [_Label(row, row.value("label")) for row in rows]
    known = _known(labels, names, problem_type)
    if not rows[0].typed:
        found = _typed(found, known)
    match known.problem_type or _problem_type(found, known):
        case "regression":
            return _read_numbers(found, known)
        case "multi_label_classification":
            return _read_lists(found, known)
        case kind:
            return _read_single(found, known, kind)


def check_label(row: Row, names: LabelNames | None = None, problem_type: str | None = None) -> None:
    """DataError for a label that is invalid whatever the other rows have.

    Args:
        names: of all labels; None: not yet known.
        problem_type: one of gptj.config.PROBLEM_TYPES; None: not yet known.
    """
    value = row.value("label")
    if isinstance(value, str) and not row.typed:
        value = value.strip()
        if not value:
            raise row.error("label", "is empty")
        if value.startswith("["):
            with suppress(ValueError):  # may be a name, depending on the other rows
                value = parse_json(value)
    values = _listed(value)
    if not all(isinstance(each, str | int | float) for each in values):
        raise row.error(
            "label",
            f"must be a name, a class number, a float, or a list of names or of numbers, "
            f"got {shown(value)}",
        )
    if problem_type == REGRESSION and not row.typed and isinstance(value, str):
        values = [float(value) if _MEASURED.fullmatch(value) else value]
    odd = [each for each in values if not _is_finite(each)]
    measured = problem_type == REGRESSION
    if any(map(_is_number, odd)) or (measured and (odd or not values)):
        raise row.error(
            "label",
            f"must be a finite number, got {shown(value)}; remedy: {_correction(value)}, or "
            f"data.bad_rows=skip to leave out such rows",
        )
    if measured:
        return
    if names is None:
        return
    table = _by_name(names.values() if isinstance(names, Mapping) else names)
    # Text such as 0.0 is a number if that of all rows is.
    readings = [
        [each, float(each)]
        if isinstance(each, str) and not row.typed and _NUMBER.fullmatch(each)
        else [each]
        for each in values
    ]
    numbers = all(_is_number(each[-1]) for each in readings)
    if numbers and len(values) == len(table):  # may be multi-hot, or regression values
        return
    written = {**table, **names} if isinstance(names, Mapping) else table
    may_count = not isinstance(names, Mapping)
    for each, *more in readings:
        known = any(
            _lookup(value, written) is not None  # type: ignore[arg-type]
            or (may_count and _is_count(value, len(table)))
            for value in (each, *more)
        )
        if not known:
            number = None if isinstance(names, Mapping) else _as_whole(each)
            first = None if number is None else min(number, 1)
            raise row.error("label", _is_no_label(each, tuple(table), first))


def _is_count(value: Any, count: int) -> bool:
    """Whether it can be an index of `count` classes, or a 0 or 1."""
    if isinstance(value, str):
        return bool(_WHOLE.fullmatch(value)) and 0 <= int(value) < max(count, 2)
    return _is_whole(value) and 0 <= value < max(count, 2)


def _as_whole(value: Any) -> int | None:
    """The whole number that a label is or, in CSV, is written as; None for any other label."""
    if isinstance(value, str):
        return int(value) if _WHOLE.fullmatch(value) else None
    return int(value) if _is_whole(value) else None


class DistinctLabels:
    """Keeps the rows of a stream that are informative about the labels' notation.

    `read_labels` infers the same from `rows` as from the whole stream. Each distinct label is kept
    once. Beyond MAX_LABELS, labels must be measured values or sets of labels, and only those with
    a new element or length are kept.

    Args:
        problem_type: one of gptj.config.PROBLEM_TYPES; None: not yet known.
    """

    def __init__(self, problem_type: str | None = None) -> None:
        self._problem_type = problem_type
        self.rows: list[Row] = []
        self._seen: set[str | int] = set()

    def add(self, row: Row) -> None:
        """Add a row; only its column `label` is used. DataError for too many names."""
        text = json.dumps(row.value("label"), ensure_ascii=False)
        if text in self._seen:
            return
        new: set[str | int] = {text}
        if len(self.rows) >= MAX_LABELS:
            new = self._features(row) - self._seen
        if not new:
            return
        if len(self.rows) == 2 * MAX_LABELS:
            is_open = self._problem_type is None
            remedy = f"; remedy: data.problem_type={REGRESSION} for values to predict"
            remedy = remedy if is_open else ""
            raise row.error(
                "label",
                f"is one of more than {len(self.rows)} distinct names or class numbers, too many "
                f"for labels{remedy}",
            )
        self._seen |= new
        self.rows.append(row)
        if len(self.rows) == MAX_LABELS:
            self._seen.update(*map(self._features, self.rows))

    def _features(self, row: Row) -> set[str | int]:
        return _features(row, self._problem_type == REGRESSION)


def _features(row: Row, is_measured: bool) -> set[str | int]:
    """A label's informative features: its elements and their number.

    Args:
        is_measured: whether all labels are known to be values to predict.
    """
    value = row.value("label")
    if isinstance(value, str) and not row.typed:
        text = value.strip()
        if text.startswith("["):
            try:
                value = parse_json(text)
            except ValueError:
                value = text
        elif (_MEASURED if is_measured else _NUMBER).fullmatch(text):
            value = float(text)
    if not isinstance(value, list):
        return {_feature(value, is_measured)}
    return {len(value), *(_feature(each, is_measured) for each in value)}


def _feature(value: Any, is_measured: bool) -> str:
    """The value as JSON, or "measured" for any number that is not a class number."""
    measured = _is_finite(value) and (is_measured or not _is_whole(value))
    return "measured" if measured else json.dumps(value, ensure_ascii=False)


class _Label(NamedTuple):
    row: Row
    value: Any

    def error(self, why: str) -> DataError:
        return self.row.error("label", why)


@dataclass(frozen=True)
class _Known:
    """What is known about the labels before reading rows."""

    problem_type: str | None
    names: tuple[str, ...] | None
    table: Mapping[str, int] | None  # class index by value in the data
    decided: bool  # whether the table is complete
    labels: LabelSet | None  # of training


def _known(labels: LabelSet | None, names: LabelNames | None, problem_type: str | None) -> _Known:
    if labels is not None:
        decided = labels.written is not None
        if labels.written is None and labels.trained is not None:
            decided = not labels.may_count
            # Of three labels or more, lists are never both names' numbers and multi-hot.
            multi_hot = labels.multi_hot if len(labels.names) < 3 else None
            written = _by_name(labels.names) | dict(labels.trained)
            labels = replace(labels, written=written, multi_hot=multi_hot)
        table = labels.written or _by_name(labels.names)
        return _Known(labels.problem_type, labels.names, table, decided, labels)
    if names is None:
        return _Known(problem_type, None, None, False, None)
    if not isinstance(names, Mapping):
        return _Known(problem_type, tuple(names), _by_name(names), False, None)
    if problem_type == REGRESSION:
        raise DataError("data.label_names must be a list for a regression, not a mapping")
    unique = tuple(dict.fromkeys(names.values()))
    table = _by_name(unique) | {key: unique.index(name) for key, name in names.items()}
    return _Known(problem_type, unique, table, True, None)


# Numbers in canonical notation: 001 and +1 are names.
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?")
# Where labels are known to be numbers, these are some too.
_MEASURED = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
# Also with a comma, which is never read as a point.
_FRACTION = re.compile(r"[+-]?[0-9]*[.,][0-9]+([eE][+-]?[0-9]+)?")
_WITH_COMMA = re.compile(r"[+-]?[0-9.,]*,[0-9.,]*[0-9]([eE][+-]?[0-9]+)?")
_LIKE_A_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")


_LARGEST = float(np.finfo(np.float32).max)


def _typed(labels: Sequence[_Label], known: _Known) -> list[_Label]:
    """Convert text to numbers or lists, if all rows allow it."""
    problem_type, table = known.problem_type, known.table
    texts = [str(label.value).strip() for label in labels]
    for label, text in zip(labels, texts, strict=True):
        if not text:
            raise label.error("is empty")

    def all_as(convert: Callable[[str], Any]) -> list[_Label]:
        return [_Label(label.row, convert(text)) for label, text in zip(labels, texts, strict=True)]

    if problem_type in (None, SINGLE_LABEL) and table and all(text in table for text in texts):
        return all_as(str)
    if problem_type != SINGLE_LABEL and all(text.startswith("[") for text in texts):
        lists = []
        for label, text in zip(labels, texts, strict=True):
            try:
                lists.append(_Label(label.row, parse_json(text)))
            except ValueError as error:
                raise label.error(
                    f'must be a list in JSON, such as ["a", "b"], got {shown(text)}; remedy: '
                    f"data.problem_type=single_label_classification if it is a name"
                ) from error
        return lists
    if problem_type == MULTI_LABEL:
        return all_as(str)
    if problem_type == REGRESSION:
        return all_as(lambda text: float(text) if _MEASURED.fullmatch(text) else text)
    if all(_WHOLE.fullmatch(text) for text in texts):
        return all_as(int)
    if (problem_type is None or table) and all(_NUMBER.fullmatch(text) for text in texts):
        return all_as(float)
    if problem_type is None and table is None:
        _refuse_odd_numbers(labels, texts)
    return all_as(str)


def _refuse_odd_numbers(labels: Sequence[_Label], texts: Sequence[str]) -> None:
    """DataError if most labels, but not all, are numbers, some with fractions: measured, or names.

    Otherwise one cell such as N/A would make each number a class. Distinct labels are counted, so
    that many rows with N/A change nothing. Whole numbers count beside one with a point, as in half
    stars, but not beside one with a comma, which can be a list.
    """
    distinct = dict.fromkeys(texts)
    fractions = [text for text in distinct if _FRACTION.fullmatch(text)]
    numbers = fractions
    if any("," not in text for text in fractions):
        both = _FRACTION, _MEASURED
        numbers = [text for text in distinct if any(each.fullmatch(text) for each in both)]
    if 2 * len(numbers) <= len(distinct):
        return
    is_comma = any(map(_WITH_COMMA.fullmatch, distinct))
    odd, text = next(
        (label, text)
        for label, text in zip(labels, texts, strict=True)
        if (_WITH_COMMA.fullmatch(text) if is_comma else not _NUMBER.fullmatch(text))
    )
    example = next(filter(_NUMBER.fullmatch, [*fractions, *numbers]), None)
    such = f", such as {example}" if example is not None else ""
    measured = (
        f"data.problem_type={REGRESSION} for values to predict, with data.bad_rows=skip to leave "
        f"out rows without one"
    )
    written = ", which is not written as 0.5 is" if text in numbers else ""
    raise odd.error(
        f"is {shown(text)}{written}, but most of the {len(distinct)} different labels are "
        f"numbers{such}; remedy: {_WITH_POINTS if is_comma else measured}, or "
        f"data.problem_type={SINGLE_LABEL} for names"
    )


_WITH_POINTS = "write numbers with a decimal point and without commas, as 1.5 or 1000"


def _correction(value: Any) -> str:
    """How to correct what should be a number, or a list of them."""
    has_comma = any(
        isinstance(each, str) and _WITH_COMMA.fullmatch(each) for each in _listed(value)
    )
    return _WITH_POINTS if has_comma else "correct it"


def _problem_type(labels: Sequence[_Label], known: _Known) -> str:
    """Infer the problem type from the kind of the values, which must be the same in all rows."""
    values = [label.value for label in labels]
    if known.table is not None and _all_named(values, known.table):
        return SINGLE_LABEL
    if known.names and len(known.names) > 1 and all(map(_is_whole, values)):
        return SINGLE_LABEL  # 0.0 and 1.0 too: values to predict would be in lists
    for kind, problem_type in _KINDS:
        if all(kind(value) for value in values):
            return problem_type
    if all(map(_is_number_list, values)):
        return _kind_of_number_lists(labels, known)
    first = labels[0]
    for kind in (*(kind for kind, _ in _KINDS), _is_number_list):
        # Find a kind that the first row matches and another does not.
        other = next((label for label in labels if not kind(label.value)), first)
        if kind(first.value) and other is not first:
            skip = (
                f", or data.problem_type={REGRESSION} and data.bad_rows=skip to leave out those "
                f"that are not numbers"
                if _is_number(first.value) or _is_number(other.value)
                else ""
            )
            raise other.error(
                f"is {shown(other.value)}, but that of {first.row} is {shown(first.value)}; "
                f"remedy: one kind of label in all rows{skip}"
            )
    raise first.error(
        f"must be a name, a class number, a float, or a list of names or of numbers, "
        f"got {shown(first.value)}"
    )


def _kind_of_number_lists(labels: Sequence[_Label], known: _Known) -> str:
    """Multi-hot, class indices, or measured values; DataError if ambiguous."""
    first = labels[0]
    width = _width(labels)
    whole = all(type(value) is int for value in _values(labels))
    expected = width == len(known.names) if known.names else width is not None and width > 1
    if expected and _are_zero_one(labels):
        return MULTI_LABEL
    if known.table is not None and _all_named(_values(labels), known.table):
        return MULTI_LABEL
    if width is None:
        return MULTI_LABEL if whole else REGRESSION  # the latter then reports unequal lengths
    if not whole:
        return REGRESSION
    raise first.error(
        f"lists of {width} whole numbers in all rows, such as {shown(first.value)}, can be class "
        f"numbers or values to predict; remedy: data.problem_type={MULTI_LABEL} or "
        f"data.problem_type={REGRESSION}"
    )


def _is_multi_hot(labels: Sequence[_Label], names: Sequence[str] | None) -> bool:
    """Whether the lists are 0s and 1s, one per label, rather than names or class indices."""
    width = _width(labels)
    if not width or not _are_zero_one(labels):
        return False
    if names is None and width == 1 and all(type(label.value[0]) is int for label in labels):
        raise labels[0].error(
            "lists of one 0 or 1 in all rows can be one label, off or on, or the class numbers of "
            "two; remedy: data.label_names=[NAME] or data.label_names=[NAME, NAME]"
        )
    return names is None or width == len(names)


def _width(labels: Sequence[_Label]) -> int | None:
    """The common length of all lists; None if they differ."""
    widths = {len(label.value) for label in labels}
    return widths.pop() if len(widths) == 1 else None


def _are_zero_one(labels: Sequence[_Label]) -> bool:
    return all(
        isinstance(value, int | float) and value in (0, 1)
        for label in labels
        for value in label.value
    )


def _class_numbers(labels: Sequence[_Label], values: Sequence[Any]) -> tuple[str, ...]:
    """Names for class indices, which must be 0 to n."""
    for label in labels:
        for value in _listed(label.value):
            if not _is_whole(value):
                raise label.error(f"{shown(value)} is neither a name nor a class number")
    numbers = sorted({int(value) for value in values})
    if numbers[0] != 0 or numbers[-1] != len(numbers) - 1:
        gap = next((n for n, number in enumerate(numbers) if n != number), None)
        without = f" without {gap}" if gap is not None and numbers[0] >= 0 else ""
        all_numbers = ", ".join(map(str, numbers[:12])) + (", …" if len(numbers) > 12 else "")
        raise labels[0].error(
            f"class numbers must be 0 to n without a gap, got {shown(numbers[0])} to "
            f"{shown(numbers[-1])}{without}; remedy: data.label_names=[{all_numbers}] if they are "
            f"names, data.label_names={{{numbers[0]}: NAME, …}} to name them, or "
            f"data.problem_type={REGRESSION} for ratings"
        )
    return _numbered_names(len(numbers))


def _found(labels: Sequence[_Label], known: _Known, problem_type: str) -> LabelSet:
    """The data's labels and their notation."""
    if known.labels is not None and known.decided:
        return known.labels
    values = _values(labels)
    names, table = known.names, known.table
    if names is None or table is None:
        if all(isinstance(value, str) for value in values):
            names = tuple(sorted(set(values)))
        else:
            names = _class_numbers(labels, values)
        table = _by_name(names)
    if not known.decided and _are_class_numbers(values, names):
        _refuse_two_readings(labels, values, names)
        table = {**table, **{str(number): number for number in range(len(names))}}
    found = _label_set(labels, names, problem_type, table, multi_hot=False)
    return found if known.labels is None else replace(found, trained=known.labels.trained)


def _are_class_numbers(values: Sequence[Any], names: tuple[str, ...]) -> bool:
    """Whether the data's numbers can only be class indices."""
    if not values or not all(map(_is_whole, values)) or _has_numbers(names):
        return False
    # Numbers counted from 1 could be in range too; a 0 rules that out.
    unmistakable = min(values) == 0 or all(isinstance(value, bool) for value in values)
    return unmistakable or names == _numbered_names(len(names))


def _refuse_two_readings(
    labels: Sequence[_Label], values: Sequence[Any], names: tuple[str, ...]
) -> None:
    """DataError for several numbers from 1 up: class indices, or classes counted from 1.

    Data counted from 1 that lacks the last class would otherwise be silently shifted.
    """
    numbers = sorted(set(map(int, values)))
    if len(numbers) > 1 and numbers[0] == 1 and numbers[-1] < len(names):
        raise labels[0].error(_two_readings(1, numbers[-1], names))


def _two_readings(first: int, last: int, names: Sequence[str]) -> str:
    """Both readings of numbers that nothing tells apart, and their settings."""
    return (
        f"whole numbers from {first} to {last}, without 0, can count the labels {_some(names)} "
        f"from 0 or from 1; remedy: say which, data.label_names={_mapping(names, 0)} or "
        f"data.label_names={_mapping(names, 1)}"
    )


def _mapping(names: Sequence[str], first: int) -> str:
    """A mapping for data.label_names, from numbers counted from `first`."""
    named = [f"{first + number}: {name}" for number, name in enumerate(names[:12])]
    return f"{{{', '.join(named)}{', …' if len(names) > 12 else ''}}}"


def _label_set(
    labels: Sequence[_Label],
    names: Sequence[str],
    problem_type: str,
    table: Mapping[str, int] | None,
    multi_hot: bool | None,
) -> LabelSet:
    try:
        return LabelSet(tuple(names), problem_type, table, multi_hot)
    except ValueError as error:
        raise labels[0].error(str(error)) from error


def _read_single(labels: Sequence[_Label], known: _Known, problem_type: str) -> ReadLabels:
    for label in labels:
        if isinstance(label.value, list):
            raise label.error(f"must be a name or a class number, got {shown(label.value)}")
    found = _found(labels, known, problem_type)
    targets = [_class_number(label, label.value, found, labels) for label in labels]
    return ReadLabels(found, np.array(targets, dtype=np.int64), _how(labels, found, known))


def _read_lists(labels: Sequence[_Label], known: _Known) -> ReadLabels:
    for label in labels:
        if not isinstance(label.value, list):
            raise label.error(f"must be a list of names or of 0 and 1, got {shown(label.value)}")
    multi_hot = known.labels.multi_hot if known.labels is not None else None
    if multi_hot is None:
        multi_hot = _is_multi_hot(labels, known.names)
    if not multi_hot:
        found = _found(labels, known, MULTI_LABEL)
        how = _how(labels, found, known)
        return ReadLabels(found, _set_targets(labels, found), f"in lists {how}")
    names = known.names or _numbered_names(len(labels[0].value))
    found = _label_set(labels, names, MULTI_LABEL, known.table or _by_name(names), multi_hot=True)
    for label in labels:
        if len(label.value) != len(names) or not _are_zero_one([label]):
            raise label.error(
                f"must be a 0 or 1 for each of {len(names)} labels, got {shown(label.value)}"
            )
    targets = np.array([label.value for label in labels], dtype=np.float32)
    return ReadLabels(found, targets, "from lists of a 0 or 1 for each")


def _set_targets(labels: Sequence[_Label], known: LabelSet) -> Array:
    """(N, C): 1 for each label in a row's list."""
    targets = np.zeros((len(labels), len(known.names)), dtype=np.float32)
    for row, label in enumerate(labels):
        for value in label.value:
            number = _class_number(label, value, known, labels)
            if targets[row, number]:
                raise label.error(
                    f"{shown(label.value)} has {shown(value)} twice: it is neither a list of "
                    f"labels nor a list of a 0 or 1 for each of {len(known.names)} labels"
                )
            targets[row, number] = 1
    return targets


def _read_numbers(labels: Sequence[_Label], known: _Known) -> ReadLabels:
    names = known.names or _numbered_names(len(_listed(labels[0].value)))
    found = known.labels or _label_set(labels, names, REGRESSION, None, None)
    rows = []
    for label in labels:
        numbers = _listed(label.value)
        if not all(map(_is_finite, numbers)):
            raise label.error(
                f"must be a finite number, got {shown(label.value)}; remedy: "
                f"{_correction(label.value)}, or data.problem_type={REGRESSION} with "
                f"data.bad_rows=skip to leave out such rows; for prepared data, give both to "
                f"jobs/prepare_data.py"
            )
        if len(numbers) != len(names):
            raise label.error(f"must be {len(names)} numbers, got {shown(label.value)}")
        rows.append(numbers)
    targets = np.array(rows, dtype=np.float32)
    return ReadLabels(found, targets if len(names) > 1 else targets[:, 0], "as numbers")


def _class_number(label: _Label, value: Any, known: LabelSet, all_labels: Sequence[_Label]) -> int:
    assert known.written is not None
    number = _lookup(value, known.written)
    if number is not None:
        return number
    first = last = None
    if _is_whole(value):
        numbers = [int(each) for each in _values(all_labels) if _is_whole(each)]
        first, last = min(numbers), max(numbers)
    there = sorted({str(each) for each in _values(all_labels)})
    raise label.error(_is_no_label(value, known.names, first, last, there))


def _is_no_label(
    value: Any,
    names: Sequence[str],
    first: int | None,
    last: int | None = None,
    there: Sequence[str] = (),
) -> str:
    """Why a value is refused, and the mappings that would name numbers, or default names.

    Args:
        first: the smallest number among the labels; None if this one is not a whole number.
        last: the largest, if known.
        there: the data's labels, as far as known.
    """
    why = f"{shown(value)} is not one of the labels {_some(names)}"
    if first is not None and not _has_numbers(names):
        if last is not None and first > 0 and last < len(names):
            return f"{why}; {_two_readings(first, last, names)}"
        # A 0 is refused only where the labels are known to be names.
        counted = "" if value in (0, "0") else "; whole numbers count from 0"
        return (
            f"{why}{counted}; remedy: say what they stand for, as in "
            f"data.label_names={_mapping(names, first)}"
        )
    if tuple(names) == _numbered_names(len(names)):
        those = f" ({_some(there)})" if there else ""
        return (
            f"{why}, the names of a model without any; remedy: say which of them the data's "
            f"labels{those} stand for, as in data.label_names={{NAME: {names[0]}, …}}"
        )
    return why


def _how(labels: Sequence[_Label], found: LabelSet, known: _Known) -> str:
    assert found.written is not None
    values = _values(labels)
    if _all_named(values, _by_name(found.names)):
        return "by name"
    counts = {str(number): number for number in range(len(found.names))}
    if all(_lookup(value, counts) == _lookup(value, found.written) for value in values):
        return "by class number"
    trained = known.labels is not None and known.labels.trained is not None
    return "as in the model's training" if trained else "as data.label_names has them"


def _lookup(value: Any, table: Mapping[str, int]) -> int | None:
    """The class index of a value; None if it is not in the table."""
    match value:
        case str():
            return table.get(value)
        case bool():
            written = (str(value), str(value).lower(), str(int(value)))
            return next((table[text] for text in written if text in table), None)
        case int():
            return table.get(str(value))
        case float():
            number = table.get(str(value))
            return table.get(str(int(value))) if number is None and _is_whole(value) else number
    return None


def _all_named(values: Iterable[Any], table: Mapping[str, int]) -> bool:
    return all(_lookup(value, table) is not None for value in values)


def _has_numbers(names: Iterable[str]) -> bool:
    return any(_LIKE_A_NUMBER.fullmatch(name) for name in names)


def _counts_like(text: str) -> bool:
    """Whether data can have it for a class number: a number, or false or true for 0 or 1."""
    return bool(_LIKE_A_NUMBER.fullmatch(text)) or text.lower() in ("false", "true")


def _values(labels: Iterable[_Label]) -> list[Any]:
    """All values, with lists flattened."""
    return [value for label in labels for value in _listed(label.value)]


def _by_name(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _numbered_names(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{number}" for number in range(count))


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names):.300}"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _is_number_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_finite(value: Any) -> bool:
    """Whether it is a number that fp32 can represent."""
    return _is_number(value) and abs(value) <= _LARGEST


# The first that matches all rows wins: whole numbers are class indices, unless any has a point.
_KINDS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda value: isinstance(value, str), SINGLE_LABEL),
    (lambda value: isinstance(value, int), SINGLE_LABEL),
    (_is_number, REGRESSION),
    (lambda value: isinstance(value, list) and all(isinstance(i, str) for i in value), MULTI_LABEL),
)

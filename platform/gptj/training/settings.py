"""A training run's settings: a YAML file and `key=value` words in, one checked object out.

Defaults < YAML < `key=value`. Keys of sections have dots: `optimizer.learning_rate=1e-4`. Unknown
keys, wrong types and contradictions are a SettingsError before anything has begun.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from gptj import storage
from gptj.config import ALIASES, PRESETS, GPTJConfig
from gptj.serialization.yaml_value import parse_yaml
from gptj.storage.addresses import AddressError, absolute, normalized

Task = Literal["causal-lm", "classification", "question-answering"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
Positive = Annotated[int, Field(ge=1)]
# Given ones are never empty: `data.train=$FORGOTTEN` is a mistake, and no wish for the default.
Address = Annotated[str, AfterValidator(normalized)]
DataAddress = Annotated[str, AfterValidator(partial(normalized, samples=True))]


def _one_character(text: str) -> str:
    text = "\t" if text == "\\t" else text
    if len(text) != 1 or text in '"\r\n':
        raise ValueError(f"must be one character, and no quotation mark, got {text!r}")
    return text


Delimiter = Annotated[str, AfterValidator(_one_character)]

# Data that needs no download, for each task.
SAMPLES: Mapping[str, str] = {
    "causal-lm": "sample://documentation",
    "classification": "sample://reviews",
    "question-answering": "sample://questions",
}

# Our names of the columns that each task reads.
COLUMNS: Mapping[Task, tuple[str, ...]] = {
    "causal-lm": ("text",),
    "classification": ("text", "label"),
    "question-answering": ("question", "context", "answers"),
}

# Fields of GPTJConfig that other settings decide.
DECIDED_ELSEWHERE = {
    "id2label": "data.label_names",
    "label2id": "data.label_names",
    "num_labels": "data.label_names",
    "problem_type": "data.problem_type",
    "architectures": "task",
    "dtype": "deepspeed.precision",
    "torch_dtype": "deepspeed.precision",
}


class SettingsError(ValueError):
    """Settings that cannot work; the message names the key, its value and the remedy."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        coerce_numbers_to_str=True,  # run=2024 is a name too
        allow_inf_nan=False,
    )


class DataSettings(Section):
    """What is learned from: Parquet, JSON lines or arrays, SQuAD's file, CSV, text; .gz and .zst.

    Labels are names: text or a number in the data stands for the label of that name. Whole numbers
    are class numbers where there are no names, or none that is a number, and they begin with 0.
    Lists are names, class numbers, or a 0 or 1 for each label; lists of other numbers are values
    to predict. What can be read in two ways is refused; the log says what was decided.
    """

    # File, folder or glob, local or s3://, or sample://; left out: the task's sample.
    train: DataAddress = ""
    # The same; left out: the sample's evaluation part, or no evaluation.
    evaluation: DataAddress = ""
    columns: dict[str, str] = {}  # our column name (see COLUMNS): the file's
    delimiter: Delimiter | None = None  # of CSV; None: the one in the header (comma, ;, tab or |)
    sequence_length: Positive = 128  # tokens of a row; longer texts are cut, contexts windowed
    stride: Annotated[int, Field(ge=0)] = 32  # question answering: tokens that windows share
    problem_type: ProblemType | None = None  # classification; None: as the labels look
    # In the order of their numbers, or {what the data have: name}; empty: as the data have them.
    label_names: list[str] | dict[str, str] = []


class ModelSettings(Section):
    """What learns: a checkpoint to go on from, or a new model."""

    checkpoint: Address = ""  # folder, s3:// or hub id; left out: a new model
    revision: str = ""  # of a hub id
    preset: Literal["tiny", "small", "6b"] = "tiny"  # of a new model
    config: dict[str, Any] = {}  # fields of GPTJConfig to replace
    gradient_checkpointing: bool = False  # less memory, a third more time

    @field_validator("config")
    @classmethod
    def _known_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Under our names; the configuration itself keeps fields that it does not know."""
        named: dict[str, Any] = {}
        for key, value in fields.items():
            name = ALIASES.get(key, key)
            if key in DECIDED_ELSEWHERE:
                raise ValueError(f"{key} is no field to set here: it is {DECIDED_ELSEWHERE[key]}")
            if name not in GPTJConfig.__annotations__:
                known = sorted({*GPTJConfig.__annotations__, *ALIASES} - DECIDED_ELSEWHERE.keys())
                close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
                raise ValueError(f"there is no field {key!r}; {hint}")
            if named.setdefault(name, value) != value:
                raise ValueError(f"{key}={value!r} contradicts {name}={named[name]!r}")
        return named

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        if self.checkpoint:  # whose own shape counts
            return self
        try:
            GPTJConfig(**{**PRESETS[self.preset], **self.config})
        except (ValueError, TypeError) as error:
            raise ValueError(f"model.config: {error}") from error
        return self


class TokenizerSettings(Section):
    """How text becomes ids: a checkpoint brings its own tokenizer, if it has one."""

    # Folder, s3:// or hub id with a tokenizer; left out: the checkpoint's, or a new one.
    address: Address = ""
    vocab_size: Positive = 2048  # of a new one, learned from the training data


class OptimizerSettings(Section):
    """AdamW and its learning rate over time."""

    learning_rate: Annotated[float, Field(gt=0)] = 3e-4  # the highest
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # from 0 up to learning_rate
    final_share: Annotated[float, Field(ge=0, le=1)] = 0.1  # of learning_rate, at the end
    weight_decay: Annotated[float, Field(ge=0)] = 0.01  # of matrices; not of biases and norms
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0  # largest norm; 0: none


class DeepSpeedSettings(Section):
    """How the model's state is spread over the workers."""

    stage: Annotated[int, Field(ge=0, le=3)] = 2  # 1: optimizer; 2: and gradients; 3: and weights
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    offload_optimizer: bool = False  # to the host's memory, from stage 1 on
    offload_parameters: bool = False  # to the host's memory, at stage 3

    @model_validator(mode="after")
    def _check(self) -> DeepSpeedSettings:
        if self.offload_parameters and self.stage < 3:
            raise ValueError(f"offload_parameters needs stage=3, got stage={self.stage}")
        if self.offload_optimizer and self.stage < 1:
            raise ValueError("offload_optimizer needs stage=1 or more, got stage=0")
        return self


class WorkerSettings(Section):
    """The processes that train, and what each is given."""

    count: Positive = 1
    device: Literal["auto", "cpu", "gpu"] = "auto"  # auto: GPUs, where the cluster has any
    cpus: Annotated[float, Field(gt=0)] = 1  # CPUs that Ray counts for a worker
    autoscaling: bool = False  # the cluster will grow: do not insist on the workers' room now
    max_failures: Annotated[int, Field(ge=0)] = 3  # restarts from the last checkpoint


class Settings(Section):
    """Everything that a run is made of."""

    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "finetune"
    storage: Address = "outputs"  # folder or s3://; results go to storage/run
    task: Task = "causal-lm"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    epochs: Annotated[float, Field(gt=0)] = 1  # times that the training data is seen
    steps: Positive | None = None  # optimizer steps, instead of epochs
    batch_size: Positive = 16  # rows of an optimizer step, over all workers
    micro_batch_size: Positive = 8  # rows that a worker computes at a time
    checkpoint_every: Positive = 100  # steps; there is always one at the end
    keep_checkpoints: Positive = 2
    evaluate_every: Positive | None = None  # steps; None: only at the end
    log_every: Positive = 10  # steps
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    workers: WorkerSettings = WorkerSettings()

    @model_validator(mode="before")
    @classmethod
    def _without_null_epochs(cls, fields: Any) -> Any:
        """`epochs: null` leaves them out, beside `steps`."""
        if isinstance(fields, Mapping) and fields.get("epochs", ...) is None:
            return {key: value for key, value in fields.items() if key != "epochs"}
        return fields

    @model_validator(mode="after")
    def _check(self) -> Settings:
        share = self.micro_batch_size * self.workers.count
        if self.batch_size % share:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of micro_batch_size * "
                f"workers.count = {self.micro_batch_size} * {self.workers.count} = {share}"
            )
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs}: give one of the two")
        if self.steps is not None:
            self.total_steps(0)
        for name in self.data.columns:
            if name not in COLUMNS[self.task]:
                raise ValueError(
                    f"data.columns.{name}: task={self.task} has no such column; it has "
                    f"{', '.join(COLUMNS[self.task])}"
                )
        for key, needed, wrong in self._without_effect():
            if key in _set_keys(self):
                raise ValueError(f"{key} has no effect {wrong}: leave it out, or {needed}")
        if self.data.stride >= self.data.sequence_length and self.task == "question-answering":
            raise ValueError(
                f"data.stride={self.data.stride} must be below "
                f"data.sequence_length={self.data.sequence_length}"
            )
        return self

    def resolved(self) -> Settings:
        """With whole paths instead of local relative ones: workers run in other folders."""
        fields = self.model_dump(exclude_unset=True)
        fields["storage"] = absolute(self.storage)
        for section, key in (
            ("data", "train"),
            ("data", "evaluation"),
            ("model", "checkpoint"),
            ("tokenizer", "address"),
        ):
            if value := fields.get(section, {}).get(key):
                # What is not there may be a hub id; if it is neither, its reader says so.
                if section == "data" or Path(value).exists():
                    fields[section][key] = absolute(value, samples=section == "data")
        return Settings(**fields)

    def _without_effect(self) -> Iterator[tuple[str, str, str]]:
        """Keys that do nothing beside the other settings: (key, remedy, reason)."""
        if self.evaluation_data is None:
            yield "evaluate_every", "set data.evaluation", "without data.evaluation"
        if self.task != "question-answering":
            yield "data.stride", "set task=question-answering", f"with task={self.task}"
        if self.task != "classification":
            for key in ("data.problem_type", "data.label_names"):
                yield key, "set task=classification", f"with task={self.task}"
        if self.model.checkpoint:
            for key in ("model.preset", "tokenizer.vocab_size"):
                yield key, "drop model.checkpoint", "on a checkpoint, which brings its own"
        else:
            yield "model.revision", "set model.checkpoint", "without model.checkpoint"
        if self.tokenizer.address:
            yield "tokenizer.vocab_size", "drop tokenizer.address", "on a tokenizer that exists"
        if self.optimizer.schedule == "constant":
            key, reason = "optimizer.final_share", "with optimizer.schedule=constant"
            yield key, "choose cosine or linear", reason

    @property
    def folder(self) -> str:
        """Where the run's checkpoints, curves and model are."""
        return storage.join(self.storage, self.run)

    @property
    def model_folder(self) -> str:
        """Where the finished model is."""
        return storage.join(self.folder, "model")

    @property
    def train_data(self) -> str:
        return self.data.train or SAMPLES[self.task]

    @property
    def evaluation_data(self) -> str | None:
        if self.data.evaluation or self.data.train:
            return self.data.evaluation or None
        return f"{SAMPLES[self.task]}/evaluation"

    @property
    def accumulation(self) -> int:
        """Micro-batches that a worker computes for an optimizer step."""
        return self.batch_size // (self.micro_batch_size * self.workers.count)

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the whole run, on so many training examples.

        SettingsError if the warm-up would be longer.
        """
        total = self.steps
        if total is None:
            total = max(1, round(self.epochs * examples / self.batch_size))
        if self.optimizer.warmup_steps > total:
            raise SettingsError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is more than the run's "
                f"{total} steps, so that the learning rate would never be reached: lower it"
            )
        return total

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


# What may differ when a run goes on: nothing that the result depends on.
CHANGEABLE = frozenset(
    {
        "run",
        "checkpoint_every",
        "keep_checkpoints",
        "evaluate_every",
        "log_every",
        "storage",
        "workers.device",
        "workers.cpus",
        "workers.autoscaling",
        "workers.max_failures",
    }
)


def read_settings(words: Sequence[str]) -> Settings:
    """Settings from a command line: `[SETTINGS.yaml] [key=value …]`.

    Values are YAML, so `steps=5` is a number and `data.label_names=[a,b]` a list. `steps=` replaces
    the file's `epochs`, and `epochs=` its `steps`.

    Raises:
        SettingsError: naming the file or key, and what it may be.
    """
    fields: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for position, word in enumerate(words):
        key, equals, text = word.partition("=")
        if not equals:
            if position:
                raise SettingsError(f"{word!r} is no key=value; a settings file comes first")
            fields = _read_file(word)
            continue
        try:
            given[key] = _parse(text)
            _put(fields, key, given[key])
        except yaml.YAMLError as error:
            raise SettingsError(f"{word:.200}: the value is no YAML: {error}") from error
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if given.get(one) is not None and other not in given:
            fields.pop(other, None)
    try:
        return Settings(**fields)
    except ValidationError as error:
        raise SettingsError(_explain(error)) from error


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys that differ between two runs' settings and change what is computed."""
    old, new = _flat(before), _flat(now)
    keys = sorted((old.keys() | new.keys()) - CHANGEABLE)
    return [
        f"{key} was {old.get(key)!r} and is now {new.get(key)!r}"
        for key in keys
        if old.get(key) != new.get(key)
    ]


def _read_file(address: str) -> dict[str, Any]:
    try:
        fields = parse_yaml(storage.read_bytes(address))
    except AddressError as error:
        raise SettingsError(f"the settings file: {error}") from error
    except storage.NotFoundError as error:
        raise SettingsError(f"there is no settings file {address}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{address} is no YAML: {error}") from error
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise SettingsError(f"{address} must hold keys and values, got a {type(fields).__name__}")
    return fields


_MARKS = tuple("|,:*&#%!@^\t")  # that mean something in YAML, and nothing alone: data.delimiter=|


def _parse(text: str) -> Any:
    if text in _MARKS:
        return text
    value = parse_yaml(text) if text else ""
    if isinstance(value, str):
        try:
            return float(value)  # YAML takes 1e-4, which has no point, for a word
        except ValueError:
            return value
    return value


def _put(fields: dict[str, Any], key: str, value: Any) -> None:
    *path, leaf = key.split(".")
    for name in path:
        inner = fields.setdefault(name, {})
        if not isinstance(inner, dict):
            raise SettingsError(f"{key}: {name} is a value and has no keys")
        fields = inner
    fields[leaf] = value


def _explain(error: ValidationError) -> str:
    lines = []
    for each in error.errors():
        # Not the names of the types that a value may have.
        key = ".".join(str(part) for part in each["loc"] if "[" not in str(part)) or "settings"
        message = each["msg"].removeprefix("Value error, ")
        if each["type"] == "extra_forbidden":
            message = f"there is no such setting; there are {', '.join(_names(each['loc'][:-1]))}"
        elif each["type"] != "value_error":
            message = f"{message}, got {each['input']!r}"
        lines.append(f"{key}: {message}")
    return "\n".join(lines)


def _names(path: Sequence[str | int]) -> list[str]:
    section: Any = Settings
    for name in path:
        section = section.model_fields[name].annotation
    return list(section.model_fields)


def _set_keys(section: Section, prefix: str = "") -> set[str]:
    """The dotted names of the settings that were given."""
    keys: set[str] = set()
    for name in section.model_fields_set:
        value = getattr(section, name)
        keys |= (
            _set_keys(value, f"{prefix}{name}.") if isinstance(value, Section) else {prefix + name}
        )
    return keys


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping) and key not in ("config", "columns", "label_names"):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

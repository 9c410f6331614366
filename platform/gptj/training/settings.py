"""A training run's settings: a YAML file and `key=value` arguments in, a validated object out.

Defaults < YAML < `key=value`. Keys of sections are dotted: `optimizer.learning_rate=1e-4`. Unknown
keys, wrong types and contradictions raise a SettingsError before anything starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from math import ceil
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from gptj import storage
from gptj.serialization.yaml_value import Texts, parse_yaml
from gptj.storage.addresses import HUB_DATA, AddressError, absolute, at_commit
from gptj.training.sections import (
    AdapterSettings,
    Address,
    DataSettings,
    DeepSpeedSettings,
    ModelSettings,
    OptimizerSettings,
    Positive,
    Section,
    SettingsError,
    TokenizerSettings,
    TrackingSettings,
    WorkerSettings,
    absolute_tracking_uri,
    is_text,
)
from gptj.training.tasks import TASKS, AnyTask, TaskName

__all__ = ["Settings", "SettingsError", "changed", "read_settings"]


class Settings(Section):
    """All settings of a run."""

    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "finetune"
    storage: Address = "outputs"  # folder or s3://; results go to storage/run
    task: TaskName = "causal-lm"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    epochs: Annotated[float, Field(gt=0)] = 1  # passes over the data, rounded up to batches
    steps: Positive | None = None  # optimizer steps, instead of epochs
    batch_size: Positive = 16  # rows per optimizer step, over all workers
    micro_batch_size: Positive = 8  # most rows per forward pass of a worker
    checkpoint_every: Positive = 100  # steps; always one at the end
    keep_checkpoints: Positive = 2
    evaluate_every: Positive | None = None  # steps; None: only at the end
    export: Literal["best", "last"] = "best"  # which model, by the task's evaluation metric
    early_stopping: Positive | None = None  # evaluations in a row without a better one; None: never
    log_every: Positive = 10  # steps
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    adapter: AdapterSettings | None = None  # None: train all weights; {}: LoRA with its defaults
    optimizer: OptimizerSettings = OptimizerSettings()
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    workers: WorkerSettings = WorkerSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="before")
    @classmethod
    def _without_null_epochs(cls, fields: Any) -> Any:
        """Treat `epochs: null` as left out, so that it can accompany `steps`."""
        if isinstance(fields, Mapping) and fields.get("epochs", ...) is None:
            return {key: value for key, value in fields.items() if key != "epochs"}
        return fields

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if self.batch_size < self.workers.most:
            raise ValueError(
                f"batch_size={self.batch_size} leaves some of {self.workers.most} workers without "
                f"a row: raise it, or lower workers.count"
            )
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs}: give one of the two")
        if self.steps is not None:
            self.total_steps(0)
        for name in self.data.columns:
            if name not in self.task_definition.columns:
                raise ValueError(
                    f"data.columns.{name}: task={self.task} has no such column; it has "
                    f"{', '.join(self.task_definition.columns)}"
                )
        kinds = self.task_definition.row_kinds
        if not any(set(self.data.columns) <= set(kind) for kind in kinds):
            raise ValueError(
                f"data.columns: {', '.join(self.data.columns)} are not columns of one kind of "
                f"rows; there are {' or '.join(', '.join(kind) for kind in kinds)}"
            )
        if self.adapter is not None and not self.model.checkpoint:
            raise ValueError("adapter: a new model has no weights to adapt: set model.checkpoint")
        if self.adapter is not None and self.model.gradient_checkpointing == "selective":
            raise ValueError(
                "adapter and model.gradient_checkpointing=selective: without checkpointing, the "
                "outputs of frozen products are not kept either, so it would take more memory: "
                "set it to true or false"
            )
        if self.adapter is not None and self.adapter.quantization and self.deepspeed.stage == 3:
            raise ValueError(
                f"adapter.quantization={self.adapter.quantization} and deepspeed.stage=3: "
                f"DeepSpeed does not shard quantized weights; each worker holds all of them: set "
                f"deepspeed.stage=2, or drop adapter.quantization"
            )
        if self.optimizer.moments == "8bit" and self.deepspeed.offload_optimizer:
            raise ValueError(
                "optimizer.moments=8bit and deepspeed.offload_optimizer: DeepSpeed's offloaded "
                "optimizer keeps its moments in fp32: choose one of the two"
            )
        if self.data.evaluation_split is not None and self.data.evaluation:
            raise ValueError(
                f"data.evaluation_split={self.data.evaluation_split:g} holds out a part of the "
                f"training data, but data.evaluation={self.data.evaluation} is separate data: "
                f"give one of the two"
            )
        for key, needed, wrong in self._without_effect():
            if key in _set_keys(self):
                raise ValueError(f"{key} has no effect {wrong}: leave it out, or {needed}")
        self.task_definition.check(self.data)
        return self

    def resolved(self) -> Settings:
        """With local paths made absolute, since workers run in other folders."""
        fields = self.model_dump(exclude_unset=True)
        fields["storage"] = absolute(self.storage)
        for section, key in (
            ("data", "train"),
            ("data", "evaluation"),
            ("model", "checkpoint"),
            ("tokenizer", "address"),
            ("tokenizer", "chat_template"),
        ):
            if value := fields.get(section, {}).get(key):
                # A path that does not exist may be a hub id; if not, its reader reports that.
                if section == "data" or Path(value).exists():
                    fields[section][key] = absolute(value, samples=section == "data")
        if uri := fields.get("tracking", {}).get("mlflow"):
            fields["tracking"]["mlflow"] = absolute_tracking_uri(uri)
        return Settings(**fields)

    def pinned(self, commit: str | None, data: Mapping[str, str] | None = None) -> Settings:
        """With what is on the hub read at the commits that are given.

        Args:
            commit: of the model's checkpoint.
            data: of "train" and "evaluation".
        """
        sections: dict[str, Any] = {}
        if commit is not None:
            sections["model"] = self.model.model_copy(update={"revision": commit})
        addresses = {"train": self.data.train, "evaluation": self.data.evaluation}
        pinned = {
            name: at_commit(address, (data or {})[name])
            for name, address in addresses.items()
            if name in (data or {}) and address.startswith(HUB_DATA)
        }
        if pinned:
            sections["data"] = self.data.model_copy(update=pinned)
        return self.model_copy(update=sections) if sections else self

    def _without_effect(self) -> Iterator[tuple[str, str, str]]:
        """Keys without effect given the other settings: (key, remedy, reason)."""
        if self.evaluation_data is None:
            remedy = "set data.evaluation or data.evaluation_split"
            for key in ("evaluate_every", "export", "early_stopping"):
                yield key, remedy, "without data to measure with"
        elif self.evaluate_every is None:
            yield "early_stopping", "set evaluate_every", "without evaluate_every"
        if not self.data.train:
            reason = "on a sample, which has evaluation data of its own"
            yield "data.evaluation_split", "set data.train", reason
        for name, other in TASKS.items():
            for key in other.own_settings:
                if key not in self.task_definition.own_settings:
                    yield f"data.{key}", f"set task={name}", f"with task={self.task}"
        if self.model.checkpoint:
            for key in ("model.preset", "tokenizer.vocab_size"):
                yield key, "drop model.checkpoint", "on a checkpoint, which brings its own"
        else:
            yield "model.revision", "set model.checkpoint", "without model.checkpoint"
        if self.tokenizer.address:
            yield "tokenizer.vocab_size", "drop tokenizer.address", "on a tokenizer that exists"
        if self.optimizer.skip_spikes is None:
            key, reason = "optimizer.spike_window", "without optimizer.skip_spikes"
            yield key, "set optimizer.skip_spikes", reason
        if self.deepspeed.precision != "fp16":
            key = "deepspeed.max_overflows"
            yield key, "set deepspeed.precision=fp16", f"in {self.deepspeed.precision}"
        if self.optimizer.schedule == "constant":
            key, reason = "optimizer.final_share", "with optimizer.schedule=constant"
            yield key, "choose cosine or linear", reason

    @property
    def task_definition(self) -> AnyTask:
        return TASKS[self.task]

    @property
    def folder(self) -> str:
        """Where the run's checkpoints, curves and model are."""
        return storage.join(self.storage, self.run)

    @property
    def model_folder(self) -> str:
        """Where the finished model is."""
        return storage.join(self.folder, "model")

    @property
    def addresses(self) -> tuple[str, ...]:
        """All that the run reads or writes."""
        found = (
            self.storage,
            self.train_data,
            self.evaluation_data,
            self.model.checkpoint,
            self.tokenizer.address,
            self.tokenizer.chat_template,
        )
        return tuple(each for each in found if each)

    @property
    def train_data(self) -> str:
        return self.data.train or self.task_definition.sample

    @property
    def evaluation_data(self) -> str | None:
        if self.data.evaluation_split is not None:
            return self.train_data
        if self.data.evaluation or self.data.train:
            return self.data.evaluation or None
        return f"{self.task_definition.sample}/evaluation"

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the whole run on `examples` training examples.

        Epochs leave none out: their last batch is filled with the first ones of the next.

        Raises SettingsError if the warm-up is longer.
        """
        total = self.steps
        if total is None:
            # The exact decimal: 0.1 * 30 is more than 3 in floating point.
            total = max(1, ceil(Fraction(str(self.epochs)) * examples / self.batch_size))
        if self.optimizer.warmup_steps > total:
            raise SettingsError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is more than the run's "
                f"{total} steps, so the learning rate would never be reached: lower it"
            )
        return total

    def to_yaml(self) -> str:
        """The run's name and task, and what differs from the defaults."""
        fields = {"run": self.run, "task": self.task, **self.model_dump(exclude_defaults=True)}
        return yaml.safe_dump(
            fields, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
        )


# Settings that may change when a run resumes: its steps depend on them only by rounding (and, with
# another number of workers, dropout's random choices).
CHANGEABLE = frozenset(
    {
        "run",
        "micro_batch_size",
        "workers.count",
        "deepspeed.stage",
        "deepspeed.offload_optimizer",
        "deepspeed.offload_parameters",
        "model.gradient_checkpointing",
        "checkpoint_every",
        "keep_checkpoints",
        "evaluate_every",
        "log_every",
        "storage",
        "workers.device",
        "workers.cpus",
        "workers.autoscaling",
        "workers.max_failures",
        "workers.peak_tflops",
        "tracking.mlflow",
        "tracking.wandb",
        "deepspeed.max_overflows",
        "export",
        "early_stopping",
    }
)
EXTENDABLE = ("steps", "epochs")  # may be raised
# Values implied by runs of earlier versions, which lacked these settings.
ADDED: Mapping[str, Any] = {
    "data.packing": "concatenate",
    "data.bad_rows": "refuse",
    "tokenizer.chat_template": "",
    "optimizer.skip_spikes": None,
    "optimizer.spike_window": 100,
    "optimizer.moments": "fp32",
    "adapter.quantization": None,
}
MAY_CHANGE = (
    f"A run that resumes may change {', '.join(sorted(CHANGEABLE - {'run', 'storage'}))}, and "
    f"raise {' or '.join(EXTENDABLE)}"
)


def read_settings(words: Sequence[str]) -> Settings:
    """Settings from a command line: `[SETTINGS.yaml] [key=value …]`.

    Values are YAML, so `steps=5` is a number and `data.label_names=[a,b]` a list. Names, addresses
    and other text stay as they are written: `run=1e4`, `data.label_names=[no, yes]`. `steps=`
    replaces the file's `epochs`, and `epochs=` its `steps`.

    Raises:
        SettingsError: naming the file or key, and what is allowed.
    """
    try:
        return Settings(**_read_words(words))
    except ValidationError as error:
        raise SettingsError(_explain(error)) from error


def read_data_options(words: Sequence[str]) -> DataSettings:
    """How a command line says that rows are read, whatever its task: columns, delimiter, bad rows.

    SettingsError like read_settings.
    """
    found = _read_words(words).get("data")
    data = found if isinstance(found, dict) else {}
    try:
        return DataSettings(
            **{key: data[key] for key in ("columns", "delimiter", "bad_rows") if key in data}
        )
    except ValidationError as error:
        raise SettingsError(_explain(error, "data.")) from error


def _read_words(words: Sequence[str]) -> dict[str, Any]:
    """A command line's fields, not yet checked."""
    fields: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for position, word in enumerate(words):
        key, equals, text = word.partition("=")
        if not equals:
            if position:
                raise SettingsError(f"{word!r} is not key=value; a settings file comes first")
            fields = _read_file(word)
            continue
        try:
            given[key] = _parse(text, _texts_at(key))
            _put(fields, key, given[key])
        except yaml.YAMLError as error:
            raise SettingsError(f"{word:.200}: the value is not valid YAML: {error}") from error
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if given.get(one) is not None and other not in given:
            fields.pop(other, None)
    return fields


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the keys that differ between two runs' settings and change what is computed.

    More steps or epochs extend a run; see `extended`.
    """
    old, new = {**ADDED, **_flat(before)}, _flat(now)
    ignored = {f"data.{key}" for key in _foreign(before) & _foreign(now)}
    keys = sorted((old.keys() | new.keys()) - CHANGEABLE - extended(before, now) - ignored)
    return [
        f"{key} was {old.get(key)!r} and is now {new.get(key)!r}"
        for key in keys
        if old.get(key) != new.get(key)
    ]


def _foreign(fields: Mapping[str, Any]) -> set[str]:
    """Keys of `data` that do not apply to a run's task."""
    own = TASKS[fields["task"]].own_settings
    return {key for task in TASKS.values() for key in task.own_settings if key not in own}


def extended(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Which of EXTENDABLE have been raised."""
    return {
        key
        for key in EXTENDABLE
        if before.get(key) is not None and now.get(key) is not None and now[key] > before[key]
    }


def _read_file(address: str) -> dict[str, Any]:
    try:
        fields = parse_yaml(storage.read_bytes(address), _texts(Settings))
    except AddressError as error:
        raise SettingsError(f"the settings file: {error}") from error
    except storage.NotFoundError as error:
        raise SettingsError(f"there is no settings file {address}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{address} is not valid YAML: {error}") from error
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise SettingsError(f"{address} must be a YAML mapping, got a {type(fields).__name__}")
    return fields


_MARKS = tuple("|,:*&#%!@^\t")  # special in YAML, but invalid alone: data.delimiter=|


def _parse(text: str, texts: Texts | None) -> Any:
    if text in _MARKS:
        return text
    value = parse_yaml(text, texts) if text else ""
    if isinstance(value, str) and texts is not True:
        try:
            return float(value)  # YAML reads 1e-4, without a point, as a string
        except ValueError:
            return value
    return value


def _texts(section: Any) -> dict[str, Texts]:
    """A section's keys that are text, or lists or mappings of text."""
    found: dict[str, Texts] = {}
    for name, field in section.model_fields.items():
        if issubclass(inner := _inner(field.annotation), Section):
            found[name] = _texts(inner)
        elif is_text(field.annotation):
            found[name] = True
    return found


def _texts_at(key: str) -> Texts | None:
    """What is text in the value of a dotted key."""
    texts: Texts | None = _texts(Settings)
    for name in key.split("."):
        if texts is None or texts is True:
            break
        texts = texts.get(name)
    return texts


def _put(fields: dict[str, Any], key: str, value: Any) -> None:
    *path, leaf = key.split(".")
    for name in path:
        inner = fields.setdefault(name, {})
        if not isinstance(inner, dict):
            raise SettingsError(f"{key}: {name} is a value and has no keys")
        fields = inner
    fields[leaf] = value


def _explain(error: ValidationError, section: str = "") -> str:
    """A line for each wrong key, with `section` (such as `data.`) before it."""
    lines = []
    for each in error.errors():
        # Without the names of union members, which contain brackets.
        key = ".".join(str(part) for part in each["loc"] if "[" not in str(part)) or "settings"
        key = section + key
        message = each["msg"].removeprefix("Value error, ")
        if each["type"] == "extra_forbidden":
            meant = closest(key)
            message = "unknown setting; " + (
                f"did you mean {' or '.join(meant)}?"
                if meant
                else f"there are {', '.join(_names(each['loc'][:-1]))}"
            )
        elif each["type"] != "value_error":
            message = f"{message}, got {each['input']!r}"
        lines.append(f"{key}: {message}")
    return "\n".join(lines)


def closest(key: str) -> list[str]:
    """The settings that an unknown dotted key may stand for: of the same name, or a similar one."""
    path = key.split(".")
    known = _keys(Settings)
    if same := [each for each in known if each.split(".")[-1] == path[-1]]:
        return same
    beside = [each for each in known if each.split(".")[:-1] == path[:-1]]
    for choices in (beside, known):
        by_name: dict[str, list[str]] = {}
        for each in choices:
            by_name.setdefault(each.split(".")[-1], []).append(each)
        if found := difflib.get_close_matches(path[-1], by_name, n=1, cutoff=0.75):
            return by_name[found[0]]
    return []


def _keys(section: Any, prefix: str = "") -> list[str]:
    """All dotted keys, of the sections themselves too."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if issubclass(inner := _inner(field.annotation), Section):
            keys += _keys(inner, f"{prefix}{name}.")
    return keys


def _names(path: Sequence[str | int]) -> list[str]:
    section: Any = Settings
    for name in path:
        section = _inner(section.model_fields[name].annotation)
    return list(section.model_fields)


def _inner(annotation: Any) -> type:
    """The section of an annotation such as `AdapterSettings | None`; other types are any."""
    inner = next((each for each in get_args(annotation) if each is not NoneType), annotation)
    return inner if isinstance(inner, type) else object


def _set_keys(section: Section, prefix: str = "") -> set[str]:
    """The dotted names of the settings that were set explicitly."""
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

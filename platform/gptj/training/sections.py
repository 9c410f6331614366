"""The sections of a run's settings: data, model, tokenizer, optimizer, DeepSpeed, workers."""

from __future__ import annotations

import difflib
import os
import re
from functools import partial
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import quote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from gptj.adapters.config import LoRAConfig
from gptj.adapters.quantization import Quantization
from gptj.config import ALIASES, PRESETS, GPTJConfig
from gptj.data.packing import Packing
from gptj.storage.addresses import normalized

Recomputation = bool | Literal["selective"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
Positive = Annotated[int, Field(ge=1)]
# Must not be empty if set: `data.train=$FORGOTTEN` is a mistake, not a request for the default.
Address = Annotated[str, AfterValidator(normalized)]
DataAddress = Annotated[str, AfterValidator(partial(normalized, samples=True))]


def _one_character(text: str) -> str:
    text = "\t" if text == "\\t" else text
    if len(text) != 1 or text in '"\r\n':
        raise ValueError(f"must be one character other than a quotation mark, got {text!r}")
    return text


Delimiter = Annotated[str, AfterValidator(_one_character)]

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
        allow_inf_nan=False,
        hide_input_in_errors=True,  # a tracker's address may have a password
    )


def is_text(annotation: Any) -> bool:
    """Whether a setting's values, or the items or values of its lists and mappings, are strings."""
    if get_origin(annotation) is dict:
        return is_text(get_args(annotation)[1])
    if get_origin(annotation) is Literal:
        return False
    return annotation is str or any(map(is_text, get_args(annotation)))


class DataSettings(Section):
    """Training data: Parquet, JSON lines or arrays, SQuAD, CSV, text; also .gz and .zst.

    Labels are names: text or a number in the data stands for the label of that name. Whole numbers
    are class indices from 0 unless a name is a number. Lists hold names, class indices, or a 0 or
    1 per label; lists of other numbers are values to predict. Ambiguous data is rejected; the log
    states the interpretation.
    """

    # File, folder or glob, local or s3://, or sample://; left out: the task's sample.
    train: DataAddress = ""
    # Likewise; left out: the sample's evaluation part, or no evaluation.
    evaluation: DataAddress = ""
    # Share of the training data held out for evaluation: rows chosen by the seed; of a long text,
    # its end. None: no split.
    evaluation_split: Annotated[float, Field(gt=0, le=0.5)] | None = None
    columns: dict[str, str] = {}  # our column name (see the task's columns) -> the file's
    delimiter: Delimiter | None = None  # of CSV; None: the one in the header (comma, ;, tab or |)
    bad_rows: Literal["refuse", "skip"] = "refuse"  # unusable rows; skipped ones are counted
    sequence_length: Positive = 128  # tokens per row; longer texts are cut, contexts windowed
    # Causal-lm: how documents share rows: whole, each attending only to itself; concatenated and
    # cut wherever a row is full; or one padded row each.
    packing: Packing = "best_fit"
    stride: Annotated[int, Field(ge=0)] = 32  # question answering: tokens that windows overlap
    problem_type: ProblemType | None = None  # classification; None: inferred from the labels
    # In the order of their indices, or {value in the data: name}; empty: taken from the data.
    label_names: list[str] | dict[str, str] = []


class ModelSettings(Section):
    """The model to train: a checkpoint, or a new one."""

    checkpoint: Address = ""  # folder, s3:// or hub id; left out: a new model
    revision: str = ""  # of a hub id
    preset: Literal["tiny", "small", "6b"] = "tiny"  # for a new model
    config: dict[str, Any] = {}  # fields of GPTJConfig to replace
    # Compute activations again in the backward pass: all (true), or what is cheap (selective).
    gradient_checkpointing: Recomputation = False

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _known_way(cls, value: Any) -> Any:
        if value in (True, False, "true", "false", "selective"):
            return value
        raise ValueError(f"must be true, false or selective, got {value!r}")

    @field_validator("config")
    @classmethod
    def _known_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Resolve aliases and reject unknown fields, which GPTJConfig itself would keep."""
        named: dict[str, Any] = {}
        for key, value in fields.items():
            name = ALIASES.get(key, key)
            if key in DECIDED_ELSEWHERE:
                raise ValueError(f"{key} cannot be set here; use {DECIDED_ELSEWHERE[key]}")
            if name not in GPTJConfig.__annotations__:
                known = sorted({*GPTJConfig.__annotations__, *ALIASES} - DECIDED_ELSEWHERE.keys())
                close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
                raise ValueError(f"unknown field {key!r}; {hint}")
            if named.setdefault(name, value) != value:
                raise ValueError(f"{key}={value!r} contradicts {name}={named[name]!r}")
        return named

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        if self.checkpoint:  # checked against its own configuration later
            return self
        try:
            GPTJConfig(**{**PRESETS[self.preset], **self.config})
        except (ValueError, TypeError) as error:
            raise ValueError(f"model.config: {error}") from error
        return self


class TokenizerSettings(Section):
    """The tokenizer; a checkpoint's own is used if it has one."""

    # Folder, s3:// or hub id with a tokenizer; left out: the checkpoint's, or a new one.
    address: Address = ""
    vocab_size: Positive = 2048  # of a new one, trained on the training data
    # Formats messages: a Jinja file, or the name of a built-in template (gptj.chat); left out: the
    # tokenizer's own. Saved with the model.
    chat_template: str = ""


class OptimizerSettings(Section):
    """AdamW and its learning-rate schedule."""

    learning_rate: Annotated[float, Field(gt=0)] = 3e-4  # the peak
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # from 0 up to learning_rate
    final_share: Annotated[float, Field(ge=0, le=1)] = 0.1  # of learning_rate, at the end
    weight_decay: Annotated[float, Field(ge=0)] = 0.01  # of matrices; not of biases and norms
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    # Precision of Adam's moments: 8 bits take 2 bytes per weight rather than 8 (in blocks of 256
    # with one scale each: Dettmers et al., 2021, https://arxiv.org/abs/2110.02861).
    moments: Literal["fp32", "8bit"] = "fp32"
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0  # largest norm; 0: none
    # Skip batches whose gradient norm exceeds this many times the median of the last spike_window
    # norms, once a tenth of the window is filled. None: never.
    skip_spikes: Annotated[float, Field(gt=1)] | None = None
    spike_window: Annotated[int, Field(ge=10)] = 100


class DeepSpeedSettings(Section):
    """How the model's state is sharded across workers."""

    stage: Annotated[int, Field(ge=0, le=3)] = 2  # 1: optimizer; 2: and gradients; 3: and weights
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    max_overflows: Positive = 16  # fp16: end the run after this many skipped steps in a row
    offload_optimizer: bool = False  # to the host's memory, from stage 1 on
    offload_parameters: bool = False  # to the host's memory, at stage 3

    @model_validator(mode="after")
    def _check(self) -> DeepSpeedSettings:
        if self.offload_parameters and self.stage < 3:
            raise ValueError(f"offload_parameters needs stage=3, got stage={self.stage}")
        if self.offload_optimizer and self.stage < 1:
            raise ValueError("offload_optimizer needs stage=1 or more, got stage=0")
        return self


class AdapterSettings(Section):
    """LoRA: frozen weights plus small trained matrices (gptj.adapters).

    A classifier's or question answerer's head is trained in full.
    """

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16  # the update is scaled by alpha / rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")  # or k_proj, out_proj, fc_in, fc_out
    rslora: bool = False  # scale by alpha / sqrt(rank) instead
    # Of the blocks' frozen weights (QLoRA), to 8 or 4 bits; None: kept in deepspeed.precision.
    quantization: Quantization | None = None

    @model_validator(mode="after")
    def _check(self) -> AdapterSettings:
        self.lora()
        return self

    def lora(self, heads: tuple[str, ...] = ()) -> LoRAConfig:
        """The LoRAConfig, with `heads` trained in full. ValueError for unknown modules."""
        return LoRAConfig(**self.model_dump(exclude={"quantization"}), modules_to_save=heads)


_HOST_AND_PORT = re.compile(r"([\w.-]+|\[[0-9A-Fa-f:]+\]):\d+(/.*)?")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=:)")
_USER_AT = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:)?//[^/?#]*@")
_AT_HOST = re.compile(r"[^/]+@[^/]+:\d+")  # without a scheme
_SECRET = re.compile(r"(?i)[?&;][^=?&;]*(user|passw|pwd|token|secret|api_?key)[^=?&;]*=")
_SQLITE = re.compile(r"(?P<scheme>sqlite(\+\w+)?:///)(?P<path>(?!:memory:)[^?]+)(?P<query>.*)")


def absolute_tracking_uri(uri: str) -> str:
    """MLflow's tracking URI, with a relative path made absolute: of a folder, or of SQLite's file.

    Servers' addresses, and those of Databricks, stay.
    """
    if (database := _SQLITE.fullmatch(uri)) is not None:
        path = os.path.abspath(database["path"])
        return f"{database['scheme']}{path}{database['query']}"
    if uri.startswith("file:") and not uri.startswith("file:/"):
        return f"file://{os.path.normpath(f'{quote(os.getcwd())}/{uri[5:]}')}"
    if urlsplit(uri).scheme or uri in ("databricks", "uc"):
        return uri
    return os.path.abspath(os.path.expanduser(uri))


def _tracking_uri(uri: str) -> str:
    found = _SCHEME.match(uri)
    scheme = found[0].lower().partition("+")[0] if found else ""
    # Anywhere: in a password, / ? and # end what is parsed as user and host.
    user = "@" in uri and (scheme not in ("", "file", "sqlite") or _AT_HOST.match(uri))
    if user or _USER_AT.match(uri) or _SECRET.search(uri):
        raise ValueError(  # without the address
            "the address has a user, password or token in it, which logs, checkpoints and the "
            "model's training.json would show; remedy: leave it out, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in "
            "the workers' environment; for a database, its own variables, such as PGUSER and "
            "PGPASSWORD; write an @ in a path as %40"
        )
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise ValueError(f"{uri!r} is not an address: {error}") from error
    if _HOST_AND_PORT.fullmatch(uri):  # to MLflow a folder, or an unknown scheme
        raise ValueError(
            f"{uri!r} has no scheme; remedy: http://{uri} or https://{uri} for a server, ./{uri} "
            f"for a folder"
        )
    if parts.scheme in ("http", "https") and not parts.hostname:
        raise ValueError(f"{uri!r} names no host; remedy: as in {parts.scheme}://mlflow:5000")
    return uri


class TrackingSettings(Section):
    """Experiment trackers besides TensorBoard (gptj.training.trackers)."""

    # MLflow's tracking URI, such as http://mlflow:5000, or a folder; None: nowhere.
    mlflow: Annotated[str, Field(min_length=1), AfterValidator(_tracking_uri)] | None = None
    # Weights & Biases' PROJECT or ENTITY/PROJECT; WANDB_MODE=offline keeps it in the run's folder.
    wandb: Annotated[str, Field(pattern=r"^([^/]+/)?[^/\\#?%:]{1,128}$")] | None = None


class WorkerSettings(Section):
    """The training workers and their resources."""

    # [2, 8]: as many as the cluster has room for, now and at each restart.
    count: Positive | tuple[Positive, Positive] = 1
    device: Literal["auto", "cpu", "gpu"] = "auto"  # auto: GPUs, if the cluster has any
    cpus: Annotated[float, Field(gt=0)] = 1  # CPUs that Ray reserves per worker
    autoscaling: bool = False  # the cluster will grow: do not require room for all workers now
    max_failures: Annotated[int, Field(ge=0)] = 3  # restarts from the last checkpoint
    # Peak TFLOP/s of each worker, for computing MFU; None: measured at the start.
    peak_tflops: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> WorkerSettings:
        if self.fewest > self.most:
            raise ValueError(f"count=[{self.fewest}, {self.most}]: the minimum comes first")
        return self

    @property
    def fewest(self) -> int:
        return self.count if isinstance(self.count, int) else self.count[0]

    @property
    def most(self) -> int:
        return self.count if isinstance(self.count, int) else self.count[1]

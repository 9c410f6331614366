"""The sections of a run's settings: data, model, tokenizer, optimizer, DeepSpeed, workers."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Annotated, Any, Literal

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
    # Of the training data, held out to measure with: rows that the seed chooses; of a long text
    # its end. None: nothing.
    evaluation_split: Annotated[float, Field(gt=0, le=0.5)] | None = None
    columns: dict[str, str] = {}  # our column name (see the task's columns): the file's
    delimiter: Delimiter | None = None  # of CSV; None: the one in the header (comma, ;, tab or |)
    bad_rows: Literal["refuse", "skip"] = "refuse"  # that cannot be used; skipped ones are counted
    sequence_length: Positive = 128  # tokens of a row; longer texts are cut, contexts windowed
    # Causal-lm, how documents share rows: whole, each computed as if alone; concatenated and cut
    # wherever a row is full; or a padded row for each.
    packing: Packing = "best_fit"
    stride: Annotated[int, Field(ge=0)] = 32  # question answering: tokens that windows share
    problem_type: ProblemType | None = None  # classification; None: as the labels look
    # In the order of their numbers, or {what the data have: name}; empty: as the data have them.
    label_names: list[str] | dict[str, str] = []


class ModelSettings(Section):
    """What learns: a checkpoint to start from, or a new model."""

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
                raise ValueError(
                    f"{key} is not a field to set here: it is {DECIDED_ELSEWHERE[key]}"
                )
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
    # How messages become text: a file of Jinja, or the name of a ready one (gptj.chat); left out:
    # the tokenizer's own. The model keeps it.
    chat_template: str = ""


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
    # How Adam's two moments are kept: in 8 bits they take 2 bytes a weight rather than 8 (blocks of
    # 256 numbers, each with a scale: Dettmers et al., 2021, https://arxiv.org/abs/2110.02861).
    moments: Literal["fp32", "8bit"] = "fp32"
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0  # largest norm; 0: none
    # Skip a batch whose gradient norm is more than so many times the median of the last
    # spike_window ones, once there is a tenth of these. None: never.
    skip_spikes: Annotated[float, Field(gt=1)] | None = None
    spike_window: Annotated[int, Field(ge=10)] = 100


class DeepSpeedSettings(Section):
    """How the model's state is spread over the workers."""

    stage: Annotated[int, Field(ge=0, le=3)] = 2  # 1: optimizer; 2: and gradients; 3: and weights
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    max_overflows: Positive = 16  # fp16: skipped steps in a row that end the run
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
    """LoRA: frozen weights, and small matrices that are trained beside them (gptj.adapters).

    A classifier's or a question answerer's head is trained as a whole.
    """

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16  # what is trained counts alpha / rank times
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")  # or k_proj, out_proj, fc_in, fc_out
    rslora: bool = False  # alpha / sqrt(rank) times instead
    # Of the blocks' frozen weights (QLoRA): 8 or 4 bits; None: in deepspeed.precision.
    quantization: Quantization | None = None

    @model_validator(mode="after")
    def _check(self) -> AdapterSettings:
        self.lora()
        return self

    def lora(self, heads: tuple[str, ...] = ()) -> LoRAConfig:
        """For a model of which these heads are trained too. ValueError for unknown modules."""
        return LoRAConfig(**self.model_dump(exclude={"quantization"}), modules_to_save=heads)


class TrackingSettings(Section):
    """Where a run's points go, beside TensorBoard's files (gptj.training.trackers)."""

    # MLflow's tracking URI, such as http://mlflow:5000; None: nowhere.
    mlflow: Annotated[str, Field(min_length=1)] | None = None
    # Weights & Biases' PROJECT or ENTITY/PROJECT; WANDB_MODE=offline keeps it in the run's folder.
    wandb: Annotated[str, Field(pattern=r"^([^/]+/)?[^/]+$")] | None = None


class WorkerSettings(Section):
    """The processes that train, and what each is given."""

    # [2, 8]: as many of these as the cluster has room for, now and whenever workers start again.
    count: Positive | tuple[Positive, Positive] = 1
    device: Literal["auto", "cpu", "gpu"] = "auto"  # auto: GPUs, where the cluster has any
    cpus: Annotated[float, Field(gt=0)] = 1  # CPUs that Ray counts for a worker
    autoscaling: bool = False  # the cluster will grow: do not insist on the workers' room now
    max_failures: Annotated[int, Field(ge=0)] = 3  # restarts from the last checkpoint
    # TFLOP/s of each one's matrix products, by which MFU is reckoned; None: measured at the start.
    peak_tflops: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> WorkerSettings:
        if self.fewest > self.most:
            raise ValueError(f"count=[{self.fewest}, {self.most}]: the fewest come first")
        return self

    @property
    def fewest(self) -> int:
        return self.count if isinstance(self.count, int) else self.count[0]

    @property
    def most(self) -> int:
        return self.count if isinstance(self.count, int) else self.count[1]

"""A GPT-J's configuration: Hugging Face's `config.json` in, a validated object out."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from copy import deepcopy
from reprlib import repr as shown
from typing import Any

import torch

from gptj.adapters.stored import read_adapted_config
from gptj.checkpoints.folder import ADAPTER_FILES, CONFIG, GENERATION_CONFIG, ModelFolder
from gptj.errors import CheckpointError
from gptj.serialization.json_object import to_json

ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu")
MAX_LAYERS = 1000
MAX_LABELS = 1_000_000
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Hugging Face's other names for the same fields.
ALIASES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

_QUANTIZED = "remedy: leave it out, and serve with `quantization: int8` or `int4`"
# For arguments of Hugging Face's from_pretrained that ours does not take.
REMEDIES = {
    "load_in_8bit": _QUANTIZED,
    "load_in_4bit": _QUANTIZED,
    "quantization_config": _QUANTIZED,
    "max_memory": "remedy: device, or device_map='auto', for one device",
    "offload_folder": "remedy: leave it out; local weights are memory-mapped, not copied",
    "trust_remote_code": "remedy: leave it out; a folder's code is never run",
    "use_safetensors": "remedy: leave it out; safetensors are preferred if there are any",
    "subfolder": "remedy: give the address of the folder itself",
    "ignore_mismatched_sizes": "remedy: change the configuration, or resize_token_embeddings",
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"n_positions": 256, "n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 16},
    "small": {"n_positions": 1024, "n_embd": 1024, "n_layer": 16, "n_head": 16, "rotary_dim": 32},
    "6b": {},
}


class GPTJConfig:
    """Hugging Face's GPTJConfig: the same field names, defaults, aliases and JSON.

    `GPTJConfig(n_layer=2, …)` sets fields by name. Unknown fields are kept as attributes and
    written back, as in Hugging Face, so a round trip loses nothing.
    Invalid values raise a ValueError that names them.
    """

    model_type = "gptj"

    vocab_size: int = 50400  # embedding rows: GPT-2's 50257 tokens and 143 unused
    n_positions: int = 2048  # the longest sequence, in tokens
    n_embd: int = 4096  # width of the residual stream
    n_layer: int = 28
    n_head: int = 16  # each of width n_embd / n_head
    rotary_dim: int | None = 64  # rotated dimensions of each head; None: all
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    activation_function: str = "gelu_new"  # one of ACTIVATIONS
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02  # standard deviation of new weights
    use_cache: bool = True  # whether forward returns the KV cache by default
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    problem_type: str | None = None  # one of PROBLEM_TYPES; None: inferred from labels
    architectures: list[str] | None = None  # the class of the saved model
    dtype: torch.dtype | None = None  # of the stored weights
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    id2label: dict[int, str]  # class index to name; its length is num_labels
    label2id: dict[str, int]

    def __init__(self, **fields: Any) -> None:
        fields = {name: deepcopy(value) for name, value in fields.items() if name != "model_type"}
        for alias, name in ALIASES.items():
            if alias in fields:
                value = fields.pop(alias)
                if fields.setdefault(name, value) != value:
                    raise ValueError(
                        f"{alias}={shown(value)} contradicts {name}={shown(fields[name])}"
                    )
        # transformers 4 wrote torch_dtype.
        self.dtype = parse_dtype(fields.pop("torch_dtype", None))
        if (dtype := parse_dtype(fields.pop("dtype", None))) is not None:
            self.dtype = dtype
        self._set_labels(
            fields.pop("num_labels", None),
            fields.pop("id2label", None),
            fields.pop("label2id", None),
        )
        for name, value in fields.items():
            if hasattr(GPTJConfig, name) and name not in GPTJConfig.__annotations__:
                raise ValueError(f"{name} is not a configuration field")
            setattr(self, name, value)
        self._check_types()
        self._check()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTJConfig:
        """One of PRESETS (tiny: 13.4 M parameters with the full vocabulary; small: 305 M; 6b).

        Overrides replace fields, as in `GPTJConfig.preset("tiny", vocab_size=1024)`.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_pretrained(
        cls, address: str | os.PathLike[str], *, revision: str | None = None, **overrides: Any
    ) -> GPTJConfig:
        """The `config.json` of a folder, an `s3://` address or a hub id.

        Raises:
            FileNotFoundError: if there is none.
            CheckpointError: if it is damaged, or another model's.
        """
        with ModelFolder.open(address, revision=revision, files=[CONFIG, *ADAPTER_FILES]) as folder:
            return cls.from_folder(folder, **overrides)

    @classmethod
    def from_folder(cls, folder: ModelFolder, **overrides: Any) -> GPTJConfig:
        """The `config.json` of an open folder; see `from_pretrained`."""
        return cls.adapted_from_folder(folder, None, **overrides)

    @classmethod
    def adapted_from_folder(
        cls, folder: ModelFolder, base: ModelFolder | None, **overrides: Any
    ) -> GPTJConfig:
        """Like `from_folder`; `base` is an adapter's base model, if it has moved."""
        fields = read_adapted_config(folder, base) if folder.is_adapter else folder.read_config()
        check_overrides(overrides, fields)
        if "num_labels" in overrides or "id2label" in overrides or "label2id" in overrides:
            fields = {k: v for k, v in fields.items() if k not in ("id2label", "label2id")}
        try:
            return cls.from_dict({**fields, **overrides})
        except ValueError as error:
            raise CheckpointError(f"{folder.address}/{CONFIG}: {error}") from error

    def add_end_tokens(self, folder: ModelFolder) -> None:
        """Add those of `generation_config.json` to `eos_token_id`, if the folder has the file.

        transformers and vLLM stop at these too. Raises CheckpointError if they are not token ids.
        """
        if GENERATION_CONFIG not in (folder if folder.manifest is None else folder.manifest.files):
            return
        value = folder.read_object(GENERATION_CONFIG).get("eos_token_id")
        found = _ids(value)
        if not all(type(each) is int for each in found):
            raise CheckpointError(
                f"{folder.address}/{GENERATION_CONFIG}: eos_token_id must be a whole number, a "
                f"list of them or null, got {shown(value)}"
            )
        ends = _ids(self.eos_token_id)
        # Others than the vocabulary's cannot be generated.
        more = {each for each in found if 0 <= each < self.vocab_size}.difference(ends)
        if more:
            self.eos_token_id = [*ends, *sorted(more)]

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> GPTJConfig:
        """From the fields of `to_dict` or a `config.json`; refuses other model types."""
        if (found := fields.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(
                f"this is the configuration of a {shown(found)} model, not of a 'gptj'"
            )
        if "self" in fields:
            raise ValueError("self is not a configuration field")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Every field, JSON-serializable and readable by Hugging Face's GPTJConfig."""
        known = {
            name: getattr(self, name)
            for name, value in vars(GPTJConfig).items()
            if name in GPTJConfig.__annotations__
        }
        fields = {"model_type": self.model_type, **known, **vars(self)}
        if self.dtype is not None:
            fields["dtype"] = str(self.dtype).removeprefix("torch.")
        fields["id2label"] = {str(index): label for index, label in self.id2label.items()}
        return deepcopy(fields)

    def to_json(self) -> str:
        return to_json(self.to_dict(), indent=2, ensure_ascii=False, sort_keys=True) + "\n"

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        self._set_labels(value, None, None)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def rotated_dim(self) -> int:
        """Rotated dimensions of each head."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def max_position_embeddings(self) -> int:
        return self.n_positions

    @max_position_embeddings.setter
    def max_position_embeddings(self, value: int) -> None:
        self.n_positions = value

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @hidden_size.setter
    def hidden_size(self, value: int) -> None:
        self.n_embd = value

    @property
    def num_attention_heads(self) -> int:
        return self.n_head

    @num_attention_heads.setter
    def num_attention_heads(self, value: int) -> None:
        self.n_head = value

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layer

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        self.n_layer = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GPTJConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def __repr__(self) -> str:
        return f"GPTJConfig({self.to_json().strip()})"

    def _set_labels(
        self,
        num_labels: int | None,
        id2label: dict[Any, str] | None,
        label2id: dict[str, int] | None,
    ) -> None:
        for labels in (id2label, label2id):
            if labels is not None and not isinstance(labels, dict):
                raise ValueError(
                    f"id2label and label2id must be each other's inverse, got {shown(labels)}"
                )
        if id2label is None and label2id is not None:
            if not all(_is_count(index) for index in label2id.values()):
                raise ValueError(
                    f"label2id must map labels to their indices, got {shown(label2id)}"
                )
            id2label = {index: label for label, index in label2id.items()}
        if num_labels is not None and not _is_count(num_labels, MAX_LABELS):
            raise ValueError(f"num_labels must be 1 to {MAX_LABELS}, got {shown(num_labels)}")
        if id2label is None:
            count = 2 if num_labels is None else num_labels
            if count < 1:
                raise ValueError(f"num_labels must be 1 or more, got {count}")
            id2label = {index: f"LABEL_{index}" for index in range(count)}
        if not all(isinstance(label, str) for label in id2label.values()):
            raise ValueError(f"labels must be strings, got {shown(id2label)}")
        # JSON's keys are strings.
        self.id2label = {int(index): label for index, label in id2label.items()}
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError(f"id2label must number its labels from 0, got {shown(self.id2label)}")
        if num_labels is not None and num_labels != len(self.id2label):
            raise ValueError(f"num_labels={num_labels} contradicts id2label={shown(self.id2label)}")
        self.label2id = label2id or {label: index for index, label in self.id2label.items()}

    def _check_types(self) -> None:
        """Check the types of fields, since a file may hold anything."""
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if not _is_count(value) or value < 1:
                raise ValueError(f"{name} must be a whole number of 1 or more, got {shown(value)}")
        if self.n_layer > MAX_LAYERS:
            raise ValueError(f"n_layer must be at most {MAX_LAYERS}, got {self.n_layer}")
        for name in ("rotary_dim", "n_inner", "bos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise ValueError(f"{name} must be a whole number or null, got {shown(value)}")
        eos = self.eos_token_id
        if not all(type(each) is int for each in _ids(eos)):
            raise ValueError(
                f"eos_token_id must be a whole number, a list of them or null, got {shown(eos)}"
            )
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise ValueError(f"{name} must be a number of 0 or more, got {shown(value)}")
        if not _is_number(self.layer_norm_epsilon) or self.layer_norm_epsilon <= 0:
            raise ValueError(
                f"layer_norm_epsilon must be a number above 0, got {shown(self.layer_norm_epsilon)}"
            )
        for name in (
            "use_cache",
            "tie_word_embeddings",
            "output_attentions",
            "output_hidden_states",
            "return_dict",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {shown(getattr(self, name))}")
        names = self.architectures
        if names is not None and not (
            isinstance(names, list) and all(isinstance(each, str) for each in names)
        ):
            raise ValueError(f"architectures must be a list of names, got {shown(names)}")

    def _check(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head, got n_embd={self.n_embd} and "
                f"n_head={self.n_head}"
            )
        if self.rotated_dim % 2 or not 0 < self.rotated_dim <= self.head_dim:
            raise ValueError(
                f"rotary_dim must be even and within the head width of {self.head_dim} "
                f"(n_embd / n_head), got {self.rotated_dim}"
            )
        if self.n_inner is not None and self.n_inner < 1:
            raise ValueError(f"n_inner must be 1 or more, or None, got {self.n_inner}")
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"activation_function must be one of {', '.join(ACTIVATIONS)}, "
                f"got {shown(self.activation_function)}"
            )
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"problem_type must be one of {', '.join(PROBLEM_TYPES)}, "
                f"got {shown(self.problem_type)}"
            )


def is_field(name: str) -> bool:
    """Whether it is a field of every configuration, or an alias of one."""
    return name in GPTJConfig.__annotations__ or name in ALIASES or name == "num_labels"


def check_overrides(overrides: Mapping[str, Any], fields: Collection[str] = ()) -> None:
    """Refuse names that are neither configuration fields nor among the folder's own `fields`.

    Raises:
        TypeError: with a suggestion or a remedy.
    """
    known = {*GPTJConfig.__annotations__, *ALIASES, "num_labels", *fields}
    for name in overrides:
        if is_field(name) or (name in fields and name != "model_type"):
            continue
        remedy = REMEDIES.get(name)
        if remedy is None:
            close = difflib.get_close_matches(name, known, 1)
            remedy = f"did you mean {close[0]}?" if close else "leave it out"
        raise TypeError(
            f"{name}={shown(overrides[name])} is neither an argument of from_pretrained nor a "
            f"field of a GPTJConfig; {remedy}"
        )


def parse_dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    """Accepts `torch.float16`, "float16" and "torch.float16"; None stays None."""
    if name is None or isinstance(name, torch.dtype):
        return name
    dtype = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type such as float16, got {shown(name)}")
    return dtype


def _ids(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_count(value: Any, most: int = 2**40) -> bool:
    """Whether it is an int that can be a count; bools are not."""
    return type(value) is int and 0 <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # false for NaN

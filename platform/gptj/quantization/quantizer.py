"""Quantize a model folder's blocks to 4 bits, with one block in memory at a time."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptj.checkpoints.skeleton import without_weights
from gptj.checkpoints.weights import SHARD_BYTES, TensorSpec
from gptj.config import GPTJConfig
from gptj.data.documents import read_documents, windows
from gptj.data.packing import WINDOW, pack
from gptj.data.rows import DataError
from gptj.data.sources import read_rows
from gptj.errors import CheckpointError
from gptj.interop.conversion import specs_of
from gptj.interop.importer import check_new
from gptj.interop.source import Source, open_source
from gptj.interop.tensors import StoredTensor
from gptj.layers import int4
from gptj.layers.int4 import GROUP_SIZE, Int4Linear, Int4Weight
from gptj.model import AttentionBias, GPTJBlock, GPTJForCausalLM, Rotary
from gptj.pretrained.saving import save_folder
from gptj.pretrained.weight_loading import assign
from gptj.quantization.gptq import GPTQ, Hessian, relative_error
from gptj.storage.addresses import normalized
from gptj.tokenizer import GPTJTokenizer

Rounding = Literal["gptq", "nearest"]

ROWS_AT_ONCE = 8
AFTER_NORM = ("q_proj", "k_proj", "v_proj", "fc_in")  # layers whose input is ln_1's output

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """The text whose activations GPTQ uses: the data's first tokens."""

    data: str  # an address of rows with the column `text`
    rows: int = 256
    sequence_length: int = 512  # tokens per row, cut to the model's context

    def read(self, tokenizer: GPTJTokenizer, config: GPTJConfig) -> Tensor:
        """Token ids (rows, L). DataError if there are fewer."""
        length = min(self.sequence_length, config.n_positions)
        wanted = self.rows * length
        documents = windows(read_documents(read_rows(self.data, ["text"]), tokenizer), WINDOW)
        ids = torch.empty(0, dtype=torch.int64)
        for packed in pack(documents, length, "concatenate"):
            ids = torch.cat((ids, torch.from_numpy(packed.ids).long()))
            if len(ids) >= wanted:
                return ids[:wanted].view(-1, length)
        raise DataError(
            f"{self.data} has {len(ids)} tokens, fewer than {self.rows} rows of {length}: give "
            f"more text, or lower the number of rows (--rows) or their length (--sequence-length)"
        )


def quantize_model(
    source: str,
    destination: str,
    calibration: Calibration | None,
    *,
    revision: str | None = None,
    device: str = "cpu",
    shard_bytes: int = SHARD_BYTES,
) -> GPTJConfig:
    """Write a model folder with 4-bit weights, atomically. Returns its configuration.

    Args:
        source: a language model of any format: see open_source.
        destination: a new folder, local or `s3://`.
        calibration: for GPTQ; None: round to nearest.
        revision: branch, tag or commit of a hub id.
        device: where to compute.

    Raises:
        FileNotFoundError, CheckpointError: see open_source; and if a weight is not finite.
        ValueError: if the model has another head, widths that are not multiples of GROUP_SIZE, or
            no tokenizer for the calibration data; or if the destination is within the source.
        DataError: if there is too little calibration data.
        AlreadyExistsError: if the destination is not empty.
    """
    source, destination = normalized(source), normalized(destination)
    check_new(destination, source)
    with open_source(source, revision=revision) as opened:
        config = opened.config
        _check(opened)
        ids = None
        if calibration is not None:
            if opened.tokenizer is None:
                raise ValueError(f"{source} has no tokenizer, which calibration needs")
            ids = calibration.read(opened.tokenizer, config)
        _check_finite(opened)
        plain = specs_of(opened.tensors, None, config)
        specs = [each for spec in plain for each in _quantized_specs(spec)]
        fields = int4.config_fields(actorder=None if ids is None else "weight")
        setattr(config, int4.CONFIG_FIELD, fields)
        with torch.inference_mode():
            save_folder(
                destination,
                config,
                specs,
                _Quantizer(opened.tensors, config, ids, torch.device(device)).tensors(specs),
                tokenizer=opened.tokenizer,
                training=opened.training,
                shard_bytes=shard_bytes,
            )
    return config


def _check(source: Source) -> None:
    config = source.config
    if config.architectures != [GPTJForCausalLM.__name__]:
        raise ValueError(
            f"{source.address} is a {(config.architectures or ['model'])[0]}, and only language "
            f"models (GPTJForCausalLM) can have 4-bit weights"
        )
    if config.n_embd % GROUP_SIZE or config.inner_dim % GROUP_SIZE:
        raise ValueError(
            f"{source.address}: n_embd={config.n_embd} and n_inner={config.inner_dim} must be "
            f"multiples of {GROUP_SIZE}, whose inputs share a scale"
        )


def _check_finite(source: Source) -> None:
    """CheckpointError if a weight is not finite: with it, all outputs would be NaN.

    Reads all weights, which takes seconds of the hours that follow.
    """
    for tensor in source.tensors:
        values = tensor.load(tensor.dtype)
        if values.numel() and not all(each.isfinite() for each in torch.aminmax(values)):
            raise CheckpointError(
                f"{tensor.name} of {source.address} has values that are not finite (NaN or "
                f"infinity); remedy: the model before it was damaged, or before its training "
                f"diverged"
            )


def _layer_of(name: str) -> int | None:
    found = re.match(r"transformer\.h\.(\d+)\.", name)
    return None if found is None else int(found[1])


def _quantized_specs(spec: TensorSpec) -> list[TensorSpec]:
    """The tensors that replace one in the quantized folder."""
    layer, _, leaf = spec.name.rpartition(".")
    if _layer_of(spec.name) is None or leaf != "weight" or len(spec.shape) != 2:
        return [spec]
    outputs, inputs = spec.shape
    return [
        TensorSpec(f"{layer}.weight_packed", (outputs, inputs // 8), torch.int32),
        TensorSpec(f"{layer}.weight_scale", (outputs, inputs // GROUP_SIZE), torch.bfloat16),
        TensorSpec(f"{layer}.weight_shape", (2,), torch.int64),
    ]


class _Linear(NamedTuple):
    """A linear layer of a block."""

    parent: nn.Module
    name: str

    @property
    def linear(self) -> nn.Linear:
        linear: nn.Linear = getattr(self.parent, self.name)
        return linear

    def replace(self, weight: Int4Weight) -> None:
        setattr(self.parent, self.name, Int4Linear(weight, self.linear.bias))


class _Quantizer:
    """Computes the quantized folder's tensors, one block at a time.

    Args:
        ids_BL: token ids of the calibration data; None: round to nearest.
    """

    def __init__(
        self,
        stored: Sequence[StoredTensor],
        config: GPTJConfig,
        ids_BL: Tensor | None,
        device: torch.device,
    ) -> None:
        self._stored = {tensor.name: tensor for tensor in stored}
        self._config = config
        self._device = device
        self._started = time.monotonic()
        self._batches: list[Tensor] = []  # the next block's inputs, from the calibration data
        if ids_BL is not None:
            wte = self._stored["transformer.wte.weight"].load(torch.float32)
            self._batches = [F.embedding(each, wte) for each in ids_BL.split(ROWS_AT_ONCE)]
            positions = torch.arange(ids_BL.shape[1], device=device)[None]
            self._rotary = Rotary.at(positions, config)

    def tensors(self, specs: Sequence[TensorSpec]) -> Iterator[Tensor]:
        current, state = -1, dict[str, Tensor]()
        for spec in specs:
            layer = _layer_of(spec.name)
            if layer is None:
                yield self._stored[spec.name].load(spec.dtype)
                continue
            if layer != current:
                state.clear()  # before the next block is read
                current, state = layer, self._quantized(layer)
            yield state[spec.name.removeprefix(f"transformer.h.{layer}.")]

    def _quantized(self, layer: int) -> dict[str, Tensor]:
        block = self._load(layer)
        error = None
        if self._batches:
            error = self._calibrate(block)
            self._batches = [self._forward(block, x_BLD) for x_BLD in self._batches]
        else:
            for part in _linears(block):
                part.replace(int4.quantize(part.linear.weight))
        self._report(layer + 1, error)
        return block.state_dict()

    def _load(self, layer: int) -> GPTJBlock:
        with without_weights():
            block = GPTJBlock(self._config, layer).eval()
        for name, _ in list(block.named_parameters()):
            values = self._stored[f"transformer.h.{layer}.{name}"].load(torch.float32)
            assign(block, name, values.to(self._device))
        return block

    def _calibrate(self, block: GPTJBlock) -> float:
        """Quantize a block's layers, each on inputs from those already quantized.

        Returns the mean of the layers' relative errors.
        """
        parts = {part.name: part for part in _linears(block)}
        hessian = Hessian(self._config.n_embd, self._device)
        for x_BLD in self._batches:
            hessian.add(block.ln_1(x_BLD.to(self._device)))
        errors = _round([parts[name] for name in AFTER_NORM], hessian)
        for name, inputs in (
            ("out_proj", self._config.n_embd),
            ("fc_out", self._config.inner_dim),
        ):
            hessian = Hessian(inputs, self._device)
            linear = parts[name].linear
            hook = linear.register_forward_pre_hook(lambda _, x, h=hessian: h.add(x[0]))
            for x_BLD in self._batches:
                self._branch(block, name, block.ln_1(x_BLD.to(self._device)))
            hook.remove()
            errors += _round([parts[name]], hessian)
        return sum(errors) / len(errors)

    def _branch(self, block: GPTJBlock, name: str, h_BLD: Tensor) -> None:
        if name == "out_proj":
            block.attn(h_BLD, self._rotary, AttentionBias(None, is_causal=True), None, False)
        else:
            block.mlp(h_BLD)

    def _forward(self, block: GPTJBlock, x_BLD: Tensor) -> Tensor:
        mask = AttentionBias(None, is_causal=True)
        y_BLD, _ = block(x_BLD.to(self._device), self._rotary, mask, None, False)
        y_cpu: Tensor = y_BLD.to("cpu")
        return y_cpu

    def _report(self, done: int, error: float | None) -> None:
        passed, total = time.monotonic() - self._started, self._config.n_layer
        logger.info(
            "block %d of %d%s, %.0f s, %.0f s left",
            done,
            total,
            "" if error is None else f": {100 * error:.2f} % relative error of its layers' outputs",
            passed,
            passed / done * (total - done),
        )


def _linears(block: nn.Module) -> list[_Linear]:
    return [_Linear(parent, name) for parent, name in int4.block_linears(block)]


def _round(parts: Sequence[_Linear], hessian: Hessian) -> list[float]:
    """Quantize layers that share their inputs; returns their relative errors."""
    gptq = GPTQ.of(hessian)
    errors = []
    for part in parts:
        weight = part.linear.weight
        rounded = gptq.round(weight)
        errors.append(relative_error(weight, rounded, hessian))
        part.replace(rounded)
    return errors

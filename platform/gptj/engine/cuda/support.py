"""Whether a GPU, a model and what is installed allow for our kernels: operations, or the reason."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import torch

from gptj.engine.cpu.library import UnsupportedError
from gptj.engine.cuda.operations import Operations
from gptj.engine.cuda.weights import Norm
from gptj.model import GPTJForCausalLM

if TYPE_CHECKING:
    from gptj.engine.cuda.launch import TritonOperations

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST_CAPABILITY = (8, 0)  # Ampere: bf16, and copies that go on beside computing


def operations_for(model: GPTJForCausalLM) -> Operations:
    """The kernels, tried out on the model's device.

    Raises:
        UnsupportedError: if the model is not on such a GPU, or Triton or what it needs is missing.
    """
    config, device = model.config, model.device
    if device.type != "cuda":
        raise UnsupportedError(f"the model is on {device}")
    if config.activation_function != "gelu_new":
        raise UnsupportedError(
            f"the kernels compute gelu_new, and the model has {config.activation_function}"
        )
    if model.dtype not in DTYPES:
        raise UnsupportedError(f"the kernels have no {model.dtype}")
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < LEAST_CAPABILITY:
        raise UnsupportedError(
            f"{properties.name} has compute capability {properties.major}.{properties.minor}, and "
            f"the kernels want {'.'.join(map(str, LEAST_CAPABILITY))} or more"
        )
    try:
        from gptj.engine.cuda.launch import TritonOperations
    except ImportError as error:
        raise UnsupportedError(f"Triton cannot be imported: {error}") from error
    operations = TritonOperations(config, model.dtype, properties.multi_processor_count)
    _try_out(operations, config.n_embd, device)
    return operations


def _try_out(operations: TritonOperations, width: int, device: torch.device) -> None:
    """Triton needs a C compiler and a writable cache, and says so only when it compiles."""
    row = torch.zeros(1, width, device=device)
    try:
        with torch.cuda.device(device):
            operations.add_and_norm(row, None, None, Norm(row[0], row[0]))
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise UnsupportedError(f"Triton cannot compile for {device}: {error}") from error

"""GPUs that PyTorch has no code for are refused before anything is read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gptj import GPTJForCausalLM
from gptj.environment.devices import UnsupportedDeviceError, check_device, runs_on

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((7, 0), CUDA_13, False),  # V100
        ((7, 0), CUDA_12_6, True),
        ((7, 5), CUDA_13, True),  # T4
        ((8, 0), CUDA_13, True),
        ((8, 9), CUDA_13, True),  # L4: by code for 8.6
        ((9, 0), CUDA_13, True),
        ((10, 3), CUDA_13, True),
        ((10, 0), CUDA_12_6, False),
        ((12, 1), CUDA_13, True),
        ((13, 0), CUDA_13, True),  # by compiling compute_120
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((8, 0), ["sm_86"], False),
        ((9, 0), [], False),
    ],
)
def test_code_runs_within_its_major_version_and_ptx_on_newer_gpus(
    capability: tuple[int, int], architectures: list[str], expected: bool
) -> None:
    assert runs_on(capability, architectures) == expected


def test_a_v100_is_refused_at_once_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is not even looked for."""
    properties = SimpleNamespace(name="Tesla V100-SXM2-16GB", major=7, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_13)
    refusal = r"V100.* compute capability 7\.0, .* only supports sm_75, .*: a newer GPU, or .*12\.6"
    with pytest.raises(UnsupportedDeviceError, match=refusal):
        GPTJForCausalLM.from_pretrained("/no/such/folder", device="cuda")
    check_device("cpu")
    properties.major, properties.minor = 8, 0
    check_device("cuda:0")
    with pytest.raises(FileNotFoundError):
        GPTJForCausalLM.from_pretrained("/no/such/folder", device="cuda")

"""GPTQ: round one input's weights after the other, adjusting those left to offset each error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
2022, https://arxiv.org/abs/2210.17323. Inputs are rounded in order of their activations, largest
first, when most others are left ("activation order"). Scales are chosen before that, so groups are
still neighbouring inputs ("static groups").

Shape suffixes: I inputs of a linear layer, O its outputs, N positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptj.layers.int4 import GROUP_SIZE, ZERO_POINT, Int4Weight, group_scales, pack_codes

# Added to the diagonal, as a share of its mean: the first with which the factorisation succeeds.
DAMPINGS = (0.01, 0.1, 1.0)
# Of a group's range: a smaller scale clips few weights more and rounds most others less.
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
BLOCK_SIZE = 128  # inputs whose errors are applied to later ones together


class Hessian:
    """The sum of x x^T over a layer's inputs: half the Hessian of its squared output error."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.sum_II = torch.zeros(inputs, inputs, device=device)

    def add(self, x: Tensor) -> None:
        """Add inputs (…, I)."""
        x_NI = x.flatten(0, -2).float()
        self.sum_II.addmm_(x_NI.T, x_NI)


@dataclass(frozen=True)
class GPTQ:
    """Rounds the weights of layers with the same inputs."""

    order_I: Tensor  # the inputs in the order in which they are rounded
    factor_II: Tensor  # upper Cholesky factor of the Hessian's inverse, in that order
    hessian_II: Tensor

    @classmethod
    def of(cls, hessian: Hessian) -> GPTQ:
        """Raises ValueError if activations were not finite, or no damping suffices."""
        diagonal_I = hessian.sum_II.diagonal()
        mean = diagonal_I.mean()
        if not bool(mean.isfinite()):
            raise ValueError("the model's activations are not finite on the calibration data")
        order_I = diagonal_I.argsort(descending=True)
        for damping in DAMPINGS:
            damped_II = hessian.sum_II[order_I][:, order_I]
            damped_II.diagonal().add_(damping * mean.clamp_min(1e-30))
            lower_II, failed = torch.linalg.cholesky_ex(damped_II)
            if bool(failed):
                continue
            factor_II, failed = torch.linalg.cholesky_ex(
                torch.cholesky_inverse(lower_II), upper=True
            )
            if not bool(failed):
                return cls(order_I, factor_II, hessian.sum_II)
        raise ValueError("the Hessian cannot be factorised: use other calibration data")

    def round(self, weight_OI: Tensor) -> Int4Weight:
        scales = self._scales(weight_OI)
        units_IO = scales.float().repeat_interleave(GROUP_SIZE, dim=1).T[self.order_I]
        units_IO = torch.where(units_IO == 0, 1.0, units_IO)
        left_IO = weight_OI.float().T[self.order_I]  # changes as errors are passed on
        steps_IO = torch.empty_like(left_IO)
        inputs = len(left_IO)
        for start in range(0, inputs, BLOCK_SIZE):
            end = min(start + BLOCK_SIZE, inputs)
            errors = torch.empty_like(left_IO[start:end])
            for i in range(start, end):
                steps_IO[i] = _rounded(left_IO[i], units_IO[i])
                error_O = (left_IO[i] - steps_IO[i] * units_IO[i]) / self.factor_II[i, i]
                left_IO[i + 1 : end].addr_(self.factor_II[i, i + 1 : end], error_O, alpha=-1)
                errors[i - start] = error_O
            left_IO[end:].addmm_(self.factor_II[start:end, end:].T, errors, alpha=-1)
        return pack_codes(steps_IO[self.order_I.argsort()].T.contiguous(), scales)

    def _scales(self, weight_OI: Tensor) -> Tensor:
        """Each group's scale of least squared error, weighted by the inputs' activations."""
        weight_OI = weight_OI.float()
        importance_I = self.hessian_II.diagonal()
        widest = group_scales(weight_OI).float()
        best, least = widest.bfloat16(), torch.full_like(widest, torch.inf)
        for shrink in SHRINKS:
            scales = (widest * shrink).bfloat16()
            units_OI = scales.float().repeat_interleave(GROUP_SIZE, dim=1)
            units_OI = torch.where(units_OI == 0, 1.0, units_OI)
            error_OI = _rounded(weight_OI, units_OI) * units_OI - weight_OI
            error = (error_OI.square() * importance_I).unflatten(1, (-1, GROUP_SIZE)).sum(dim=-1)
            best = torch.where(error < least, scales, best)
            least = torch.minimum(error, least)
        return best


def relative_error(weight_OI: Tensor, rounded: Int4Weight, hessian: Hessian) -> float:
    """The squared error of a layer's outputs on the calibration data, relative to their square."""
    weight_OI = weight_OI.float()
    error_OI = rounded.dequantized(torch.float32) - weight_OI

    def energy(matrix_OI: Tensor) -> Tensor:
        return ((matrix_OI @ hessian.sum_II) * matrix_OI).sum()

    return float(energy(error_OI) / energy(weight_OI).clamp_min(1e-30))


def _rounded(weight: Tensor, units: Tensor) -> Tensor:
    return (weight / units).round_().clamp_(-ZERO_POINT, 15 - ZERO_POINT)

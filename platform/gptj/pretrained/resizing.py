"""Resize the rows of an embedding or head, keeping the existing ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, constraints

COVARIANCE_SHARE = 1e-9  # new rows' covariance, as a fraction of the old rows'


@torch.no_grad()
def resized(old: Tensor, rows: int, std: float | None) -> nn.Parameter:
    """(rows, D) from (V, D).

    Args:
        std: of new rows, around 0; None: draw them around the old rows' mean.
    """
    new = old.new_empty(rows, old.shape[1])
    kept = min(rows, len(old))
    new[:kept] = old[:kept]
    if rows > len(old):
        added = new[len(old) :]
        if std is None:
            added.copy_(_around_mean(old.float(), len(added)))
        else:
            added.normal_(std=std)
    return nn.Parameter(new, requires_grad=old.requires_grad)


@torch.no_grad()
def resized_bias(old: Tensor, rows: int, mean_resizing: bool) -> nn.Parameter:
    """(rows) from (V); new entries are the mean, or 0."""
    new = old.new_zeros(rows)
    kept = min(rows, len(old))
    new[:kept] = old[:kept]
    if rows > len(old) and mean_resizing:
        mean, std = old.float().mean(), old.float().std()
        new[len(old) :].normal_(mean=float(mean), std=COVARIANCE_SHARE * float(std))
    return nn.Parameter(new, requires_grad=old.requires_grad)


def _around_mean(old: Tensor, count: int) -> Tensor:
    """Draw (count, D) with the rows' mean and COVARIANCE_SHARE times their covariance."""
    mean = old.mean(dim=0)
    centered = old - mean
    covariance = COVARIANCE_SHARE * (centered.T @ centered / len(old))
    definite = constraints.positive_definite.check(covariance)
    if not bool(definite.all()):  # for example with fewer rows than columns
        return mean.expand(count, -1)
    return MultivariateNormal(mean, covariance_matrix=covariance).sample((count,))

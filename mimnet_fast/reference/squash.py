"""Squash: shrink a vector's length into [0, 1) and keep its direction."""

from __future__ import annotations

import torch
from torch import Tensor

from mimnet_fast.reference._precision import accumulate_in_float32


@accumulate_in_float32
def squash(
    x: Tensor, dim: int = -1, *, eps: float = 1e-8, form: str = "sqrt_eps", power: float = 1.0
) -> Tensor:
    """``factor(|x|^2) * x`` along ``dim``; see :func:`mimnet_fast.ops.squash` for the forms."""
    if form == "identity":
        return x
    norm2 = (x * x).sum(dim, keepdim=True)
    # sqrt has an infinite slope at 0; the where() on both sides keeps the gradient there at 0.
    nonzero = norm2 > 0
    norm = torch.where(nonzero, torch.where(nonzero, norm2, 1.0).sqrt(), 0.0)
    shrink = norm2 / (1 + norm2)
    if form == "sqrt_eps":
        return shrink * x / (norm2 + eps).sqrt()
    if form == "norm_plus_eps":
        return shrink * x / (norm + eps)
    if form == "pow_clamp":
        powered = torch.where(nonzero, torch.where(nonzero, shrink, 1.0) ** power, 0.0)
        return powered * x / norm.clamp_min(eps)
    if form in ("no_div", "none_eps"):
        return norm / (1 + norm2) * x
    raise ValueError(f"unknown squash form {form!r}")

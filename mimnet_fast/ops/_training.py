"""What the ops that make steps of Adam check and change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mimnet_fast.ops import _checks


def unsupported(op: str, device_type: str) -> dict[str, list[str]]:
    """The kernels of other devices than the CPU, which there are not."""
    kinds = {"triton": "Triton"} if device_type == "cpu" else {"triton": "Triton", "native": "CUDA"}
    return {
        backend: [f"no {kind} kernel for {op} in this version"] for backend, kind in kinds.items()
    }


def contiguous(name: str, tensor: Tensor) -> Tensor:
    """A tensor that can be updated in place."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: got strides {tensor.stride()}, need contiguous memory to update in place: "
            "pass tensor.contiguous() and copy it back"
        )
    return tensor


def ids(name: str, value: Any, count: int, meaning: str, rows: int, like: Tensor) -> Tensor:
    """Rows of a table, a contiguous int64 ``[count]``."""
    found = _checks.integers(name, value, count, meaning, like)
    _checks.in_range(name, found, 0, rows - 1, "a row of the table")
    return found.contiguous()


def schedule(
    batch_size: Any, first_step: Any, learning_rate: Any, betas: Any, eps: Any
) -> tuple[float, float, float, float]:
    """Rate, betas and eps, all checked."""
    _checks.whole("batch_size", batch_size, 1, "ratings in a step")
    _checks.whole("first_step", first_step, 0, "steps that the moments have seen")
    learning_rate = _checks.number("learning_rate", learning_rate, above=0.0, meaning="Adam's rate")
    eps = _checks.number("eps", eps, above=0.0, meaning="added to the denominator")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas: got {type(betas).__name__}, need (beta1, beta2)")
    beta1, beta2 = (
        _checks.number(f"betas[{index}]", beta, above=0.0, meaning="decay of a moment")
        for index, beta in enumerate(betas)
    )
    if not beta1 < beta2 < 1:
        raise ValueError(f"betas: got {beta1}, {beta2}, need 0 < beta1 < beta2 < 1")
    return learning_rate, beta1, beta2, eps


def changed(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that a kernel wrote into them."""
    torch.autograd.graph.increment_version(tensors)

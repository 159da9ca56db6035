"""How every Triton kernel is started."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

# Left to itself, ptxas spills a few bytes to fit one more block on a multiprocessor.
MOST_REGISTERS = 255


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run ``kernel`` over ``grid`` on the device of the first tensor; an empty grid does nothing.

    Triton launches on the current device, which need not be the tensors'.
    """
    if 0 in grid:
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **meta)

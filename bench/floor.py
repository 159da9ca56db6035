"""What the machine can do at the most: the floor under every time."""

from __future__ import annotations

import torch

from . import clock

_CALLS = {"cpu": 1, "cuda": 10}
_SIZE = {"cpu": 2048, "cuda": 8192}


def machine_rates(
    dtype: torch.dtype, device: str = "cpu", size: int | None = None
) -> tuple[float, float]:
    """Floating-point operations per second in a matrix product, and bytes per second in a copy."""
    size, calls = size or _SIZE[device], _CALLS[device]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    product = min(clock.seconds(lambda: torch.mm(a, b), calls, device) for _ in range(4))
    source = torch.ones(8 * size * size, device=device)
    target = torch.empty_like(source)
    copy = min(clock.seconds(lambda: target.copy_(source), calls, device) for _ in range(4))
    return 2 * size**3 / product, 2 * source.numel() * source.element_size() / copy

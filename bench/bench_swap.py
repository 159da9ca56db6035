"""Layers of other projects against themselves after `swap`, forward and backward.

`pytest bench/bench_swap.py --benchmark-only`: in each group the column in brackets is the factor.
`python -m bench.bench_swap`: peak bytes of either.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import Module, Parameter

from mimnet_fast import swap

from . import memory
from .baselines import OURS, WrongResultError


class DenseCapsule(Module):
    """Written as XifengGuo's: votes by a broadcast product, then products and sums over them."""

    def __init__(self, inputs: int, d_in: int, capsules: int, d: int) -> None:
        super().__init__()
        self.in_num_caps, self.out_num_caps, self.routings = inputs, capsules, 3
        self.weight = Parameter(0.01 * torch.randn(capsules, inputs, d, d_in))

    def forward(self, x: Tensor) -> Tensor:
        votes = (self.weight @ x[:, None, :, :, None]).squeeze(-1)
        still = votes.detach()
        logits = torch.zeros(votes.shape[:3])
        for step in range(self.routings):
            last = step == self.routings - 1
            coupling = logits.softmax(1)[..., None]
            pooled = (coupling * (votes if last else still)).sum(-2, keepdim=True)
            norm = pooled.norm(dim=-1, keepdim=True)
            capsules = norm**2 / (1 + norm**2) / (norm + 1e-8) * pooled
            if not last:
                logits = logits + (capsules * still).sum(-1)
        return capsules.squeeze(-2)


def _rechub(bilinear_type: int) -> tuple[Module, tuple[Tensor, ...]]:
    layers = pytest.importorskip("torch_rechub.basic.layers")
    layer = layers.CapsuleNetwork(16, 50, bilinear_type=bilinear_type, interest_num=4)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer, (torch.randn(256, 50, 16), torch.ones(256, 50, dtype=torch.long))


_CONTENDERS = (OURS, "as published")

_LAYERS: dict[str, Callable[[], tuple[Module, tuple[Tensor, ...]]]] = {
    "mind": lambda: _rechub(0),
    "comirec_dr": lambda: _rechub(2),
    "capsnet": lambda: (DenseCapsule(1152, 8, 10, 16), (torch.randn(16, 1152, 8),)),
}


def _step(name: str, contender: str) -> tuple[Callable[[], None], str]:
    """A step of a layer, and what `swap` says of the layer."""
    torch.manual_seed(0)
    layer, inputs = _LAYERS[name]()
    handle = swap(layer, inputs)
    if not handle.report[0].swapped:
        raise WrongResultError(str(handle.report))
    if contender != OURS:
        handle.undo()
    inputs[0].requires_grad_()
    with torch.no_grad():
        direction = torch.randn_like(layer(*inputs))

    def step() -> None:
        layer.zero_grad()
        inputs[0].grad = None
        layer(*inputs).backward(direction)

    return step, f"{name}: {handle.report[0].outcome}"


@pytest.mark.parametrize("contender", _CONTENDERS)
@pytest.mark.parametrize("name", _LAYERS)
def test_swap(
    benchmark: BenchmarkFixture, name: str, contender: str, pytestconfig: pytest.Config
) -> None:
    torch.set_num_threads(pytestconfig.getoption("threads"))
    step, benchmark.group = _step(name, contender)
    benchmark.name = contender
    benchmark(step)


if __name__ == "__main__":
    memory.with_allocator()
    torch.set_num_threads(2)
    for layer_name in _LAYERS:
        for contender_name in _CONTENDERS:
            peak = memory.peak_bytes(_step(layer_name, contender_name)[0])
            print(f"{layer_name:<12}{contender_name:<14}{peak / 1e6:>8.1f} MB")

"""What is measured: sizes, random inputs, and the arithmetic and traffic they need at the least."""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimnet_fast import ops
from mimnet_fast.ops import MIMNetParameters

DIRECTIONS = ("forward", "forward+backward")
ITERATIONS = 3
PROTOTYPES, TOP = 100, 20  # of a catalogue


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement."""

    name: str
    batch: int
    length: int
    capsules: int
    width: int
    hidden: int
    d_in: int = 0  # 0: as width
    per_position: bool = False  # a routing weight for every position and capsule

    @property
    def input_width(self) -> int:
        return self.d_in or self.width


PAPER = Case("paper", 128, 20, 7, 10, 50)
PAPER512 = Case("paper512", 512, 20, 7, 10, 50)
WIDE = Case("wide", 1024, 50, 8, 64, 64)
MIND = Case("mind", 256, 50, 4, 64, 0)
COMIREC_DR = Case("comirec_dr", 128, 20, 4, 64, 0, per_position=True)
CAPSNET = Case("capsnet", 16, 1152, 10, 16, 0, d_in=8, per_position=True)

# The length of a catalogue is the number of its items.
CATALOGUE10 = Case("catalogue10", 1000, 64443, 7, 10, 0)
CATALOGUE64 = Case("catalogue64", 1000, 64443, 7, 64, 0)

CASES = {
    op: (PAPER, PAPER512, WIDE, *((MIND, COMIREC_DR, CAPSNET) if op == "dynamic_routing" else ()))
    for op in ops.DIFFERENTIABLE
}
CASES["catalogue_top_k"] = (CATALOGUE10, CATALOGUE64)

# For GPUs, which the sizes above leave idle.
BIG = (Case("big64", 8192, 50, 8, 64, 64), Case("big128", 8192, 50, 8, 128, 128))

_NAMES = tuple(dict.fromkeys(case.name for cases in CASES.values() for case in cases))


def of_device(op: str, device: str) -> tuple[Case, ...]:
    """The sizes at which ``op`` is measured on a device."""
    differentiable = op in ops.DIFFERENTIABLE
    return (*CASES[op], *BIG) if device == "cuda" and differentiable else CASES[op]


def directions(op: str) -> tuple[str, ...]:
    """Those in which ``op`` is measured: all that it has."""
    return DIRECTIONS if op in ops.DIFFERENTIABLE else DIRECTIONS[:1]


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure and how, for every command of this package."""
    parser.add_argument(
        "--ops",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        metavar="OP",
        help=f"of {', '.join(CASES)} (default: all)",
    )
    names = [*_NAMES, *(case.name for case in BIG)]
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=names,
        metavar="CASE",
        help=f"of {', '.join(names)} (default: those of the device)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=("auto", "native", "triton"),
        default=["auto"],
        help="of ours, each a contender (default: auto)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument(
        "--modes",
        nargs="*",
        default=["default"],
        help="modes of torch.compile to try; others than default compile for minutes",
    )


def selected(options: argparse.Namespace) -> list[tuple[str, Case]]:
    """The contests that the options ask for."""
    return [
        (op, case)
        for op in options.ops
        for case in of_device(op, options.device)
        if options.cases is None or case.name in options.cases
    ]


@dataclass(frozen=True)
class Call:
    """Arguments of an op, and those of them that a training step needs gradients of."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: tuple[Tensor, ...]
    grad_output: Tensor


class _Draw:
    """Normal tensors in the dtype of a call."""

    def __init__(self, seed: str, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator(device).manual_seed(zlib.crc32(seed.encode()))
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int, std: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return (std * drawn).to(self.dtype)

    def full_mask(self, case: Case) -> Tensor:
        # A model passes a mask. Full histories: nothing is gained by skipping padded positions.
        return torch.ones(case.batch, case.length, dtype=torch.bool, device=self.device)

    def attention(self, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self(d, d, std=d**-0.5), self(d), self(d, d, std=d**-0.5), self(d)

    def meta_network(self, case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d, h = case.width, case.hidden
        # A generated matrix then keeps the length of a source vector.
        return (
            self(h, d, std=d**-0.5),
            self(h),
            self(d * d, h, std=(h * d) ** -0.5),
            self(d * d, std=d**-0.5),
        )

    def routing_weight(self, case: Case) -> Tensor:
        # Votes of length 10, as MIMNet's initialisation gives at D = 10: far from uniform routing.
        matrix = case.input_width, case.width
        leading = (case.length, case.capsules) if case.per_position else ()
        return self(*leading, *matrix, std=10 / (matrix[0] * matrix[1]) ** 0.5)


# Positional arguments, keyword arguments, leaves.
Inputs = tuple[tuple[Any, ...], dict[str, Any], tuple[Tensor, ...]]


def _squash(c: Case, draw: _Draw) -> Inputs:
    x = draw(c.batch, c.capsules, c.width)
    return (x,), {}, (x,)


def _dynamic_routing(c: Case, draw: _Draw) -> Inputs:
    inputs, weight = draw(c.batch, c.length, c.input_width), draw.routing_weight(c)
    logits = draw(c.batch, c.capsules, c.length)
    kwargs = {"mask": draw.full_mask(c), "iterations": ITERATIONS}
    return (inputs, weight, logits), kwargs, (inputs, weight)


def _interest_bridge(c: Case, draw: _Draw) -> Inputs:
    interests = draw(c.batch, c.capsules, c.width, std=c.width**-0.5)
    args = (interests, draw(c.batch, c.width), *draw.meta_network(c))
    return args, {}, args


def _target_attention(c: Case, draw: _Draw) -> Inputs:
    query, interests = draw(c.batch, c.width), draw(c.batch, c.capsules, c.width)
    args = (query, interests, *draw.attention(c.width))
    return args, {}, args


def _multi_granularity_attention(c: Case, draw: _Draw) -> Inputs:
    item, prototype = draw(c.batch, c.width), draw(c.batch, c.width)
    interests = draw(c.batch, c.capsules, c.width)
    fine, coarse = draw.attention(c.width), draw.attention(c.width)
    fusion = draw(2 * c.width, std=(2 * c.width) ** -0.5), draw(1)
    leaves = (item, prototype, interests, *fine, *coarse, *fusion)
    return (item, prototype, interests, fine, coarse, *fusion), {}, leaves


def _mimnet_forward(c: Case, draw: _Draw) -> Inputs:
    d = c.width
    history = draw(c.batch, c.length, d)
    source, item, prototype = draw(c.batch, d), draw(c.batch, d), draw(c.batch, d)
    meta, fine, coarse = draw.meta_network(c), draw.attention(d), draw.attention(d)
    fusion = draw(2 * d, std=(2 * d) ** -0.5), draw(1)
    weight = draw.routing_weight(c)
    parameters = MIMNetParameters(weight, *meta, fine, coarse, *fusion)
    logits = draw(c.batch, c.capsules, c.length)
    kwargs = {"mask": draw.full_mask(c), "iterations": ITERATIONS}
    # The embeddings are frozen in the second stage, so only the parameters have gradients.
    leaves = (weight, *meta, *fine, *coarse, *fusion)
    return (history, source, item, prototype, parameters, logits), kwargs, leaves


def _catalogue_top_k(c: Case, draw: _Draw) -> Inputs:
    d = c.width
    items, prototypes = draw(c.length, d, std=2 * d**-0.5), draw(PROTOTYPES, d, std=2 * d**-0.5)
    ids = torch.arange(c.length, device=draw.device) % PROTOTYPES
    fusion = draw(2 * d, std=(2 * d) ** -0.5), draw(1)
    weights = draw.attention(d), draw.attention(d), *fusion
    args = (draw(c.batch, c.capsules, d), items, prototypes, *weights, TOP)
    return args, {"prototype_ids": ids}, ()


_INPUTS: dict[str, Callable[[Case, _Draw], Inputs]] = {
    "squash": _squash,
    "dynamic_routing": _dynamic_routing,
    "interest_bridge": _interest_bridge,
    "target_attention": _target_attention,
    "multi_granularity_attention": _multi_granularity_attention,
    "mimnet_forward": _mimnet_forward,
    "catalogue_top_k": _catalogue_top_k,
}


def make_call(
    op: str,
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    copy: int = 0,
) -> Call:
    """Inputs of ``op`` at the sizes of ``case``, the same in every run; others in each ``copy``.

    A part (everything but the whole model) is measured as a layer inside a model that is trained,
    with gradients for all inputs but the routing logits.
    """
    draw = _Draw(f"{op}/{case.name}{f'/{copy}' if copy else ''}", dtype, device)
    args, kwargs, leaves = _INPUTS[op](case, draw)
    for leaf in leaves:
        leaf.requires_grad_()
    shape: tuple[int, ...] = (case.batch, case.capsules, case.width)
    if op in ("target_attention", "multi_granularity_attention"):
        shape = (case.batch, case.width)
    elif op == "mimnet_forward":
        shape = (case.batch,)
    elif op == "catalogue_top_k":
        shape = (case.batch, TOP)
    return Call(args, kwargs, leaves, draw(*shape))


# Floating-point operations of the reassociated algorithms. A product of an [m,k] and a [k,n] matrix
# has 2*m*k*n of them; its backward has as many for each factor that needs a gradient. Softmax,
# ReLU, biases and squash inside an op are linear in the size of what they change and left out: the
# floor stays below what any implementation needs.


def _votes_flops(c: Case) -> int:
    return 2 * c.batch * c.length * c.capsules * c.input_width * c.width


def _routing_flops(c: Case) -> int:
    b, n, k, d, r = c.batch, c.length, c.capsules, c.width, ITERATIONS
    if c.per_position:
        return _votes_flops(c) + (2 * r - 1) * 2 * b * k * n * d
    # r weighted sums and r-1 agreements, each [K,L] with [L,D]
    passes = (2 * r - 1) * 2 * b * k * n * d
    # the weight meets r*K sums and (r-1)*K capsules, or else the L inputs once
    projections = 2 * b * d * d * min((2 * r - 1) * k, n)
    return passes + projections


def _bridge_flops(c: Case) -> int:
    b, k, d, h = c.batch, c.capsules, c.width, c.hidden
    # w1 on K interests; the source into w2 [D,D*H] and b2 [D,D]; K hidden vectors into [D,H]
    return 2 * b * k * d * h + 2 * b * d * d * h + 2 * b * d * d + 2 * b * k * d * h


def _attention_flops(c: Case) -> int:
    b, k, d = c.batch, c.capsules, c.width
    # key weight on the query, K scores, weighted sum of K interests, value weight on the sum
    return 2 * b * d * d + 2 * b * k * d + 2 * b * k * d + 2 * b * d * d


def _fusion_flops(c: Case) -> int:
    # [item; prototype] with the fusion weight
    return 2 * c.batch * 2 * c.width


def flops(op: str, case: Case) -> tuple[int, int]:
    """Floating-point operations of forward, and of backward with its gradients as in the call.

    Of an op without a gradient backward has none.
    """
    b, n, k, d, h = case.batch, case.length, case.capsules, case.width, case.hidden
    if op == "squash":
        # norm (2 per element) and scaling; in backward norm, x.g and a combination of x and g
        return 3 * b * k * d, 7 * b * k * d
    if op == "dynamic_routing":
        if case.per_position:
            # The last pass: from the sums to the votes, from these to the inputs and the weight.
            return _routing_flops(case), 2 * b * k * n * d + 2 * _votes_flops(case)
        # Only the last pass propagates: through the weight to it and to the sums, from these to x.
        return _routing_flops(case), 2 * (2 * b * k * d * d) + 2 * b * k * n * d
    if op == "interest_bridge":
        return _bridge_flops(case), 2 * _bridge_flops(case)
    if op == "target_attention":
        return _attention_flops(case), 2 * _attention_flops(case)
    if op == "catalogue_top_k":
        # Keys and values of K interests, twice; scores of items, values of items twice, scores of
        # prototypes; both halves of the fusion weight.
        rating = 4 * b * k * d * d + 3 * b * k * n * d + b * k * PROTOTYPES * d
        return 2 * (rating + n * d + PROTOTYPES * d), 0
    parts = 2 * _attention_flops(case) + _fusion_flops(case)
    if op == "multi_granularity_attention":
        return parts, 2 * parts
    if op == "mimnet_forward":
        rating = 2 * b * d
        forward = _routing_flops(case) + _bridge_flops(case) + parts + rating
        # Frozen embeddings: routing needs the gradient of its weight alone, and source, item and
        # prototype get none from w2, b2, the key weights, the fusion weight and the rating.
        frozen = 2 * b * d * d * (h + 1 + 2) + _fusion_flops(case) + rating
        return forward, 2 * b * k * d * d + 2 * (_bridge_flops(case) + parts + rating) - frozen
    raise ValueError(f"op: got {op!r}, need one of {', '.join(CASES)}")


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(map(_bytes, value))
    return 0


def traffic(call: Call) -> tuple[int, int]:
    """Bytes that forward and backward at least move: each input is read, each result written once.

    Forward reads the arguments and writes the output; backward reads the arguments again and the
    gradient of the output, and writes the gradients. What is saved in between is not counted.
    """
    inputs = _bytes((call.args, tuple(call.kwargs.values())))
    output = _bytes(call.grad_output)
    return inputs + output, inputs + output + _bytes(call.leaves)

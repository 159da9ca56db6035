"""Inputs of every op, and what the tests of several ops share.

A builder returns a `Call`. Embeddings of a routing are scaled until its couplings are far from
uniform: near uniform ones hide a wrong update rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mimnet_fast import ops, verify

BACKENDS = ("native", "triton")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SINGLE_AND_HALF = (torch.float32, torch.bfloat16)
CUDA_ON_HOST = False
"""Whether the native kernels for CPU tensors are the CUDA ones."""


def interpreted(backend: str) -> bool:
    """Whether kernels run in Triton's interpreter: one thread, and a second for some programs."""
    return backend == "triton" and torch.get_default_device().type == "cpu"


def some_users(backend: str, b: int) -> int:
    """As many of ``b`` users as show every path of a kernel that gives each its own program."""
    return min(b, 5) if interpreted(backend) else b


def own_programs(name: str) -> bool:
    """Whether a user is a program of its own in the Triton kernels of this op of `EVERY_OP`."""
    return "routing" in name or "mimnet" in name


def dtype_id(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def shape_id(value: dict[str, int]) -> str:
    return "-".join(f"{letter}{size}" for letter, size in value.items())


@dataclass(frozen=True)
class Call:
    """One call of an op."""

    op: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, **options: Any) -> Any:
        return self.op(*self.args, **{**self.options, **options})

    def verify(self, backend: str) -> None:
        found = verify(self.op, *self.args, backend=backend, **self.options)
        assert found, f"\n{found}"

    def tensors(self) -> list[Tensor]:
        """Every tensor of the call, in the order that `with_tensors` takes them."""
        return list(_tensors((self.args, self.options)))

    def with_tensors(self, tensors: list[Tensor]) -> Call:
        args, options = _rebuild((self.args, self.options), iter(tensors))
        return replace(self, args=args, options=options)

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        return self.with_tensors([change(tensor) for tensor in self.tensors()])

    def outputs(self, **options: Any) -> list[Tensor]:
        return list(_tensors(self(**options)))

    def trainable(self) -> Call:
        """The call on leaves that require a gradient; a table of embeddings is frozen."""
        table = self.options.get("table")
        return self.map(
            lambda t: t.detach().requires_grad_(t.is_floating_point() and t is not table)
        )

    def leaves(self) -> list[Tensor]:
        return [t for t in self.tensors() if t.requires_grad]

    def gradients(self, **options: Any) -> list[Tensor]:
        """Outputs, then their gradients in fixed random directions."""
        call = self.trainable()
        leaves = call.leaves()
        outputs = call.outputs(**options)
        pairs = zip(outputs, directions_of(outputs), strict=True)
        used, directions = zip(*[pair for pair in pairs if pair[0].requires_grad], strict=True)
        grads = torch.autograd.grad(
            used, leaves, directions, allow_unused=True, materialize_grads=True
        )
        return [out.detach() for out in outputs] + list(grads)


def directions_of(outputs: list[Tensor]) -> list[Tensor]:
    """Output gradients, the same ones for the same shapes."""
    generator = torch.Generator("cpu").manual_seed(1)
    return [torch.randn(out.shape, generator=generator, device="cpu").to(out) for out in outputs]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _rebuild(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: _rebuild(item, tensors) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_rebuild(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)


def history_mask(kind: str, batch: int, length: int) -> dict[str, Tensor]:
    """`mask` or `lengths`; the first user's history is empty, the second's is full."""
    if kind == "all":
        return {}
    if kind == "mask":
        mask = torch.rand(batch, length) > 0.4
        mask[:1], mask[1:2] = False, True
        return {"mask": mask}
    lengths = torch.randint(0, length + 1, (batch,))
    lengths[:1], lengths[1:2] = 0, length
    return {"lengths": lengths}


def capsule_mask(batch: int, k: int) -> Tensor:
    """The first user has no capsule, the second has all."""
    mask = torch.rand(batch, k) > 0.4
    mask[:1], mask[1:2] = False, True
    return mask


def squash_call(
    *,
    b: int = 5,
    shape: tuple[int, ...] = (3, 6),
    dim: int = -1,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Call:
    """Vectors of which the first are 0."""
    x = randn(b, *shape, dtype=dtype)
    x[:1] = 0
    return Call(ops.squash, (x, dim), options)


WEIGHTS = ("shared_votes", "votes", "shared", "per_capsule")
"""What all kernels serve: votes with and without capsules, or inputs and a weight."""
EVERY_WEIGHT = (*WEIGHTS, "per_position")


def routing_call(
    *,
    b: int = 5,
    length: int = 6,
    k: int = 3,
    d_in: int = 4,
    d: int = 5,
    weight: str = "shared",
    logits: str | None = "batch",
    history: str = "all",
    absent_capsules: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Call:
    scale = 40 / d_in**0.5
    matrix = None
    if weight == "votes":
        inputs = randn(b, k, length, d_in, dtype=dtype, scale=scale)
    else:
        inputs = randn(b, length, d_in, dtype=dtype, scale=scale)
    leading = {"shared": (), "per_capsule": (k,), "per_position": (length, k)}.get(weight)
    if leading is not None:
        matrix = randn(*leading, d_in, d, dtype=dtype, scale=d_in**-0.5)
    first = None
    if logits is None:
        options["num_capsules"] = k
    else:
        first = randn(1 if logits == "one" else b, k, length, dtype=dtype)
    if absent_capsules:
        options["capsule_mask"] = capsule_mask(b, k)
    options |= history_mask(history, b, length)
    return Call(ops.dynamic_routing, (inputs, matrix, first), options)


def offsets_of(lengths: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends]).to(dtype)


def values_of(padded: Tensor, lengths: Sequence[int]) -> Tensor:
    """The real positions of `[B, L, ..]`, one after another."""
    parts = [row[:n] for row, n in zip(padded, lengths, strict=True)]
    return torch.cat(parts) if parts else padded.new_zeros(0, *padded.shape[2:])


def padded_and_jagged(call: Call, lengths: Sequence[int], each: bool = False) -> tuple[Call, Call]:
    """The same call with padding and without; logits of each value where they are asked for."""
    inputs, *others = call.args
    at = 1 if call.op is ops.dynamic_routing else 4
    jagged = list(others)
    if each:
        jagged[at] = values_of(others[at].mT, lengths).mT
    given = torch.tensor(lengths, dtype=torch.int64)
    dense = {**call.options, "lengths": given, "padding": "ignore"}
    options = {**call.options, "offsets": offsets_of(lengths)}
    return (
        Call(call.op, (inputs, *others), dense),
        Call(call.op, (values_of(inputs, lengths), *jagged), options),
    )


def bridge_call(
    *,
    b: int = 5,
    k: int = 3,
    d_i: int = 4,
    d_s: int = 5,
    d_t: int = 6,
    h: int = 7,
    per_interest: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Call:
    source = (b, k, d_s) if per_interest else (b, d_s)
    return Call(
        ops.interest_bridge,
        (
            randn(b, k, d_i, dtype=dtype),
            randn(*source, dtype=dtype),
            randn(h, d_i, dtype=dtype, scale=d_i**-0.5),
            randn(h, dtype=dtype),
            randn(d_s * d_t, h, dtype=dtype, scale=h**-0.5),
            randn(d_s * d_t, dtype=dtype),
        ),
    )


def projections(d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def matrix() -> Tensor:
        return randn(d, d, dtype=dtype, scale=d**-0.5)

    def vector() -> Tensor:
        return randn(d, dtype=dtype)

    return matrix(), vector(), matrix(), vector()


def attention_call(
    *,
    b: int = 5,
    k: int = 4,
    d: int = 6,
    c: int | None = None,
    project: str = "both",
    absent_capsules: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Call:
    """`project`: "both" projections with biases, "no_bias", "key", "value" or "none"."""
    kw, kb, vw, vb = projections(d, dtype)
    weights = {
        "both": (kw, kb, vw, vb),
        "no_bias": (kw, None, vw, None),
        "key": (kw, kb, None, None),
        "value": (None, None, vw, vb),
        "none": (),
    }[project]
    # Scores of about 1: softmax cancels gradients where one interest takes all.
    query = randn(*((b, d) if c is None else (b, c, d)), dtype=dtype, scale=d**-0.5)
    if absent_capsules:
        options["capsule_mask"] = capsule_mask(b, k)
    return Call(ops.target_attention, (query, randn(b, k, d, dtype=dtype), *weights), options)


def fusion_call(
    *,
    b: int = 5,
    k: int = 4,
    d: int = 6,
    c: int | None = None,
    bias_dims: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Call:
    shape = (b, d) if c is None else (b, c, d)
    return Call(
        ops.multi_granularity_attention,
        (
            randn(*shape, dtype=dtype, scale=d**-0.5),
            randn(*shape, dtype=dtype, scale=d**-0.5),
            randn(b, k, d, dtype=dtype),
            projections(d, dtype),
            projections(d, dtype),
            randn(2 * d, dtype=dtype, scale=d**-0.5),
            randn(*(1,) * bias_dims, dtype=dtype),
        ),
        options,
    )


def catalogue_call(
    *,
    b: int = 5,
    n: int = 40,
    k: int = 4,
    d: int = 6,
    prototypes: int | None = 3,
    top: int = 7,
    seen: int = 0,
    bias_dims: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Call:
    """`prototypes`: None gives every item its own; `seen` items per user at most."""
    options = {"k": top}
    if prototypes is not None:
        options["prototype_ids"] = torch.randint(prototypes, (n,))
    if seen:
        counts = torch.randint(seen + 1, (b,))
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        options["exclude"] = torch.randint(n, (int(counts.sum()),)), offsets
    return Call(
        ops.catalogue_top_k,
        (
            randn(b, k, d, dtype=dtype),
            randn(n, d, dtype=dtype, scale=2 * d**-0.5),
            randn(n if prototypes is None else prototypes, d, dtype=dtype, scale=2 * d**-0.5),
            projections(d, dtype),
            projections(d, dtype),
            randn(2 * d, dtype=dtype, scale=d**-0.5),
            randn(*(1,) * bias_dims, dtype=dtype),
        ),
        options,
    )


def mimnet_call(
    *,
    b: int = 5,
    length: int = 6,
    k: int = 3,
    d: int = 4,
    h: int = 7,
    ids: torch.dtype | None = None,
    one_logits: bool = False,
    bias_dims: int = 1,
    history: str = "all",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Call:
    embedded = randn(b, length, d, dtype=dtype, scale=40 / d**0.5)
    if ids is not None:
        options["table"] = randn(23, d, dtype=dtype, scale=40 / d**0.5)
        embedded = torch.randint(0, 23, (b, length), dtype=ids)
    bridge = bridge_call(b=1, k=1, d_i=d, d_s=d, d_t=d, h=h, dtype=dtype).args[2:]
    fusion = fusion_call(b=1, k=1, d=d, bias_dims=bias_dims, dtype=dtype).args[3:]
    weight = randn(d, d, dtype=dtype, scale=d**-0.5)
    options |= history_mask(history, b, length)
    return Call(
        ops.mimnet_forward,
        (
            embedded,
            randn(b, d, dtype=dtype),
            # Small items keep the attention off its corners, where gradients vanish.
            randn(b, d, dtype=dtype, scale=1 / d),
            randn(b, d, dtype=dtype, scale=1 / d),
            ops.MIMNetParameters(weight, *bridge, *fusion),
            randn(1 if one_logits else b, k, length, dtype=dtype),
        ),
        options,
    )


EVERY_OP: dict[str, Callable[..., Call]] = {
    "squash": partial(squash_call),
    "squash_dim": partial(squash_call, dim=1),
    **{
        f"dynamic_routing_{weight}": partial(routing_call, d=4, weight=weight, history="mask")
        for weight in WEIGHTS
    },
    "dynamic_routing_options": partial(
        routing_call,
        weight="per_capsule",
        logits="one",
        history="lengths",
        absent_capsules=True,
        softmax_over="inputs",
        padding="ignore",
        temperature=1.5,
        squash="norm_plus_eps",
    ),
    "dynamic_routing_per_position": partial(
        routing_call, weight="per_position", history="mask", normalize_agreement=True
    ),
    "dynamic_routing_update": partial(routing_call, update="coupling", normalize_agreement=True),
    **{
        f"dynamic_routing_full_{weight}": partial(
            routing_call, weight=weight, gradient="full", history="mask", logits="one"
        )
        for weight in ("votes", "shared", "per_position")
    },
    **{
        f"dynamic_routing_full_normalized_{weight}": partial(
            routing_call,
            weight=weight,
            gradient="full",
            normalize_agreement=True,
            update="coupling",
            absent_capsules=True,
            softmax_over="inputs",
        )
        for weight in ("shared", "per_capsule", "per_position")
    },
    "interest_bridge": partial(bridge_call),
    "interest_bridge_per_interest": partial(bridge_call, per_interest=True),
    "target_attention": partial(attention_call, absent_capsules=True, return_weights=True),
    "target_attention_candidates": partial(
        attention_call, c=3, project="no_bias", power=2.0, scale=0.5
    ),
    "target_attention_hard": partial(attention_call, hard=True),
    "multi_granularity_attention": partial(fusion_call, return_gate=True),
    "multi_granularity_attention_candidates": partial(fusion_call, c=3, bias_dims=1),
    "mimnet_forward": partial(mimnet_call, history="lengths"),
    "mimnet_forward_ids": partial(
        mimnet_call, ids=torch.int64, history="mask", padding="fill_before", one_logits=True
    ),
}
"""Builders of calls of each op, for what has to hold for all of them; they take `b` and `dtype`."""

SAME_TRITON_KERNELS = {
    "dynamic_routing_full_votes": "dynamic_routing_full_shared",
    "dynamic_routing_full_per_position": "dynamic_routing_per_position",
    "dynamic_routing_full_normalized_shared": "dynamic_routing_full_normalized_per_capsule",
    "dynamic_routing_full_normalized_per_position": "dynamic_routing_full_normalized_per_capsule",
}
"""Names of `EVERY_OP`, slow in Triton's interpreter, and others that show as much."""

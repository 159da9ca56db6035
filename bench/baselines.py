"""Who is measured: our ops, and the same computation in PyTorch as a user would write it.

The functions of `mimnet_fast.reference` guard against cases that do not occur here (absent
capsules, empty rows, other squash forms), which costs eager mode up to a factor of ten. A baseline
must not lose by that: what is plain there is taken from there, the rest is written here unguarded.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from mimnet_fast import ops, reference
from mimnet_fast.backends import BackendUnavailable, explain
from mimnet_fast.ops import MIMNetParameters
from mimnet_fast.verify import verify

from .cases import Call, Case, make_call, traffic

OURS = "mimnet_fast"

# Relative root mean square; farther is another computation and not another order of sums.
_SAME = {torch.float32: 1e-3, torch.bfloat16: 0.2}

# Without the conversion of half precision to float32, which a user's model does not have.
_bridge_textbook = inspect.unwrap(reference.interest_bridge)
_bridge_reassociated = inspect.unwrap(reference.interest_bridge_reassociated)
_target_attention_textbook = inspect.unwrap(reference.target_attention)


class WrongResultError(AssertionError):
    """Something that was to be timed computes something else."""


def squash_textbook(x: Tensor) -> Tensor:
    norm2 = (x * x).sum(-1, keepdim=True)
    return norm2 / (1 + norm2) * x / (norm2 + 1e-8).sqrt()


def routing_textbook(
    inputs: Tensor, weight: Tensor, logits: Tensor, *, mask: Tensor, iterations: int
) -> Tensor:
    if weight.dim() == 4:
        votes = torch.einsum("bli,lkid->bkld", inputs, weight)
    else:
        votes = (inputs @ weight)[:, None].expand(-1, logits.shape[1], -1, -1)
    constant = votes.detach()
    for step in range(iterations):
        last = step == iterations - 1
        coupling = logits.softmax(1) * mask[:, None]
        capsules = torch.einsum("bkl,bkld->bkd", coupling, votes if last else constant)
        capsules = squash_textbook(capsules)
        if not last:
            logits = logits + torch.einsum("bkd,bkld->bkl", capsules, constant)
    return capsules


def _routing_of_votes(
    inputs: Tensor, weight: Tensor, logits: Tensor, *, mask: Tensor, iterations: int
) -> Tensor:
    """With a weight per position nothing can be reassociated: batched products of it."""
    length, k, d_in, d = weight.shape
    each = inputs.transpose(0, 1) @ weight.movedim(1, 2).reshape(length, d_in, k * d)
    votes = each.view(length, -1, k, d).permute(1, 2, 0, 3)
    with torch.no_grad():
        for _ in range(iterations - 1):
            coupling = logits.softmax(1) * mask[:, None]
            capsules = squash_textbook((coupling[:, :, None] @ votes)[:, :, 0])
            logits = logits + (votes @ capsules[..., None])[..., 0]
        coupling = logits.softmax(1) * mask[:, None]
    return squash_textbook((coupling[:, :, None] @ votes)[:, :, 0])


def routing_reassociated(
    inputs: Tensor, weight: Tensor, logits: Tensor, *, mask: Tensor, iterations: int
) -> Tensor:
    if weight.dim() == 4:
        return _routing_of_votes(inputs, weight, logits, mask=mask, iterations=iterations)
    with torch.no_grad():
        for _ in range(iterations - 1):
            coupling = logits.softmax(1) * mask[:, None]
            capsules = squash_textbook(coupling @ inputs @ weight)
            logits = logits + (capsules @ weight.mT) @ inputs.mT
        coupling = logits.softmax(1) * mask[:, None]
    return squash_textbook(coupling @ inputs @ weight)


def target_attention_textbook(query: Tensor, interests: Tensor, *weights: Tensor) -> Tensor:
    return _target_attention_textbook(query, interests, *weights)[0]


def target_attention_reassociated(
    query: Tensor,
    interests: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
) -> Tensor:
    # Without the key bias: softmax does not see what is the same for all interests.
    folded = query @ key_weight
    weights = (interests @ folded[:, :, None]).softmax(1)
    return linear((weights.mT @ interests)[:, 0], value_weight, value_bias)


def _fused(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def multi_granularity_attention(
        item: Tensor,
        prototype: Tensor,
        interests: Tensor,
        fine: tuple[Tensor, ...],
        coarse: tuple[Tensor, ...],
        fusion_weight: Tensor,
        fusion_bias: Tensor,
    ) -> Tensor:
        gate = linear(torch.cat([item, prototype], -1), fusion_weight[None], fusion_bias).sigmoid()
        by_item = attend(item, interests, *fine)
        return (1 - gate) * by_item + gate * attend(prototype, interests, *coarse)

    return multi_granularity_attention


def _whole(
    route: Callable[..., Tensor], bridge: Callable[..., Tensor], attend: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    def mimnet_forward(
        history: Tensor,
        source: Tensor,
        item: Tensor,
        prototype: Tensor,
        p: MIMNetParameters,
        logits: Tensor,
        *,
        mask: Tensor,
        iterations: int,
    ) -> Tensor:
        interests = route(history, p.routing_weight, logits, mask=mask, iterations=iterations)
        transferred = bridge(interests, source, p.w1, p.b1, p.w2, p.b2)
        user = attend(
            item, prototype, transferred, p.fine, p.coarse, p.fusion_weight, p.fusion_bias
        )
        return (user * item).sum(-1)

    return mimnet_forward


def _best_in_parts(
    rate: Callable[..., Tensor], interests: Tensor, k: int, users_at_once: int
) -> Tensor:
    """The best ratings of each user, of as many at a time as the temporaries allow."""
    parts = interests.split(users_at_once)
    return torch.cat([rate(part).topk(k).values for part in parts])


def catalogue_textbook(
    interests: Tensor,
    items: Tensor,
    prototypes: Tensor,
    fine: tuple[Tensor, ...],
    coarse: tuple[Tensor, ...],
    fusion_weight: Tensor,
    fusion_bias: Tensor,
    k: int,
    *,
    prototype_ids: Tensor,
) -> Tensor:
    """As the model rates, a row for each pair: several temporaries of 230 MB at D = 64."""
    guides = prototypes[prototype_ids]

    def rate(some: Tensor) -> Tensor:
        users, count = len(some), len(items)
        item, guide = items.repeat(users, 1), guides.repeat(users, 1)
        each = some.repeat_interleave(count, 0)
        user = _multi_textbook(item, guide, each, fine, coarse, fusion_weight, fusion_bias)
        return (user * item).sum(-1).view(users, count)

    return _best_in_parts(rate, interests, k, 2)


def catalogue_reassociated(
    interests: Tensor,
    items: Tensor,
    prototypes: Tensor,
    fine: tuple[Tensor, ...],
    coarse: tuple[Tensor, ...],
    fusion_weight: Tensor,
    fusion_bias: Tensor,
    k: int,
    *,
    prototype_ids: Tensor,
) -> Tensor:
    """Ratings from a few matrix products, without vectors of users."""
    of_item, of_prototype = fusion_weight[None].tensor_split(2, 1)
    by_prototype = linear(prototypes, of_prototype, fusion_bias)[prototype_ids]
    gate = (linear(items, of_item) + by_prototype).sigmoid()[:, 0]

    def rate(some: Tensor) -> Tensor:
        key_weight, _, *values = fine
        by_item = (some @ key_weight.mT @ items.mT).softmax(1)
        fine_rating = (by_item * (linear(some, *values) @ items.mT)).sum(1)
        key_weight, _, *values = coarse
        by_kind = (some @ key_weight.mT @ prototypes.mT).softmax(1)[..., prototype_ids]
        coarse_rating = (by_kind * (linear(some, *values) @ items.mT)).sum(1)
        return torch.lerp(fine_rating, coarse_rating, gate)

    return _best_in_parts(rate, interests, k, 10)


_multi_textbook = _fused(target_attention_textbook)
_multi_reassociated = _fused(target_attention_reassociated)

FORMS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "squash": {"textbook": squash_textbook},
    "dynamic_routing": {"textbook": routing_textbook, "reassociated": routing_reassociated},
    "interest_bridge": {"textbook": _bridge_textbook, "reassociated": _bridge_reassociated},
    "target_attention": {
        "textbook": target_attention_textbook,
        "reassociated": target_attention_reassociated,
    },
    "multi_granularity_attention": {
        "textbook": _multi_textbook,
        "reassociated": _multi_reassociated,
    },
    "mimnet_forward": {
        "textbook": _whole(routing_textbook, _bridge_textbook, _multi_textbook),
        "reassociated": _whole(routing_reassociated, _bridge_reassociated, _multi_reassociated),
    },
    "catalogue_top_k": {"textbook": catalogue_textbook, "reassociated": catalogue_reassociated},
}


_DEFAULT_MODES = ("default",)
_DEFAULT_BACKENDS = ("auto",)
# Users of a call whose check needs float64 and several runs; at more, only the last check is made.
_VERIFIED_BATCH = 1024
_MOST_COPIES = 32
_FEW_USERS = 10


def ours(backends: tuple[str, ...] = _DEFAULT_BACKENDS) -> list[str]:
    """What our op is called, once per backend that is asked for."""
    return [OURS if backend == "auto" else f"{OURS}({backend})" for backend in backends]


def names(
    op: str,
    modes: tuple[str, ...] = _DEFAULT_MODES,
    backends: tuple[str, ...] = _DEFAULT_BACKENDS,
) -> list[str]:
    """The contenders of ``op``: ours, the forms in eager mode, each form compiled in each mode."""
    compiled = [
        f"compile({form})" if mode == "default" else f"compile({form}, {mode})"
        for form in FORMS[op]
        for mode in modes
    ]
    return [*ours(backends), *FORMS[op], *compiled]


def call_of(name: str, op: str, call: Call) -> Call:
    """What a contender is given: the call, or as a baseline of a catalogue, of a few users.

    All users would take it minutes, to whose number its time is proportional.
    """
    if op != "catalogue_top_k" or name.startswith(OURS):
        return call
    interests, *others = call.args
    return replace(call, args=(interests[:_FEW_USERS], *others))


def served_by(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    """An op on a backend."""
    return function if backend == "auto" else partial(function, backend=backend)


def contenders(
    op: str,
    modes: tuple[str, ...] = _DEFAULT_MODES,
    backends: tuple[str, ...] = _DEFAULT_BACKENDS,
) -> dict[str, Callable[..., Tensor]]:
    """Functions by the names of :func:`names`. What it compiled before is no longer of use."""
    # Static shapes make one compiled version per case, and torch gives up after eight of them.
    torch.compiler.reset()
    functions = [
        *(served_by(getattr(ops, op), backend) for backend in backends),
        *FORMS[op].values(),
        *(
            torch.compile(form, dynamic=False, mode=None if mode == "default" else mode)
            for form in FORMS[op].values()
            for mode in modes
        ),
    ]
    return dict(zip(names(op, modes, backends), functions, strict=True))


@dataclass(frozen=True)
class Step:
    """One thing to time: a forward without autograd, or a forward and its gradients."""

    function: Callable[..., Tensor]
    call: Call
    direction: str

    def __call__(self) -> tuple[Tensor | None, ...]:
        if self.direction == "forward":
            with torch.no_grad():
                output = self.function(*self.call.args, **self.call.kwargs)
            # The ratings of the best items: which of equals comes first may differ.
            return output[:1] if isinstance(output, tuple) else (output,)
        output = self.function(*self.call.args, **self.call.kwargs)
        # The key bias takes no part in a reassociated attention.
        return torch.autograd.grad(
            output, self.call.leaves, self.call.grad_output, allow_unused=True
        )


def _relative_distance(
    results: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]
) -> float:
    """Of all results together: a gradient that should be 0 has no size to compare with."""
    squares = [
        (0.0 if a is None else a[: len(b)].double()) - b.double()
        for a, b in zip(results, expected, strict=True)
        if b is not None
    ]
    distance = sum(float(d.square().sum()) for d in squares)
    size = sum(float(b.double().square().sum()) for b in expected if b is not None)
    return (distance / size) ** 0.5


class Contest:
    """One op at one size: its contenders, each of which has to be right before it is timed.

    Raises:
        WrongResultError: our op is too far from the float64 reference, in outputs or gradients.
    """

    def __init__(
        self,
        op: str,
        case: Case,
        dtype: torch.dtype = torch.float32,
        modes: tuple[str, ...] = _DEFAULT_MODES,
        device: str = "cpu",
        backends: tuple[str, ...] = _DEFAULT_BACKENDS,
    ) -> None:
        self.op = op
        self.call = make_call(op, case, dtype, device)
        function = getattr(ops, op)
        self._wrong = self._verify(function, case, dtype, device, backends)
        if len(self._wrong) == len(backends):
            raise WrongResultError("; ".join(self._wrong.values()))
        self.backend = ", ".join(backends)
        if backends == _DEFAULT_BACKENDS:
            reasons = explain(function, *self.call.args, **self.call.kwargs)
            self.backend = next(name for name, why in reasons.items() if not why)
        self._functions = contenders(op, modes, backends)
        self._expected: dict[str, tuple[Tensor | None, ...]] = {}
        self._calls = [self.call]
        if device == "cuda":
            in_cache = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            copies = min(_MOST_COPIES, math.ceil(in_cache / max(traffic(self.call))))
            self._calls += [
                make_call(op, case, dtype, device, copy=copy) for copy in range(1, copies)
            ]

    def _verify(
        self,
        function: Callable[..., Tensor],
        case: Case,
        dtype: torch.dtype,
        device: str,
        backends: tuple[str, ...],
    ) -> dict[str, str]:
        """What is wrong with ours, by name."""
        call = self.call
        if self.op not in ops.DIFFERENTIABLE:  # which `verify` is about; the last check is left
            return {}
        if case.batch > _VERIFIED_BATCH:
            call = make_call(self.op, replace(case, batch=_VERIFIED_BATCH), dtype, device)
        wrong = {}
        for name, backend in zip(ours(backends), backends, strict=True):
            try:
                verification = verify(function, *call.args, backend=backend, **call.kwargs)
            except BackendUnavailable as error:
                wrong[name] = str(error)
                continue
            if not verification:
                wrong[name] = str(verification)
        return wrong

    def step(self, name: str, direction: str) -> Step:
        """What to time, after one call that compiles it where it is to be compiled.

        Raises:
            WrongResultError: its result is not that of the reference.
        """
        if name in self._wrong:
            raise WrongResultError(self._wrong[name])
        if direction not in self._expected:
            oracle = partial(getattr(ops, self.op), backend="reference")
            call = call_of("reference", self.op, self.call)
            self._expected[direction] = Step(oracle, call, direction)()
        step = Step(self._functions[name], call_of(name, self.op, self.call), direction)
        distance = _relative_distance(step(), self._expected[direction])
        if not distance <= _SAME[self.call.grad_output.dtype]:
            raise WrongResultError(
                f"{self.op}: {name} ({direction}) differs from the reference by {distance:.1e} "
                "of its size"
            )
        return step

    def share(self, name: str) -> float:
        """How much of the work a contender's step does."""
        return len(call_of(name, self.op, self.call).args[0]) / len(self.call.args[0])

    def in_rotation(self, name: str, step: Step) -> Callable[[], Any]:
        """The step on other inputs in every call, on a GPU as many as its cache cannot hold."""
        if len(self._calls) == 1:
            return step
        calls = [call_of(name, self.op, call) for call in self._calls]
        turns = cycle([replace(step, call=call) for call in calls])
        return lambda: next(turns)()

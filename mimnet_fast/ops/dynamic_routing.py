"""Dynamic routing between L input capsules and K interest capsules, all iterations in one op."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mimnet_fast import backends, reference
from mimnet_fast._options import GRADIENTS, PADDINGS, SOFTMAX_AXES, SQUASH_FORMS, UPDATES, code
from mimnet_fast.ops import _autograd, _checks, _jagged
from mimnet_fast.ops.squash import check_squash

_INPUTS = "[B, L, D_in], or the votes [B, K, L, D] when weight is None"
LOGITS = "[B, K, L] or [1, K, L]"
JAGGED_LOGITS = f"[K, T], {LOGITS}"
_WEIGHT = "None, [D_in, D], [K, D_in, D] or [L, K, D_in, D]"
_SERVE_SOME_OPTIONS = {
    "cpu": {"triton": "Triton"},
    "cuda": {"native": "CUDA", "triton": "Triton"},
}


def serve_some(like: Tensor) -> dict[str, str]:
    """Backends without kernels for some options, and what their kernels are called."""
    return _SERVE_SOME_OPTIONS["cpu" if like.is_cpu else "cuda"]


def _capsules(candidates: dict[str, int | None]) -> int:
    """K, on which everything that tells it has to agree."""
    told = {name: k for name, k in candidates.items() if k is not None}
    if not told:
        raise ValueError(
            "num_capsules: got None, but neither weight nor logits tells K; pass num_capsules"
        )
    (first, k), *others = told.items()
    for name, other in others:
        if other != k:
            raise ValueError(f"{name}: got {other} capsules, but {first} has {k}")
    _checks.not_empty(first, K=k)
    return k


def dynamic_routing(
    inputs: Tensor,
    weight: Tensor | None = None,
    logits: Tensor | None = None,
    *,
    num_capsules: int | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    capsule_mask: Tensor | None = None,
    iterations: int = 3,
    softmax_over: str = "capsules",
    padding: str = "zero_after",
    gradient: str = "last",
    update: str = "accumulate",
    normalize_agreement: bool = False,
    inner_squash: bool = True,
    final_squash: bool = True,
    temperature: float = 1.0,
    squash: str = "sqrt_eps",
    eps: float = 1e-8,
    power: float = 1.0,
    return_coupling: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Route L inputs to K capsules by agreement (Sabour et al. 2017; MIND, Li et al. 2019).

    With votes ``u_klj = (x_l W)_j`` and routing logits ``b``, every iteration computes::

        c = softmax(b / temperature)          over the capsules or over the inputs
        z_k = sum_l c_kl u_kl                 the weighted sum
        v_k = squash(z_k)
        b_kl <- b_kl + v_k . u_kl             not after the last iteration

    Shared and per-capsule weights form no votes on the compiled backends, unless these are to be
    normalised; those of a weight per position are never held for the whole batch.

    Args:
        inputs: ``[B, L, D_in]``; with ``weight=None`` the votes, ``[B, L, D]`` (the same for all K)
            or ``[B, K, L, D]``. Histories of different lengths need no padding: give the values of
            all ``[T, D_in]`` with ``offsets``, or a nested tensor of layout ``torch.jagged``, whose
            memory is used as it is. ``values()`` and ``offsets()`` of TorchRec's ``JaggedTensor``
            and ``KeyedJaggedTensor`` are such a pair.
        weight: None, ``[D_in, D]`` shared, ``[K, D_in, D]`` per capsule, or ``[L, K, D_in, D]`` per
            position and capsule; a position is the index within the history.
        logits: First logits, ``[B, K, L]`` or ``[1, K, L]``; None is zeros. With jagged inputs
            ``[K, T]``, one for every value, or again by position, with L at least the longest
            history. Nothing is drawn here: with a shared weight and zero logits all capsules come
            out equal.
        num_capsules: K, needed when neither ``weight`` nor ``logits`` tells it.
        mask: Boolean ``[B, L]``, True at real items, any pattern. Or
        lengths: integer ``[B]``, the first ``lengths[b]`` items are real. Or
        offsets: integer ``[B+1]`` for jagged inputs: the history of user b is
            ``inputs[offsets[b]:offsets[b + 1]]``. From 0 to T, never decreasing.
        capsule_mask: Boolean ``[B, K]``; an absent capsule takes part in nothing and comes out 0.
        iterations: Weighted sums, so there are ``iterations - 1`` updates.
        softmax_over: ``"capsules"`` (an input divides itself among them) or ``"inputs"``.
        padding: What a padded position gets. ``"zero_after"``: coupling 0 after the softmax, its
            logits still count in a softmax over the inputs. ``"fill_before"``: logit -1e9 before
            the softmax, which over the capsules is the coupling 1/K and not 0 (released MIMNet).
            ``"ignore"``: as if the position were not there, which is what all three are for jagged
            inputs.
        gradient: ``"last"``: the couplings are constants and only the last sum propagates;
            ``"full"``: through all iterations.
        update: ``"accumulate"``: ``b + agreement``; ``"replace"``: ``agreement``; ``"coupling"``:
            ``c + agreement``.
        normalize_agreement: Use L2-normalised votes in the agreement.
        inner_squash: Squash before the agreement.
        final_squash: Squash the result.
        temperature: Divides the logits inside the softmax.
        squash: Form of the squash, see :func:`mimnet_fast.ops.squash`.
        eps: Of the squash.
        power: Of the squash.
        return_coupling: Also return ``c`` of the last iteration: how much of every input went to
            every capsule.
        backend: See :mod:`mimnet_fast.backends`.

    Returns:
        The capsules ``[B, K, D]``; with ``return_coupling`` also the coupling ``[B, K, L]``
        (``[K, T]`` for jagged inputs), a constant through which no gradient flows.

    Raises:
        ValueError: for shapes, counts or options that do not fit, naming the argument.
        TypeError: for wrong types or dtypes.

    Example:
        >>> import torch
        >>> x, w, b = torch.ones(2, 5, 4), torch.eye(4), torch.zeros(1, 3, 5)
        >>> dynamic_routing(x, w, b, lengths=torch.tensor([5, 0])).norm(dim=-1).round(decimals=3)
        tensor([[0.9170, 0.9170, 0.9170],
                [0.0000, 0.0000, 0.0000]])
        >>> offsets = torch.tensor([0, 5, 5, 6])  # of 5, 0 and 1 items
        >>> dynamic_routing(torch.ones(6, 4), w, torch.zeros(3, 6), offsets=offsets).shape
        torch.Size([3, 3, 4])
        >>> _, coupling = dynamic_routing(x, w, b + torch.tensor([9.0, 0, 0])[:, None],
        ...                               return_coupling=True)
        >>> coupling[0, :, 0].round(decimals=3)
        tensor([1., 0., 0.])
    """
    options = (
        iterations, softmax_over, padding, update, normalize_agreement, gradient, inner_squash,
        final_squash, temperature, squash, eps, power,
    )  # fmt: skip
    if (
        lengths is None
        and offsets is None
        and num_capsules is None
        and logits is not None
        and backends.trusts_native(backend, inputs, weight, logits, mask, capsule_mask)
        and "native" not in serve_some(inputs)
        and (mask is None or mask.dim() == 2)  # to the op, fewer are lengths or offsets
    ):
        try:
            codes = _known_codes(*options)
            constant = not codes[_FULL] and logits.requires_grad
            start = logits.detach() if constant else logits
            capsules, coupling, _ = _CALLS["native"](
                inputs, weight, start, mask, capsule_mask, logits.shape[-2], *codes
            )
            return _outputs(capsules, coupling, return_coupling)
        except backends.REFUSALS:
            pass  # the checks below say what does not fit
    inputs, offsets = _jagged.unpack("inputs", inputs, offsets)
    jagged = offsets is not None
    if jagged:
        inputs = _checks.leading("inputs", inputs, (2,), "[T, D_in] with offsets")
    else:
        inputs = _checks.leading("inputs", inputs, (3, 4), _INPUTS)
    if weight is not None:
        _checks.is_tensor("weight", weight, (2, 3, 4), _WEIGHT)
    if logits is not None:
        dims, meaning = ((2, 3), JAGGED_LOGITS) if jagged else ((3,), LOGITS)
        _checks.is_tensor("logits", logits, dims, meaning)
    if num_capsules is not None:
        _checks.whole("num_capsules", num_capsules, 1, "K")
    if inputs.dim() == 4 and weight is not None:
        raise ValueError(
            f"inputs: got votes of shape {list(inputs.shape)} together with a weight; "
            "pass weight=None or inputs [B, L, D_in]"
        )
    rows, d_in = inputs.shape[-2:]
    k = _capsules(
        {
            "weight": weight.shape[-3] if weight is not None and weight.dim() > 2 else None,
            "inputs": inputs.shape[1] if inputs.dim() == 4 else None,
            "logits": None if logits is None else logits.shape[-2],
            "num_capsules": num_capsules,
        }
    )
    length = rows
    if jagged:
        given = _given_positions(weight, logits)
        length = rows if given is None else given
        offsets = _checks.offsets(offsets, mask, lengths, rows, given, inputs)
        batch = offsets.shape[0] - 1
        _checks.not_empty("inputs", D_in=d_in)
    else:
        batch = inputs.shape[0]
        _checks.not_empty("inputs", L=rows, D_in=d_in)
    inputs, weight, logits = _checks.autocast((inputs, weight, logits), inputs)
    if weight is not None:
        tail = (d_in, weight.shape[-1])
        shape = (*((), (k,), (length, k))[weight.dim() - 2], *tail)
        _checks.same("weight", weight, shape, _WEIGHT, inputs)
        _checks.not_empty("weight", D=weight.shape[-1])
    if logits is not None and logits.dim() == 2:
        _checks.same("logits", logits, (k, rows), "[K, T]", inputs)
    elif logits is not None:
        first = 1 if logits.shape[0] == 1 else batch
        _checks.same("logits", logits, (first, k, length), LOGITS, inputs)
    real = offsets
    if not jagged:
        real = _checks.history_mask(mask, lengths, batch, rows, inputs)
    if capsule_mask is not None:
        _checks.capsule_mask(capsule_mask, batch, k, inputs)
    codes = _codes(*options)
    full = codes[_FULL]
    if jagged:
        padding, codes = "ignore", (*codes[:2], PADDINGS.index("ignore"), *codes[3:])

    unsupported: dict[str, list[str]] = {}
    for name, kind in serve_some(inputs).items():
        asked = {}
        if name == "triton":
            asked["jagged histories with a weight per position and capsule"] = (
                jagged and weight is not None and weight.dim() == 4
            )
            asked['jagged histories with a weight, gradient="full" and normalize_agreement'] = (
                jagged and weight is not None and full and normalize_agreement
            )
        if name == "native":
            asked["jagged histories"] = jagged
            asked["a weight per position and capsule"] = weight is not None and weight.dim() == 4
            asked['gradient="full"'] = full
            asked[f"update={update!r}"] = update != "accumulate"
            asked["normalize_agreement"] = normalize_agreement
        unsupported[name] = [
            f"no {kind} kernel for {option} in this version"
            for option, is_on in asked.items()
            if is_on
        ]
    chosen = backends.select("dynamic_routing", backend, inputs, unsupported)
    if chosen == "reference":
        capsules, coupling = _reference(
            inputs,
            weight,
            logits,
            real,
            k,
            capsule_mask=capsule_mask,
            iterations=iterations,
            softmax_over=softmax_over,
            padding=padding,
            gradient=gradient,
            update=update,
            normalize_agreement=normalize_agreement,
            inner_squash=inner_squash,
            final_squash=final_squash,
            temperature=temperature,
            squash=squash,
            eps=eps,
            power=power,
        )
    else:
        capsules, coupling, _ = _CALLS[chosen](
            inputs,
            weight,
            logits if logits is None or full else logits.detach(),
            real,
            capsule_mask,
            k,
            *codes,
        )
    return _outputs(capsules, coupling, return_coupling)


_FULL = 5  # of the codes


def _codes(
    iterations: Any,
    softmax_over: Any,
    padding: Any,
    update: Any,
    normalize_agreement: bool,
    gradient: Any,
    inner_squash: bool,
    final_squash: bool,
    temperature: Any,
    squash: Any,
    eps: Any,
    power: Any,
) -> tuple[Any, ...]:
    """The options as the op takes them, checked."""
    _checks.whole("iterations", iterations, 1, "the number of weighted sums")
    temperature = _checks.number(
        "temperature", temperature, above=0.0, meaning="divides the logits"
    )
    axis = code("softmax_over", softmax_over, SOFTMAX_AXES)
    padding = code("padding", padding, PADDINGS)
    full = code("gradient", gradient, GRADIENTS) == GRADIENTS.index("full")
    update = code("update", update, UPDATES)
    form, power = check_squash(squash, eps, power, "squash")
    return (
        iterations, axis, padding, update, normalize_agreement, full, inner_squash, final_squash,
        temperature, form, eps, power,
    )  # fmt: skip


_known_codes = lru_cache(typed=True)(_codes)


def _outputs(
    capsules: Tensor, coupling: Tensor, return_coupling: bool
) -> Tensor | tuple[Tensor, Tensor]:
    return (capsules, coupling.detach().to(capsules.dtype)) if return_coupling else capsules


def _given_positions(weight: Tensor | None, logits: Tensor | None) -> int | None:
    """L of what is given by position next to jagged inputs."""
    if weight is not None and weight.dim() == 4:
        return weight.shape[0]
    return logits.shape[2] if logits is not None and logits.dim() == 3 else None


def _reference(
    inputs: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    real: Tensor | None,
    k: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The reference on what the op takes: jagged inputs are padded."""
    jagged = inputs.dim() == 2
    if jagged:
        assert real is not None
        given = _given_positions(weight, logits)
        length = _jagged.longest(real) if given is None else given
        if logits is not None:
            logits = _jagged.pad_logits(logits, real, length)
        inputs, real = _jagged.pad(inputs, real, length)
    length = inputs.shape[-2]
    capsules, coupling = reference.dynamic_routing(
        inputs,
        weight,
        inputs.new_zeros(1, k, length) if logits is None else logits,
        mask=_checks.lengths_to_mask(real, length),
        **options,
    )
    return capsules, coupling.mT[real].mT if jagged else coupling


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of what a kernel saves for backward: its accumulator's."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _fake(
    inputs: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    capsule_mask: Tensor | None,
    num_capsules: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    length, d_in = inputs.shape[-2:]
    d = d_in if weight is None else weight.shape[-1]
    per_position = weight is not None and weight.dim() == 4
    saved = saved_dtype(inputs.dtype)
    if inputs.dim() == 2:  # the mask stands for the offsets
        assert mask is not None
        batch = mask.shape[0] - 1
        coupling = inputs.new_empty(num_capsules, length, dtype=saved)
    else:
        batch = inputs.shape[0]
        coupling = inputs.new_empty(batch, num_capsules, length, dtype=saved)
    return (
        inputs.new_empty(batch, num_capsules, d),
        coupling,
        inputs.new_empty(batch, num_capsules, d if per_position else d_in, dtype=saved),
    )


def _fake_backward(
    grad: Tensor,
    inputs: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    capsule_mask: Tensor | None,
    coupling: Tensor,
    pooled: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    return _autograd.empty_or_like((inputs, weight, logits), inputs, options[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, logits, mask, capsule_mask, _, *ctx.options = inputs
    _, coupling, pooled = output
    ctx.mark_non_differentiable(coupling, pooled)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, logits, mask, capsule_mask, coupling, pooled)


def _backward(
    kernel: Any, ctx: Any, grad: Tensor | None, _coupling: None, _pooled: None
) -> tuple[Tensor | None, ...]:
    x, weight, logits, mask, capsule_mask, coupling, pooled = ctx.saved_tensors
    (
        iterations, axis, padding, update, normalize, full, inner, final, temperature, squash, eps,
        power,
    ) = ctx.options  # fmt: skip
    of_inputs, of_weight, of_logits, *_ = ctx.needs_input_grad
    needs = of_inputs, of_weight, of_logits and full
    grads: Sequence[Tensor | None] = [None, None, None]
    if grad is not None and torch.is_grad_enabled():

        def again(x: Tensor, weight: Tensor | None, logits: Tensor | None) -> Tensor:
            return _reference(
                x,
                weight,
                logits,
                mask,
                coupling.shape[-2],
                capsule_mask=capsule_mask,
                iterations=iterations,
                softmax_over=SOFTMAX_AXES[axis],
                padding=PADDINGS[padding],
                gradient=GRADIENTS[full],
                update=UPDATES[update],
                normalize_agreement=normalize,
                inner_squash=inner,
                final_squash=final,
                temperature=temperature,
                squash=SQUASH_FORMS[squash],
                eps=eps,
                power=power,
            )[0]

        grads = _autograd.reference_vjp(again, [x, weight, logits], needs, [grad])
    elif grad is not None:
        # The last sum alone is differentiated from what it left behind.
        offsets = mask if x.dim() == 2 else None
        first = (logits, mask, capsule_mask) if full else (None, offsets, None)
        found = kernel(
            grad, x, weight, *first, coupling, pooled, *ctx.options, _autograd.bits(needs)
        )
        grads = _autograd.wanted(found, needs)
    return (*grads, *(None,) * 15)


_CALLS = _autograd.register("dynamic_routing", _fake, _fake_backward, _setup, _backward)

"""Squash: shrink a vector's length into [0, 1) and keep its direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimnet_fast import backends, reference
from mimnet_fast._options import SQUASH_FORMS, code
from mimnet_fast.ops import _autograd, _checks

_DIMS = tuple(range(1, 65))  # as many as a tensor can have


def check_squash(form: str, eps: float, power: float, name: str = "form") -> tuple[int, float]:
    """Code of the form and its power, checked together."""
    form_code = code(name, form, SQUASH_FORMS)
    _checks.number("eps", eps, above=0.0, meaning="added to or clamping a norm")
    power = _checks.number("power", power, above=0.0, meaning="exponent of pow_clamp")
    if power != 1.0 and form != "pow_clamp":
        raise ValueError(f"power: got {power} with {name}={form!r}; only 'pow_clamp' has a power")
    return form_code, power


def squash(
    x: Tensor,
    dim: int = -1,
    *,
    eps: float = 1e-8,
    form: str = "sqrt_eps",
    power: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Squash vectors along ``dim`` (Sabour et al. 2017, eq. 1): short to near 0, long to near 1.

    With ``n = |x|``, the result is ``x`` times

    ==================  ===========================================
    ``"sqrt_eps"``      ``n^2 / (1 + n^2) / sqrt(n^2 + eps)``
    ``"norm_plus_eps"`` ``n^2 / (1 + n^2) / (n + eps)``
    ``"pow_clamp"``     ``(n^2 / (1 + n^2))^power / max(n, eps)``
    ``"no_div"``        ``n / (1 + n^2)``, the same without a division by n
    ``"none_eps"``      as ``no_div``: code without any eps, which differs only in its NaN at 0
    ``"identity"``      1
    ==================  ===========================================

    ``squash(0)`` is 0 with a gradient of 0 (``sqrt_eps`` included) in every form.

    Args:
        x: Floating tensor of any shape and strides.
        dim: The dimension that holds the vectors.
        eps: Positive number, see the table.
        form: One of the names above.
        power: Exponent of ``pow_clamp``; 1 otherwise.
        backend: See :mod:`mimnet_fast.backends`.

    Returns:
        A tensor like ``x``.

    Raises:
        ValueError: for an unknown form or backend, an eps or power out of range, a dim that ``x``
            does not have.
        TypeError: for a tensor that is not floating.

    Example:
        >>> import torch
        >>> squash(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).norm(dim=-1)
        tensor([0.9615, 0.0000])
    """
    x = _checks.leading("x", x, _DIMS, "with at least one dimension")
    form_code, power = check_squash(form, eps, power)
    if _checks.whole("dim", dim, -x.dim(), "a dimension of x") >= x.dim():
        raise ValueError(f"dim: got {dim}, need at most {x.dim() - 1} (a dimension of x)")
    _checks.not_empty("x", D=x.shape[dim])
    chosen = backends.select("squash", backend, x, {})
    if chosen == "reference":
        return reference.squash(x, dim, eps=eps, form=form, power=power)
    if dim in (-1, x.dim() - 1):
        return _CALLS[chosen](x, form_code, eps, power)
    return _CALLS[chosen](x.movedim(dim, -1), form_code, eps, power).movedim(-1, dim)


def _fake(x: Tensor, form: int, eps: float, power: float) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(grad: Tensor, x: Tensor, form: int, eps: float, power: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x)


def _backward(kernel: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    form, eps, power = ctx.options
    if torch.is_grad_enabled():

        def again(x: Tensor) -> Tensor:
            return reference.squash(x, eps=eps, form=SQUASH_FORMS[form], power=power)

        (grad_x,) = _autograd.reference_vjp(again, [x], [True], [grad])
    else:
        grad_x = kernel(grad, x, form, eps, power)
    return grad_x, None, None, None


_CALLS = _autograd.register("squash", _fake, _fake_backward, _setup, _backward)

"""Modules made of the ops. Linear weights are laid out as in ``torch.nn.Linear``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter, init

from mimnet_fast import ops
from mimnet_fast.ops._jagged import unpack
from mimnet_fast.reference.multi_granularity_attention import AttentionWeights
from mimnet_fast.variants import RoutingVariant

__all__ = [
    "DynamicRouting",
    "InterestBridge",
    "MultiGranularityAttention",
    "Squash",
    "TargetAttention",
]


def _linear(out_features: int, in_features: int, **factory: Any) -> tuple[Parameter, Parameter]:
    """Weight and bias with the initial values of ``torch.nn.Linear``."""
    weight = Parameter(torch.empty(out_features, in_features, **factory))
    bias = Parameter(torch.empty(out_features, **factory))
    bound = 1 / math.sqrt(in_features)
    init.uniform_(weight, -bound, bound)
    init.uniform_(bias, -bound, bound)
    return weight, bias


class Squash(Module):
    """:func:`mimnet_fast.ops.squash` as a module.

    >>> Squash()(torch.zeros(2, 3)).sum().item()
    0.0
    """

    def __init__(
        self,
        dim: int = -1,
        *,
        eps: float = 1e-8,
        form: str = "sqrt_eps",
        power: float = 1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.eps, self.form, self.power, self.backend = dim, eps, form, power, backend

    def forward(self, x: Tensor) -> Tensor:
        """Squash the vectors along ``dim``."""
        return ops.squash(
            x, self.dim, eps=self.eps, form=self.form, power=self.power, backend=self.backend
        )

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"dim={self.dim}, form={self.form!r}, eps={self.eps}"


class DynamicRouting(Module):
    """Interest capsules of a history, :func:`mimnet_fast.ops.dynamic_routing` with its weight.

    Args:
        in_features: D_in.
        out_features: D.
        num_capsules: K.
        variant: A published routing; what is given besides wins over what it says.
        weight: ``"shared"`` (``[D_in, D]``; what there is without a variant), ``"per_capsule"``
            (``[K, D_in, D]``) or ``"per_position"`` (``[L, K, D_in, D]``).
        length: L of a weight per position; shorter inputs use its first positions.
        initial_logits: What routing starts from when ``forward`` gets no logits: ``"normal"`` draws
            N(0, 1) anew in every call (with a shared weight this is what tells the capsules apart),
            ``"zeros"`` starts from zeros; without a variant it is ``"normal"``. Pass ``logits`` for
            predictions that can be repeated.
        backend: See :mod:`mimnet_fast.backends`.
        device, dtype: Of the weight.
        options: Further keyword arguments of the op (``iterations``, ``softmax_over`` ...).

    >>> layer = DynamicRouting(8, 4, 3, iterations=2)
    >>> layer(torch.randn(2, 5, 8), lengths=torch.tensor([5, 1])).shape
    torch.Size([2, 3, 4])
    >>> layer = DynamicRouting(8, 4, 3, variant=RoutingVariant.COMIREC, length=5)
    >>> layer.weight.shape
    torch.Size([5, 3, 8, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_capsules: int,
        *,
        variant: RoutingVariant | None = None,
        weight: str | None = None,
        length: int | None = None,
        initial_logits: str | None = None,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if variant is not None and not isinstance(variant, RoutingVariant):
            raise TypeError(f"variant: got {variant!r}, need a member of RoutingVariant")
        if variant is not None:
            options = {**variant.options, **options}
        if weight is None:
            weight = "shared" if variant is None else variant.weight
        if initial_logits is None:
            initial_logits = "normal" if variant is None else variant.initial_logits
        if weight not in ("shared", "per_capsule", "per_position"):
            raise ValueError(
                f"weight: got {weight!r}, need 'shared', 'per_capsule' or 'per_position'"
            )
        if (length is not None) != (weight == "per_position"):
            raise ValueError(
                f"length: got {length}, need the number of positions with weight='per_position' "
                f"and None otherwise (weight={weight!r})"
            )
        if initial_logits not in ("normal", "zeros"):
            raise ValueError(f"initial_logits: got {initial_logits!r}, need 'normal' or 'zeros'")
        shape: tuple[int, ...] = (in_features, out_features)
        if weight != "shared":
            shape = (num_capsules, *shape)
        if length is not None:
            shape = (length, *shape)
        self.num_capsules, self.initial_logits = num_capsules, initial_logits
        self.backend, self.options = backend, options
        self.weight = Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 1), as MIND and MIMNet initialise it."""
        init.normal_(self.weight)

    def forward(
        self,
        inputs: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        logits: Tensor | None = None,
        capsule_mask: Tensor | None = None,
        return_coupling: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``[B, L, D_in]``, or jagged ``[T, D_in]`` with offsets, to capsules ``[B, K, D]``.

        With ``return_coupling`` also how much of every input went to every capsule, see the op.
        """
        inputs, offsets = unpack("inputs", inputs, offsets)
        if logits is None and self.initial_logits == "normal":
            shape = (*inputs.shape[:-2], self.num_capsules, inputs.shape[-2])
            logits = torch.randn(shape, device=inputs.device, dtype=inputs.dtype)
        weight: Tensor = self.weight
        if weight.dim() == 4 and offsets is None and inputs.shape[1] < weight.shape[0]:
            weight = weight[: inputs.shape[1]]
        return ops.dynamic_routing(
            inputs,
            weight,
            logits,
            num_capsules=self.num_capsules,
            mask=mask,
            lengths=lengths,
            offsets=offsets,
            capsule_mask=capsule_mask,
            return_coupling=return_coupling,
            backend=self.backend,
            **self.options,
        )

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{tuple(self.weight.shape)}, num_capsules={self.num_capsules}"


class InterestBridge(Module):
    """Meta network and bridge of MIMNet and PTUPCDR, :func:`mimnet_fast.ops.interest_bridge`.

    Args:
        interest_features: D_i.
        source_features: D_s.
        target_features: D_t.
        hidden_features: H.
        backend: See :mod:`mimnet_fast.backends`.
        device, dtype: Of the parameters.

    >>> InterestBridge(4, 4, 4, 16)(torch.randn(2, 3, 4), torch.randn(2, 4)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        interest_features: int,
        source_features: int,
        target_features: int,
        hidden_features: int,
        *,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.backend = backend
        self.w1, self.b1 = _linear(hidden_features, interest_features, **factory)
        entries = source_features * target_features
        self.w2, self.b2 = _linear(entries, hidden_features, **factory)

    def forward(self, interests: Tensor, source: Tensor) -> Tensor:
        """``[B, K, D_i]`` and ``[B, D_s]`` or ``[B, K, D_s]`` to ``[B, K, D_t]``."""
        return ops.interest_bridge(
            interests, source, self.w1, self.b1, self.w2, self.b2, backend=self.backend
        )

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        hidden, interest = self.w1.shape
        return f"interest={interest}, hidden={hidden}, entries={self.w2.shape[0]}"


class TargetAttention(Module):
    """:func:`mimnet_fast.ops.target_attention` with its own key and value projections.

    Args:
        features: D.
        projections: Without them keys and values are the interests themselves, as in MIND.
        scale, power, hard: See the op.
        backend: See :mod:`mimnet_fast.backends`.
        device, dtype: Of the parameters.

    >>> TargetAttention(4)(torch.randn(2, 4), torch.randn(2, 3, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        features: int,
        *,
        projections: bool = True,
        scale: float = 1.0,
        power: float = 1.0,
        hard: bool = False,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.scale, self.power, self.hard, self.backend = scale, power, hard, backend
        if projections:
            self.key_weight, self.key_bias = _linear(features, features, **factory)
            self.value_weight, self.value_bias = _linear(features, features, **factory)
        else:
            for name in ("key_weight", "key_bias", "value_weight", "value_bias"):
                self.register_parameter(name, None)

    def weights(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """``(key_weight, key_bias, value_weight, value_bias)``, as the ops take them."""
        return self.key_weight, self.key_bias, self.value_weight, self.value_bias

    def forward(
        self, query: Tensor, interests: Tensor, *, capsule_mask: Tensor | None = None
    ) -> Tensor:
        """``[B, D]`` or ``[B, C, D]`` and interests ``[B, K, D]`` to a tensor like ``query``."""
        out = ops.target_attention(
            query,
            interests,
            *self.weights(),
            capsule_mask=capsule_mask,
            scale=self.scale,
            power=self.power,
            hard=self.hard,
            backend=self.backend,
        )
        assert isinstance(out, Tensor)
        return out


class MultiGranularityAttention(Module):
    """:func:`mimnet_fast.ops.multi_granularity_attention` with its parameters.

    Args:
        features: D.
        backend: See :mod:`mimnet_fast.backends`.
        device, dtype: Of the parameters.

    >>> layer = MultiGranularityAttention(4)
    >>> layer(torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 3, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        features: int,
        *,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.fine = TargetAttention(features, device=device, dtype=dtype)
        self.coarse = TargetAttention(features, device=device, dtype=dtype)
        weight, self.fusion_bias = _linear(1, 2 * features, device=device, dtype=dtype)
        self.fusion_weight = Parameter(weight.detach()[0])

    def weights(self) -> tuple[AttentionWeights, AttentionWeights, Tensor, Tensor]:
        """``(fine, coarse, fusion_weight, fusion_bias)``, as the ops take them."""
        fine, coarse = self.fine.weights(), self.coarse.weights()
        return fine, coarse, self.fusion_weight, self.fusion_bias  # type: ignore[return-value]

    def forward(self, item: Tensor, prototype: Tensor, interests: Tensor) -> Tensor:
        """``[B, D]`` or ``[B, C, D]`` twice, interests ``[B, K, D]``; a tensor like ``item``."""
        out = ops.multi_granularity_attention(
            item, prototype, interests, *self.weights(), backend=self.backend
        )
        assert isinstance(out, Tensor)
        return out

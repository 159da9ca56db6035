"""Known combinations of the routing options, named after the code that computes them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any


class RoutingVariant(Enum):
    """A published dynamic routing as arguments of :class:`mimnet_fast.nn.DynamicRouting`.

    All of them take three weighted sums. What is written here is what the code computes, which is
    not always what its paper says.

    >>> RoutingVariant.COMIREC.weight
    'per_position'
    >>> RoutingVariant.COMIREC_PYTORCH.options["softmax_over"]
    'inputs'
    """

    MIMNET = "mimnet"
    """MIMNet as it is meant: a shared weight, random logits, padded positions take no part."""

    MIMNET_RELEASED = "mimnet_released"
    """MIMNet as it was released: logits of padded positions are filled before the softmax over the
    capsules, so that each of them enters every capsule with the coupling 1/K."""

    COMIREC = "comirec"
    """ComiRec-DR, the authors' TensorFlow code: a weight per position, softmax over capsules."""

    COMIREC_PYTORCH = "comirec_pytorch"
    """ComiRec-DR in its PyTorch port, in torch-rechub and in REMI: as COMIREC, but the softmax runs
    over the positions, padded ones included, and is not normalised again without them."""

    MIND = "mind"
    """MIND as in DeepMatch and the ComiRec repository: a shared weight, random logits."""

    EASYREC = "easyrec"
    """MIND in TorchEasyRec: logits times 20 inside the softmax, the agreement of sums that are not
    squashed with votes that are normalised, added to the couplings instead of the logits. Its
    squash has the power 0.2 of the example configuration; absent capsules go in `capsule_mask`."""

    CAPSNET = "capsnet"
    """Sabour et al. (2017): a weight per position, logits 0, the gradient through all iterations.
    Implementations differ in the eps of the squash, and some stop the gradient."""

    @property
    def weight(self) -> str:
        """What the weight depends on: ``"shared"`` or ``"per_position"``."""
        return _PRESETS[self][0]

    @property
    def initial_logits(self) -> str:
        """``"normal"`` or ``"zeros"``."""
        return _PRESETS[self][1]

    @property
    def options(self) -> Mapping[str, Any]:
        """Keyword arguments of :func:`mimnet_fast.ops.dynamic_routing`."""
        return MappingProxyType(_PRESETS[self][2])


def _last(padding: str = "zero_after", **options: Any) -> dict[str, Any]:
    """Options of the recommenders: the couplings are constants in backward."""
    return {
        "iterations": 3,
        "softmax_over": "capsules",
        "padding": padding,
        "gradient": "last",
        **options,
    }


_PRESETS: dict[RoutingVariant, tuple[str, str, dict[str, Any]]] = {
    RoutingVariant.MIMNET: ("shared", "normal", _last(eps=1e-8)),
    RoutingVariant.MIMNET_RELEASED: ("shared", "normal", _last("fill_before", eps=1e-8)),
    RoutingVariant.COMIREC: ("per_position", "zeros", _last(eps=1e-9)),
    RoutingVariant.COMIREC_PYTORCH: (
        "per_position",
        "zeros",
        _last(softmax_over="inputs", eps=1e-9),
    ),
    RoutingVariant.MIND: ("shared", "normal", _last(eps=1e-9)),
    RoutingVariant.EASYREC: (
        "shared",
        "normal",
        _last(
            update="coupling",
            normalize_agreement=True,
            inner_squash=False,
            temperature=1 / 20,
            squash="pow_clamp",
            power=0.2,
            eps=1e-7,
        ),
    ),
    RoutingVariant.CAPSNET: (
        "per_position",
        "zeros",
        {**_last(squash="none_eps"), "gradient": "full"},
    ),
}

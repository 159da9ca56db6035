"""Per-interest bridge: a meta network turns each interest into a matrix for the source vector."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear, relu

from mimnet_fast.reference._precision import accumulate_in_float32


@accumulate_in_float32
def interest_bridge(
    interests: Tensor, source: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    """Textbook form: generate ``[B,K,D_s,D_t]`` matrices, then multiply."""
    d_source = source.shape[-1]
    d_target = b2.shape[0] // d_source
    matrices = linear(relu(linear(interests, w1, b1)), w2, b2)
    matrices = matrices.unflatten(-1, (d_source, d_target))
    rows = source[:, None, None, :] if source.dim() == 2 else source[:, :, None, :]
    return (rows @ matrices)[:, :, 0]


@accumulate_in_float32
def interest_bridge_reassociated(
    interests: Tensor, source: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    """The same vectors with the source contracted first: no matrix per interest.

    ``sum_i s_i (W2 h_k)_ij = sum_h h_kh (sum_i s_i W2_ijh)``: the bracket does not depend on the
    interest, so with one source vector per user it is computed once for all K.
    """
    d_source, hidden = source.shape[-1], w1.shape[0]
    d_target = b2.shape[0] // d_source
    h = relu(linear(interests, w1, b1))
    contracted = source @ w2.reshape(d_source, d_target * hidden)
    shift = source @ b2.reshape(d_source, d_target)
    if source.dim() == 2:
        return h @ contracted.unflatten(-1, (d_target, hidden)).mT + shift[:, None]
    return (contracted.unflatten(-1, (d_target, hidden)) @ h[..., None])[..., 0] + shift

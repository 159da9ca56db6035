"""What the kernels of dynamic routing share: tiles of inputs, and the weight behind them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import MOST_REGISTERS, launch
from ._tiles import padded, product
from .squash import IDENTITY

CAPSULES = tl.constexpr(0)
ZERO_AFTER = tl.constexpr(0)
FILL_BEFORE = tl.constexpr(1)
IGNORE = tl.constexpr(2)

ACCUMULATE = tl.constexpr(0)
REPLACE = tl.constexpr(1)
COUPLING = tl.constexpr(2)

NO_WEIGHT = tl.constexpr(0)
SHARED = tl.constexpr(1)

PADDING_LOGIT = tl.constexpr(-1e9)
LOWEST = tl.constexpr(-3e38)
SHORTEST_VOTE = tl.constexpr(1e-12)

_LONGEST_TILE = 64
_TILE_ELEMENTS = 4096


@triton.jit
def _load_weight(weight, start, stride_i, stride_d, D_IN, D, I_TILE, D_TILE):
    i = tl.arange(0, I_TILE)[:, None]
    d = start + tl.arange(0, D_TILE)[None, :]
    return tl.load(weight + i * stride_i + d * stride_d, mask=(i < D_IN) & (d < D), other=0.0)


@triton.jit
def _row(x, k):
    """Row ``k`` of a tile."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0])[:, None] == k, x, 0.0), 0)


@triton.jit
def times_weight(
    pooled,
    weight,
    start,
    stride_k,
    stride_i,
    stride_d,
    WEIGHT: tl.constexpr,
    K: tl.constexpr,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """Elements ``start ..`` of the capsules [K_TILE, D_TILE] from the weighted sums."""
    if WEIGHT == NO_WEIGHT:
        capsules = pooled
    elif WEIGHT == SHARED:
        w = _load_weight(weight, start, stride_i, stride_d, D_IN, D, pooled.shape[1], D_TILE)
        capsules = product(pooled, w, weight.dtype.element_ty)
    else:
        k = tl.arange(0, pooled.shape[0])[:, None]
        capsules = tl.zeros([pooled.shape[0], D_TILE], tl.float32)
        for row in range(K):
            w = _load_weight(
                weight + row * stride_k, start, stride_i, stride_d, D_IN, D, pooled.shape[1], D_TILE
            )
            capsule = tl.sum(_row(pooled, row)[:, None] * w.to(tl.float32), 0)
            capsules = tl.where(k == row, capsule[None, :], capsules)
    return capsules


@triton.jit
def times_weight_transposed(
    capsules,
    weight,
    start,
    stride_k,
    stride_i,
    stride_d,
    WEIGHT: tl.constexpr,
    K: tl.constexpr,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    I_TILE: tl.constexpr,
):
    """What elements ``start ..`` of the capsules give in the input space, [K_TILE, I_TILE]."""
    if WEIGHT == NO_WEIGHT:
        back = capsules
    elif WEIGHT == SHARED:
        w = _load_weight(weight, start, stride_i, stride_d, D_IN, D, I_TILE, capsules.shape[1])
        back = product(capsules, tl.trans(w), weight.dtype.element_ty)
    else:
        k = tl.arange(0, capsules.shape[0])[:, None]
        back = tl.zeros([capsules.shape[0], I_TILE], tl.float32)
        for row in range(K):
            w = _load_weight(
                weight + row * stride_k, start, stride_i, stride_d, D_IN, D, I_TILE,
                capsules.shape[1],
            )  # fmt: skip
            vector = tl.sum(_row(capsules, row)[None, :] * w.to(tl.float32), 1)
            back = tl.where(k == row, vector[None, :], back)
    return back


@triton.jit
def history_of(offsets, user, users, length):
    """The user, first row and length of a history in tensors of positions.

    Those of jagged histories belong to a single user with ``length`` rows. The host has not looked
    at the offsets: bounded, every row is in a history, and no history leaves the rows.
    """
    first = user * 0
    own_length = length
    if offsets is not None:
        is_last = user + 1 == users
        first = tl.load(offsets + user, mask=user > 0, other=0).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), length)
        end = tl.load(offsets + user + 1, mask=~is_last, other=0).to(tl.int64)
        end = tl.where(is_last, length, tl.minimum(tl.maximum(end, first), length))
        own_length = (end - first).to(length.dtype)
        user = user * 0
    return user, first, own_length


@triton.jit
def load_inputs(
    inputs,
    start,
    stride_k,
    stride_l,
    stride_d,
    length,
    OWN_VOTES: tl.constexpr,
    K: tl.constexpr,
    D_IN: tl.constexpr,
    K_TILE: tl.constexpr,
    L_TILE: tl.constexpr,
    I_TILE: tl.constexpr,
):
    """A tile of one user's inputs [L_TILE, I_TILE], or of the votes [K_TILE, L_TILE, I_TILE]."""
    at = (start + tl.arange(0, L_TILE)).to(tl.int64)[:, None]
    i = tl.arange(0, I_TILE).to(tl.int64)[None, :]
    here = (at < length) & (i < D_IN)
    offsets = at * stride_l + i * stride_d
    if OWN_VOTES:
        k = tl.arange(0, K_TILE).to(tl.int64)[:, None, None]
        x = tl.load(inputs + k * stride_k + offsets[None], mask=(k < K) & here[None], other=0.0)
    else:
        x = tl.load(inputs + offsets, mask=here, other=0.0)
    return x


@triton.jit
def load_logits(
    logits, start, stride_k, stride_l, length, K: tl.constexpr, K_TILE: tl.constexpr,
    L_TILE: tl.constexpr,
):  # fmt: skip
    """The first logits of a tile [K_TILE, L_TILE]; zeros where there are none."""
    if logits is None:
        first = tl.zeros([K_TILE, L_TILE], tl.float32)
    else:
        k = tl.arange(0, K_TILE).to(tl.int64)[:, None]
        at = (start + tl.arange(0, L_TILE)).to(tl.int64)[None, :]
        here = (k < K) & (at < length)
        first = tl.load(logits + k * stride_k + at * stride_l, mask=here, other=0.0).to(tl.float32)
    return first


@triton.jit
def load_real(mask, start, stride_l, length, L_TILE: tl.constexpr):
    """Which positions of a tile [1, L_TILE] hold an item."""
    at = (start + tl.arange(0, L_TILE))[None, :]
    real = at < length
    if mask is not None:
        if mask.dtype.element_ty.is_int1():
            real = tl.load(mask + at.to(tl.int64) * stride_l, mask=real, other=0) != 0
        else:
            real = real & (at < tl.load(mask))
    return real


@triton.jit
def squared_lengths(
    pooled,
    weight,
    stride_k,
    stride_i,
    stride_d,
    WEIGHT: tl.constexpr,
    K: tl.constexpr,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """Squared lengths [K_TILE, 1] of the capsules."""
    norm2 = tl.zeros([pooled.shape[0], 1], tl.float32)
    for start in range(0, D, D_TILE):
        c = times_weight(
            pooled, weight, start, stride_k, stride_i, stride_d, WEIGHT, K, D_IN, D, D_TILE
        )
        norm2 += tl.sum(c * c, 1, keep_dims=True)
    return norm2


@triton.jit
def inverse_norm(norm2):
    return 1 / tl.maximum(tl.sqrt(norm2), SHORTEST_VOTE)


@triton.jit
def load_inverse_norms(
    inverse_norms, x, start, stride_k, length, OWN_VOTES: tl.constexpr, WEIGHT: tl.constexpr,
    K: tl.constexpr, K_TILE: tl.constexpr, L_TILE: tl.constexpr,
):  # fmt: skip
    """One over the lengths of a tile's votes, [K_TILE, L_TILE], or [1, L_TILE] if all agree."""
    if OWN_VOTES:
        votes = x.to(tl.float32)
        inverse = inverse_norm(tl.sum(votes * votes, 2))
    elif WEIGHT == NO_WEIGHT:
        votes = x.to(tl.float32)
        inverse = inverse_norm(tl.sum(votes * votes, 1)[None, :])
    else:
        of_capsule = 0 if WEIGHT == SHARED else stride_k
        inverse = load_logits(inverse_norms, start, of_capsule, 1, length, K, K_TILE, L_TILE)
    return inverse


@triton.jit
def measured_from_largest(share, grad, present):
    """Gradients of a softmax over the capsules, less their mean, [K_TILE, L_TILE].

    A softmax's gradient is c (g - sum c g). Where one coupling is nearly 1 that is the difference
    of nearly equal numbers, unless all are measured from that of the largest.
    """
    largest = tl.max(share, 0, keep_dims=True)
    grad -= tl.max(tl.where(present & (share == largest), grad, LOWEST), 0, keep_dims=True)
    return grad - tl.sum(share * grad, 0, keep_dims=True)


@triton.jit
def largest_over_inputs(share, grad, here, top, base, mean, total):
    """The same over the inputs, from tile to tile: the gradient less ``base`` and ``mean``.

    ``top`` and ``total`` are the largest share and the sum of the shares so far.
    """
    new_top = tl.max(tl.where(here, share, LOWEST), 1, keep_dims=True)
    of_top = tl.max(tl.where(here & (share == new_top), grad, LOWEST), 1, keep_dims=True)
    new_base = tl.where(new_top > top, of_top, base)
    mean += total * (base - new_base) + tl.sum(share * (grad - new_base), 1, keep_dims=True)
    total += tl.sum(share, 1, keep_dims=True)
    return tl.maximum(top, new_top), new_base, mean, total


@triton.jit(do_not_specialize=["length"])
def _inverse_norms_kernel(
    inputs,
    weight,
    out,
    length,
    inputs_stride_b,
    inputs_stride_l,
    inputs_stride_d,
    weight_stride_b,
    weight_stride_k,
    weight_stride_i,
    weight_stride_d,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    L_TILE: tl.constexpr,
    I_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """One over the lengths of a tile's votes for one capsule."""
    tiles = tl.cdiv(length, L_TILE)
    user, k = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1)
    at = (tl.program_id(0) % tiles).to(tl.int64) * L_TILE + tl.arange(0, L_TILE)[:, None]
    inputs += user * inputs_stride_b + at * inputs_stride_l
    weight += user * weight_stride_b + k.to(tl.int64) * weight_stride_k
    norm2 = tl.zeros([L_TILE, 1], tl.float32)
    for start in range(0, D, D_TILE):
        d = start + tl.arange(0, D_TILE)[None, :]
        votes = tl.zeros([L_TILE, D_TILE], tl.float32)
        for first in range(0, D_IN, I_TILE):
            i = first + tl.arange(0, I_TILE)
            x = tl.load(
                inputs + i[None, :] * inputs_stride_d,
                mask=(at < length) & (i[None, :] < D_IN),
                other=0.0,
            )
            w = tl.load(
                weight + i[:, None] * weight_stride_i + d * weight_stride_d,
                mask=(i[:, None] < D_IN) & (d < D),
                other=0.0,
            )
            votes += product(x, w, weight.dtype.element_ty)
        norm2 += tl.sum(votes * votes, 1, keep_dims=True)
    out += (user * tl.num_programs(1) + k) * length + at
    tl.store(out, inverse_norm(norm2), mask=at < length)


class RoutingOptions(NamedTuple):
    """What an op was asked for, with codes for the forms of its squashes."""

    iterations: int
    softmax_over: int
    padding: int
    update: int
    normalize: bool
    inner_squash: int
    final_squash: int
    inverse_temperature: float
    eps: float
    power: float

    @staticmethod
    def of(
        iterations: int,
        softmax_over: int,
        padding: int,
        update: int,
        normalize_agreement: bool,
        inner_squash: bool,
        final_squash: bool,
        temperature: float,
        squash: int,
        eps: float,
        power: float,
    ) -> RoutingOptions:
        """From the arguments of the op. A single iteration has no agreement to normalise."""
        return RoutingOptions(
            iterations,
            softmax_over,
            padding,
            update,
            normalize_agreement and iterations > 1,
            squash if inner_squash else IDENTITY.value,
            squash if final_squash else IDENTITY.value,
            1 / temperature,
            eps,
            power,
        )

    def numbers(self) -> tuple[float, float, float]:
        """Arguments of the kernels that route one user in a program."""
        return self.inverse_temperature, self.eps, self.power

    def constants(self) -> dict[str, int | bool]:
        """Their constants."""
        return {
            "AXIS": self.softmax_over,
            "PADDING": self.padding,
            "UPDATE": self.update,
            "NORMALIZE": self.normalize,
            "INNER": self.inner_squash,
            "FINAL": self.final_squash,
        }


def votes_of(inputs: Tensor, weight: Tensor | None) -> dict[str, bool | int]:
    """Constants that say what votes are made of: 0 nothing, 1 a shared weight, 2 one a capsule."""
    return {
        "OWN_VOTES": inputs.dim() == 4,
        "WEIGHT": 0 if weight is None else weight.dim() - 1,
    }


def strides_of(tensor: Tensor | None, dims: int) -> list[int]:
    """Strides of the last dimensions; 0 for those that the tensor does not have or repeats."""
    if tensor is None:
        return [0] * dims
    strides = [
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return [0] * (dims - len(strides)) + strides


def input_strides(inputs: Tensor) -> list[int]:
    """Strides [B, K, L, D_in]; jagged inputs are those of a single user."""
    return strides_of(inputs if inputs.dim() == 4 else inputs.unsqueeze(-3), 4)


def logit_strides(logits: Tensor | None) -> list[int]:
    """Strides [B, K, L], and again [L] where the logits of jagged inputs follow one another."""
    own = strides_of(logits, 3)
    return [*own, own[-1] if logits is not None and logits.dim() == 2 else 0]


def mask_strides(mask: Tensor | None) -> list[int]:
    """Strides [B, L] of a mask or of lengths."""
    return [mask.stride(0), 0] if mask is not None and mask.dim() == 1 else strides_of(mask, 2)


def offsets_or_mask(mask: Tensor | None, jagged: bool) -> tuple[Tensor | None, Tensor | None]:
    """What the mask of an op is: the offsets of jagged inputs, else a mask or lengths."""
    return (mask.contiguous(), None) if jagged else (None, mask)


def usual_length(rows: int, offsets: Tensor | None) -> int:
    """Positions of a history: all rows, or with offsets the mean; a device knows the longest."""
    return rows if offsets is None else triton.cdiv(rows, max(1, offsets.shape[0] - 1))


def tiles_of(
    k: int, length: int, d_in: int, weight: Tensor | None, expanded: bool
) -> dict[str, int]:
    """Tiles that stay in registers, and warps enough to hold them.

    Positions are ``expanded`` where a tile holds one vector for each capsule.
    """
    k_tile, i_tile = padded(k), padded(d_in, 16)
    per_position = k_tile * i_tile if expanded else max(k_tile, i_tile)
    shortest = 1 if expanded else 16
    longest = max(shortest, min(_LONGEST_TILE, _TILE_ELEMENTS // per_position))
    l_tile = min(padded(length, shortest), longest)
    d_tile = i_tile
    if weight is not None:
        d_tile = min(padded(weight.shape[-1], 16), max(16, _TILE_ELEMENTS // i_tile))
    elements = max(per_position * l_tile, 0 if weight is None else i_tile * d_tile)
    outputs = k_tile * max(l_tile, i_tile, d_tile)
    warps = max(1, elements // 1024, outputs // 256, i_tile // 16)
    if weight is not None and weight.dtype is torch.float32 and (weight.dim() == 3 or k_tile > 8):
        # Products in float32 hold whole operands, next to the tile of inputs.
        warps *= 2
    return {
        "K_TILE": k_tile,
        "L_TILE": l_tile,
        "I_TILE": i_tile,
        "D_TILE": d_tile,
        "num_warps": min(8, warps),
        "num_stages": 1,
        "maxnreg": MOST_REGISTERS,
    }


def inverse_norms_of(inputs: Tensor, weight: Tensor) -> Tensor:
    """One over the lengths of the votes [B,1,L], or [B,K,L] with a weight per capsule.

    A weight of four dimensions has the capsules of each user [B,K,D_in,D].
    """
    batch, length, d_in = inputs.shape
    rows = 1 if weight.dim() == 2 else weight.shape[-3]
    out = inputs.new_empty(batch, rows, length, dtype=torch.float32)
    l_tile = min(padded(length, 16), 32)
    launch(
        _inverse_norms_kernel,
        (batch * triton.cdiv(length, l_tile), rows),
        inputs,
        weight,
        out,
        length,
        *inputs.stride(),
        *strides_of(weight, 4),
        D_IN=d_in,
        D=weight.shape[-1],
        L_TILE=l_tile,
        I_TILE=min(padded(d_in, 16), 32),
        D_TILE=min(padded(weight.shape[-1], 16), 64),
        num_warps=4,
    )
    return out

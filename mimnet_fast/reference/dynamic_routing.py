"""Dynamic routing between capsules (Sabour et al. 2017) in the multi-interest form of MIND."""

from __future__ import annotations

import torch
from torch import Tensor

from mimnet_fast.reference._precision import accumulate_in_float32
from mimnet_fast.reference.squash import squash as squash_reference

PADDING_LOGIT = -1e9
"""What `padding="fill_before"` writes over the logits of padded positions."""


def _softmax_or_zero(logits: Tensor, dim: int) -> Tensor:
    """Softmax in which a slice of only ``-inf`` is 0 instead of NaN."""
    top = logits.amax(dim, keepdim=True) if logits.numel() else logits.sum(dim, keepdim=True)
    weights = (logits - top.clamp_min(torch.finfo(logits.dtype).min)).exp()
    total = weights.sum(dim, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


def coupling_coefficients(
    logits: Tensor,
    mask: Tensor | None,
    capsule_mask: Tensor | None,
    *,
    softmax_over: str,
    padding: str,
    temperature: float = 1.0,
) -> Tensor:
    """Routing logits ``[B,K,L]`` to coupling coefficients ``[B,K,L]``."""
    axis = 1 if softmax_over == "capsules" else 2
    logits = logits / temperature
    position = None if mask is None else mask[:, None, :]
    if position is not None and padding == "fill_before":
        logits = logits.masked_fill(~position, PADDING_LOGIT)
    if position is not None and padding == "ignore":
        logits = logits.masked_fill(~position, -torch.inf)
    if capsule_mask is not None:
        logits = logits.masked_fill(~capsule_mask[:, :, None], -torch.inf)
    coupling = _softmax_or_zero(logits, axis)
    if position is not None and padding == "zero_after":
        coupling = coupling * position
    return coupling


def votes(inputs: Tensor, weight: Tensor | None) -> Tensor:
    """What every input says to every capsule: ``[B,K,L,D]``, or ``[B,1,L,D]`` when all K agree."""
    if weight is None:
        return inputs if inputs.dim() == 4 else inputs[:, None]
    if weight.dim() == 2:
        return (inputs @ weight)[:, None]
    if weight.dim() == 3:
        return torch.einsum("bli,kid->bkld", inputs, weight)
    return torch.einsum("bli,lkid->bkld", inputs, weight)


def _next_logits(logits: Tensor, coupling: Tensor, agreement: Tensor, update: str) -> Tensor:
    if update == "accumulate":
        return logits + agreement
    return agreement if update == "replace" else coupling + agreement


@accumulate_in_float32
def dynamic_routing(
    inputs: Tensor,
    weight: Tensor | None,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
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
) -> tuple[Tensor, Tensor]:
    """Textbook form: votes ``[B,K,L,D]`` are formed, then routed; ``logits`` ``[B or 1,K,L]``.

    Returns the capsules and the coupling of the last iteration ``[B,K,L]``.
    """
    batch = inputs.shape[0]
    logits = logits.expand(batch, -1, -1)
    every_vote = votes(inputs, weight).expand(-1, logits.shape[1], -1, -1)
    if gradient == "last":
        logits = logits.detach()
    for step in range(iterations):
        last = step == iterations - 1
        vote = every_vote if last or gradient == "full" else every_vote.detach()
        coupling = coupling_coefficients(
            logits,
            mask,
            capsule_mask,
            softmax_over=softmax_over,
            padding=padding,
            temperature=temperature,
        )
        capsules = torch.einsum("bkl,bkld->bkd", coupling, vote)
        if last:
            break
        if inner_squash:
            capsules = squash_reference(capsules, eps=eps, form=squash, power=power)
        said = torch.nn.functional.normalize(vote, dim=-1) if normalize_agreement else vote
        agreement = torch.einsum("bkd,bkld->bkl", capsules, said)
        logits = _next_logits(logits, coupling, agreement, update)
    if final_squash:
        capsules = squash_reference(capsules, eps=eps, form=squash, power=power)
    return capsules, coupling


@accumulate_in_float32
def dynamic_routing_reassociated(
    inputs: Tensor,
    weight: Tensor | None,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    capsule_mask: Tensor | None = None,
    iterations: int = 3,
    softmax_over: str = "capsules",
    padding: str = "zero_after",
    inner_squash: bool = True,
    final_squash: bool = True,
    temperature: float = 1.0,
    squash: str = "sqrt_eps",
    eps: float = 1e-8,
    power: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The same without votes, for a weight that does not depend on the position.

    ``sum_l c_l (x_l W) = (sum_l c_l x_l) W`` and ``v . (x_l W) = (v W^T) . x_l``, so routing stays
    in the input space and the weight meets K pooled vectors instead of L votes per capsule.
    Last-pass gradient and accumulated logits, the case that the kernels serve.
    """
    logits = logits.detach().expand(inputs.shape[0], -1, -1)
    matrix = None if weight is None else (weight if weight.dim() == 3 else weight[None])
    for step in range(iterations):
        last = step == iterations - 1
        x = inputs if last else inputs.detach()
        w = matrix if last or matrix is None else matrix.detach()
        coupling = coupling_coefficients(
            logits,
            mask,
            capsule_mask,
            softmax_over=softmax_over,
            padding=padding,
            temperature=temperature,
        )
        pooled = (coupling[:, :, None] @ x)[:, :, 0] if x.dim() == 4 else coupling @ x
        capsules = pooled if w is None else (pooled[:, :, None] @ w)[:, :, 0]
        if last:
            break
        if inner_squash:
            capsules = squash_reference(capsules, eps=eps, form=squash, power=power)
        back = capsules if w is None else (capsules[:, :, None] @ w.mT)[:, :, 0]
        agreement = (x @ back[..., None])[..., 0] if x.dim() == 4 else back @ x.mT
        logits = logits + agreement
    if final_squash:
        capsules = squash_reference(capsules, eps=eps, form=squash, power=power)
    return capsules, coupling

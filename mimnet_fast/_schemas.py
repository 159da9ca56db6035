"""Declaration of every op, before any library is loaded.

Ops exist without a compiler: the libraries and the Triton kernels only add implementations. The
compiled kernels of every device serve ``<op>``, the Triton kernels ``<op>_triton``. Codes stand for
option names (`_options.py`). `needs` is a bit mask over the inputs of the forward op whose gradient
is wanted; the others come back as empty tensors. A `mask` is boolean ``[B,L]`` or integer lengths
``[B]``; of jagged histories, which have the dimension T in place of B and L, it is the offsets
``[B+1]``, and the coupling is ``[K,T]``.
"""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("mimnet_fast", "FRAGMENT")

_ATTENTION = "Tensor {0}_kw, Tensor {0}_kb, Tensor {0}_vw, Tensor {0}_vb"
_FUSION = (
    f"{_ATTENTION.format('fine')}, {_ATTENTION.format('coarse')}, "
    "Tensor fusion_weight, Tensor fusion_bias"
)
_BRIDGE = "Tensor w1, Tensor b1, Tensor w2, Tensor b2"
_PROJECTIONS = (
    "Tensor? key_weight, Tensor? key_bias, Tensor? value_weight, Tensor? value_bias, "
    "Tensor? capsule_mask, float scale, int power, bool hard"
)
_MIMNET = (
    "Tensor history, Tensor? table, Tensor source, Tensor item, Tensor prototype, "
    f"Tensor routing_weight, {_BRIDGE}, {_FUSION}, Tensor logits, Tensor? mask, "
    "int iterations, int padding"
)

_ROUTING = (
    "int iterations, int softmax_over, int padding, int update, bool normalize_agreement, "
    "bool full_gradient, bool inner_squash, bool final_squash, float temperature, int squash, "
    "float eps, float power"
)


def _tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


SCHEMAS = (
    "squash(Tensor x, int form, float eps, float power) -> Tensor",
    "squash_backward(Tensor grad, Tensor x, int form, float eps, float power) -> Tensor",
    # -> capsules, coupling [B,K,L], pooled [B,K,D_in]: the last weighted sum, before the weight;
    # with a weight per position [B,K,D], before the squash
    "dynamic_routing(Tensor inputs, Tensor? weight, Tensor? logits, Tensor? mask, "
    f"Tensor? capsule_mask, int num_capsules, {_ROUTING}) -> {_tensors(3)}",
    "dynamic_routing_backward(Tensor grad, Tensor inputs, Tensor? weight, Tensor? logits, "
    "Tensor? mask, Tensor? capsule_mask, Tensor coupling, Tensor pooled, "
    f"{_ROUTING}, int needs) -> {_tensors(3)}",
    f"interest_bridge(Tensor interests, Tensor source, {_BRIDGE}) -> Tensor",
    f"interest_bridge_backward(Tensor grad, Tensor interests, Tensor source, {_BRIDGE}, int needs) "
    f"-> {_tensors(6)}",
    # -> output, weights [B,C,K]
    f"target_attention(Tensor query, Tensor interests, {_PROJECTIONS}) -> {_tensors(2)}",
    "target_attention_backward(Tensor grad, Tensor? grad_weights, Tensor query, Tensor interests, "
    f"{_PROJECTIONS}, int needs) -> {_tensors(6)}",
    # -> output, gate [B,C]
    f"multi_granularity_attention(Tensor item, Tensor prototype, Tensor interests, {_FUSION}) "
    f"-> {_tensors(2)}",
    "multi_granularity_attention_backward(Tensor grad, Tensor? grad_gate, Tensor item, "
    f"Tensor prototype, Tensor interests, {_FUSION}, int needs) -> {_tensors(13)}",
    # -> ratings [B], pooled [B,K,D], transferred interests [B,K,D], and if kept (CPU only, else
    # empty) the gradient of the bridge's hidden units [B,K,H] for a rating's gradient of 1
    f"mimnet_forward({_MIMNET}, bool keep) -> {_tensors(4)}",
    "mimnet_forward_backward(Tensor grad, Tensor pooled, Tensor transferred, Tensor hidden_grad, "
    f"{_MIMNET}, int needs) -> {_tensors(19)}",
    # -> scores [B,k], indices [B,k]; without prototype_ids, item n has prototype n
    "catalogue_top_k(Tensor interests, Tensor items, Tensor prototypes, Tensor? prototype_ids, "
    f"{_FUSION}, Tensor? excluded, Tensor? excluded_offsets, int k) -> {_tensors(2)}",
)

IN_PLACE = (
    # -> losses [ceil(N / batch_size)]
    "matrix_factorization_adam_(Tensor(a!) user_table, Tensor(b!) item_table, "
    "Tensor(c!) user_first, Tensor(d!) user_second, Tensor(e!) item_first, Tensor(f!) item_second, "
    "Tensor user_ids, Tensor item_ids, Tensor ratings, int batch_size, int first_step, "
    "float learning_rate, float beta1, float beta2, float eps) -> Tensor",
    # parameters [P] one after another, in the order of mimnet_forward -> losses
    "mimnet_adam_(Tensor(a!) parameters, Tensor(b!) first, Tensor(c!) second, Tensor(d!)? average, "
    "Tensor users, Tensor items, Tensor ratings, Tensor? weights, Tensor histories, "
    "Tensor lengths, Tensor history_table, Tensor source_table, Tensor item_table, "
    "Tensor prototype_table, Tensor logits, int hidden, int batch_size, int iterations, "
    "int padding, int first_step, float learning_rate, float beta1, float beta2, float eps, "
    "float weight_decay, float averaging) -> Tensor",
)
"""Ops without Triton kernels, which change their arguments."""

for _schema in IN_PLACE:
    LIBRARY.define(_schema)
for _schema in SCHEMAS:
    LIBRARY.define(_schema)
    LIBRARY.define(_schema.replace("(", "_triton(", 1))

"""Layers of other projects and what computes the same with the ops.

An adapter looks at a layer and returns its replacement, or in words why the layer has to stay as
it is, or None when it does not know the layer. Layers are known by class name and attributes, so
no project is imported. Attribute names are theirs. What was read of each project, and how they
differ from each other, is in `docs/swap.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, ReLU

from mimnet_fast import ops

Forward = Callable[..., Any]
"""A replacement: called as the layer's ``forward``, with the layer as its first argument."""

Adapter = Callable[[Any], "Forward | str | None"]


def _is(layer: Module, classes: str, attributes: str) -> bool:
    """Whether the layer's class has one of these names and the layer all these attributes."""
    named = type(layer).__name__ in classes.split()
    return named and all(hasattr(layer, name) for name in attributes.split())


def _route(*args: Any, **options: Any) -> Tensor:
    """The capsules of the op."""
    capsules = ops.dynamic_routing(*args, **options)
    assert isinstance(capsules, Tensor)
    return capsules


def _once(iterations: int) -> int:
    """Weighted sums of code that always does the last one."""
    return max(1, iterations)


# Recommenders


def comirec(layer: Any) -> Forward | str | None:
    """MIND and ComiRec-DR of torch-rechub, pytorch_ComiRec and REMI: softmax over the positions."""
    needed = "bilinear_type interest_num routing_times seq_len stop_grad relu_layer relu"
    if not _is(layer, "CapsuleNetwork", needed):
        return None
    # Whatever routing_times says, passes 0 and 1 update the logits and later ones repeat the last.
    passes = min(layer.routing_times, 3)
    if passes < 1:
        return f"routing_times is {layer.routing_times}: it computes nothing"
    if layer.bilinear_type in (0, 1) and not _plain(layer.linear, bias=False):
        return "its projection is not a plain linear layer without a bias"

    def forward(layer: Any, item_eb: Tensor, mask: Tensor, device: Any = None) -> Tensor:
        k, logits = layer.interest_num, None
        if layer.bilinear_type == 0:
            weight = layer.linear.weight.mT
            shape = (item_eb.shape[0], k, item_eb.shape[1])
            logits = torch.randn(shape, device=device or item_eb.device).to(item_eb.dtype)
        elif layer.bilinear_type == 1:
            weight = layer.linear.weight.reshape(k, -1, item_eb.shape[-1]).mT
        else:
            weight = layer.w[0].reshape(layer.w.shape[1], k, -1, item_eb.shape[-1]).mT
        capsules = _route(
            item_eb,
            weight,
            logits,
            num_capsules=k,
            mask=mask != 0,
            iterations=passes,
            softmax_over="inputs",
            gradient="last" if layer.stop_grad else "full",
            eps=1e-9,
        )
        if layer.stop_grad and passes < 3:  # only the third pass sees votes with a gradient
            capsules = capsules.detach()
        return layer.relu(capsules) if layer.relu_layer else capsules

    return forward


def mimnet_capsules(layer: Any) -> Forward | None:
    """Capsules of the released MIMNet: a padded position goes to all of them, with weight 1/K."""
    needed = "bilinear_mapping_matrix k_max iters init_std device"
    if not _is(layer, "CapsuleLayer", needed):
        return None

    def forward(layer: Any, behavior_embs: Tensor, seq_len: Tensor) -> Tensor:
        batch, length, _ = behavior_embs.shape
        shape = (batch, layer.k_max, length)
        logits = torch.normal(0.0, layer.init_std, shape, device=layer.device)
        return _route(
            behavior_embs,
            layer.bilinear_mapping_matrix,
            logits.to(behavior_embs.dtype),
            mask=torch.arange(length, device=seq_len.device) < seq_len,
            iterations=_once(layer.iters),
            padding="fill_before",
        )

    return forward


def easyrec(layer: Any) -> Forward | str | None:
    """Capsules of TorchEasyRec's MIND: couplings updated in place of logits, as many as fit."""
    needed = "bilinear_matrix _max_seq_len _max_k _num_iters _routing_logits_scale _squash_pow"
    if not _is(layer, "CapsuleLayer", f"{needed} _routing_logits_stddev _const_caps_num"):
        return None
    if layer._routing_logits_scale <= 0:
        return f"routing_logits_scale is {layer._routing_logits_scale}: no softmax temperature"

    def forward(layer: Any, inputs: Tensor, seq_len: Tensor) -> tuple[Tensor, Tensor]:
        most, k, device = layer._max_seq_len, layer._max_k, inputs.device
        inputs = inputs[:, :most]
        inputs = torch.nn.functional.pad(inputs, (0, 0, 0, most - inputs.shape[1]))
        drawn = torch.randn((*inputs.shape[:2], k), device=device, dtype=inputs.dtype)
        present = torch.full_like(seq_len, k, dtype=torch.float32)
        if not layer._const_caps_num:
            present = seq_len.float().log2().clamp(1, k)
        capsule_mask = torch.arange(k, device=device) < present[:, None]
        capsules = _route(
            inputs,
            layer.bilinear_matrix,
            (drawn * layer._routing_logits_stddev).mT,
            mask=torch.arange(most, device=device) < seq_len[:, None],
            capsule_mask=capsule_mask,
            iterations=layer._num_iters,
            update="coupling",
            normalize_agreement=True,
            inner_squash=False,
            final_squash=False,
            temperature=1 / layer._routing_logits_scale,
        )
        # Not pow_clamp, which keeps the true length under the power: saturated couplings leave
        # capsules shorter than 1e-7.
        length = torch.linalg.vector_norm(capsules, dim=-1, keepdim=True).clamp_min(1e-7)
        power = (length**2 / (1 + length**2)) ** layer._squash_pow
        return power / length * capsules, capsule_mask

    return forward


def kept_logits(layer: Any) -> str | None:
    """Ports of fun-rec's MIND, which keeps one table of logits for all users and all steps."""
    if not _is(layer, "CapsuleLayer", "bilinear_mapping_matrix routing_logits"):
        return None
    return "its routing logits are summed over the batch and kept from step to step"


# Capsule networks


def dense_capsule(layer: Any) -> Forward | None:
    """``DenseCapsule`` of XifengGuo's CapsNet."""
    if not _is(layer, "DenseCapsule", "weight in_num_caps out_num_caps routings"):
        return None

    def forward(layer: Any, x: Tensor) -> Tensor:
        weight = layer.weight.permute(1, 0, 3, 2)  # from [K, L, D, D_in]
        return _route(x, weight, iterations=layer.routings, squash="norm_plus_eps")

    return forward


def routing_capsules(layer: Any) -> Forward | None:
    """``RoutingCapsules`` of danielhavir's capsule network, in copies also ``DigitCaps``."""
    if not _is(layer, "RoutingCapsules DigitCaps", "W in_caps num_caps dim_caps num_routing"):
        return None

    def forward(layer: Any, x: Tensor) -> Tensor:
        weight = layer.W[0].permute(1, 0, 3, 2)  # from [1, K, L, D, D_in]
        passes = _once(layer.num_routing)
        return _route(x, weight, iterations=passes, squash="norm_plus_eps")

    return forward


def gram_capsules(layer: Any) -> Forward | None:
    """``CapsuleLayer`` of Gram.AI's network: softmax over the inputs, gradient through all passes.

    Its earlier versions learn the first logits.
    """
    if not _is(layer, "CapsuleLayer", "route_weights num_route_nodes num_iterations"):
        return None

    def forward(layer: Any, x: Tensor) -> Tensor:
        logits = getattr(layer, "route_logits", None)  # [K, 1, L, 1, 1]
        capsules = _route(
            x,
            layer.route_weights.transpose(0, 1),
            None if logits is None else logits[:, 0, :, 0, 0][None],
            iterations=layer.num_iterations,
            softmax_over="inputs",
            gradient="full",
            squash="none_eps",
        )
        return capsules.transpose(0, 1)[:, :, None, None]

    return forward


def _agreement(routing: Any, inputs: Tensor, weight: Tensor | None) -> Tensor:
    return _route(
        inputs,
        weight,
        routing.b.mT[None],
        iterations=routing.n_iterations + 1,
        gradient="full",
        squash="none_eps",
    )


def agreement_routing(layer: Any) -> Forward | None:
    """``AgreementRouting`` of adambielski's CapsNet: learned logits, one pass more than it says."""
    if not _is(layer, "AgreementRouting", "b n_iterations"):
        return None

    def forward(layer: Any, u_predict: Tensor) -> Tensor:
        return _agreement(layer, u_predict.transpose(1, 2), None)

    return forward


def caps_layer(layer: Any) -> Forward | None:
    """``CapsLayer`` of adambielski's CapsNet: its projection together with its routing."""
    if not _is(layer, "CapsLayer", "weights output_caps output_dim routing_module"):
        return None
    if not _is(layer.routing_module, "AgreementRouting", "b n_iterations"):
        return None

    def forward(layer: Any, caps_output: Tensor) -> Tensor:
        weight = layer.weights.reshape(
            *layer.weights.shape[:2], layer.output_caps, layer.output_dim
        )
        return _agreement(layer.routing_module, caps_output, weight.transpose(1, 2))

    return forward


def batch_capsules(layer: Any) -> str | None:
    """Capsules of timomernick, jindongwang and higgsfield, where samples depend on each other."""
    timomernick = _is(layer, "CapsuleLayer", "W in_units num_units use_routing")
    if (timomernick and layer.use_routing) or _is(layer, "DigitCaps", "W num_routes num_capsules"):
        return "it averages its logits over the batch, which no kernel for single samples can match"
    return None


# Bridges


def _plain(layer: Any, *, bias: bool) -> bool:
    return type(layer) is Linear and (layer.bias is not None) == bias


def _meta_network(decoder: Any) -> bool:
    """Linear, ReLU, Linear: what :func:`mimnet_fast.ops.interest_bridge` computes."""
    if not isinstance(decoder, torch.nn.Sequential) or len(decoder) != 3:
        return False
    first, relu, second = decoder
    return _plain(first, bias=True) and type(relu) is ReLU and _plain(second, bias=True)


def _bridge(decoder: Any, interests: Tensor, source: Tensor) -> Tensor:
    first, _, second = decoder
    return ops.interest_bridge(
        interests, source, first.weight, first.bias, second.weight, second.bias
    )


def ptupcdr(model: Any) -> Forward | str | None:
    """Models of the released PTUPCDR, whose matrices meet the user outside of the meta network."""
    if not _is(model, "MFBasedModel GMFBasedModel DNNBasedModel", "src_model tgt_model meta_net"):
        return None
    if hasattr(model, "capsule_bridge"):
        return None
    if not _meta_network(getattr(model.meta_net, "decoder", None)):
        return "the decoder of its meta network is not Linear, ReLU, Linear"

    def forward(model: Any, x: Tensor, stage: str) -> Any:
        if stage not in ("train_meta", "test_meta"):
            return type(model).forward(model, x, stage)
        kind, meta = type(model).__name__, model.meta_net
        source, target = (getattr(m, "embedding", m) for m in (model.src_model, model.tgt_model))
        history = source.iid_embedding(x[:, 2:])
        scores = meta.event_K(history) - 1e8 * (x[:, 2:] == 0)[..., None]
        pooled = (meta.event_softmax(scores) * history).sum(1, keepdim=True)
        user = source.uid_embedding(x[:, 0])
        if kind == "DNNBasedModel":
            user = model.src_model.linear(user)
        rating = _bridge(meta.decoder, pooled, user)[:, 0] * target.iid_embedding(x[:, 1])
        if kind == "GMFBasedModel":
            return model.tgt_model.linear(rating).squeeze(1)
        return rating.sum(1)

    return forward


def mimnet_model(model: Any) -> Forward | str | None:
    """The released MIMNet's model: bridge and both attentions, behind its capsule layer.

    Kept as they are: every history counts as one item long, and in training a second, randomly
    longer one is routed for an output that the released loss ignores.
    """
    if not _is(model, "MFBasedModel", "src_model tgt_model capsule_bridge dynamic_fusion"):
        return None
    bridge = model.capsule_bridge
    if getattr(bridge, "wo_capsule", 0) == 1:
        return "its ablation without capsules has no kernel"
    if not _meta_network(getattr(bridge, "decoder", None)):
        return "the decoder of its bridge is not Linear, ReLU, Linear"

    def forward(model: Any, x: Tensor, stage: str, tau: float = 0.5) -> Any:
        if stage not in ("train_meta", "test_meta"):
            return type(model).forward(model, x, stage, tau)
        bridge = model.capsule_bridge
        item = model.tgt_model.iid_embedding(x[:, 1])
        cluster = model.tgt_iid_cluser_labels[x[:, 1]]
        prototype = model.tgt_iid_cluser_prototypes_embedding[cluster]
        user = model.src_model.uid_embedding(x[:, 0])
        history = model.src_model.iid_embedding(x[:, 2:22])
        padded = torch.ones(len(x), 20, device=x.device)
        padded[:, 0] = 0

        def moved(padded: Tensor) -> Tensor:
            interests = bridge.capsuleLayer(history, (padded == 0).sum(1, keepdim=True))
            return _bridge(bridge.decoder, interests, user)

        def weights(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            (key,), (value,) = (
                getattr(model, f"capsule_mapping_cross_user_embedd_{name}{part}") for part in "KV"
            )
            return key.weight, key.bias, value.weight, value.bias

        fusion = model.dynamic_fusion[0]
        seen = ops.multi_granularity_attention(
            item,
            prototype,
            moved(padded),
            weights(""),
            weights("prot_"),
            fusion.weight[0],
            fusion.bias,
        )
        assert isinstance(seen, Tensor)
        rating = (seen * item).sum(1)
        if stage == "test_meta":
            return rating
        dropped = torch.bernoulli(torch.where(padded == 1, 1.0, 0.5))
        again = ops.target_attention(item, moved(dropped), *weights(""))
        assert isinstance(again, Tensor)
        return rating, (again * item).sum(1), 0, 0, 0.0

    return forward


ADAPTERS: tuple[Adapter, ...] = (
    comirec,
    mimnet_capsules,
    easyrec,
    kept_logits,
    dense_capsule,
    routing_capsules,
    gram_capsules,
    agreement_routing,
    caps_layer,
    batch_capsules,
    ptupcdr,
    mimnet_model,
)

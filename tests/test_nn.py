"""The modules."""

import copy
import io
import itertools

import pytest
import torch
from cases import fusion_call, routing_call
from torch.nn.functional import linear

from mimnet_fast import RoutingVariant, nn, ops


def modules(**factory):
    return {
        "Squash": nn.Squash(),
        "DynamicRouting": nn.DynamicRouting(4, 5, 3, **factory),
        "DynamicRouting per capsule": nn.DynamicRouting(4, 5, 3, weight="per_capsule", **factory),
        "DynamicRouting per position": nn.DynamicRouting(
            4, 5, 3, weight="per_position", length=6, **factory
        ),
        "InterestBridge": nn.InterestBridge(4, 5, 6, 7, **factory),
        "TargetAttention": nn.TargetAttention(6, **factory),
        "TargetAttention open": nn.TargetAttention(6, projections=False, **factory),
        "MultiGranularityAttention": nn.MultiGranularityAttention(6, **factory),
    }


SHAPES = {
    "Squash": {},
    "DynamicRouting": {"weight": (4, 5)},
    "DynamicRouting per capsule": {"weight": (3, 4, 5)},
    "DynamicRouting per position": {"weight": (6, 3, 4, 5)},
    "InterestBridge": {"w1": (7, 4), "b1": (7,), "w2": (30, 7), "b2": (30,)},
    "TargetAttention": {
        "key_weight": (6, 6), "key_bias": (6,), "value_weight": (6, 6), "value_bias": (6,),
    },
    "TargetAttention open": {},
    "MultiGranularityAttention": {
        **{
            f"{part}.{kind}_{name}": (6, 6) if name == "weight" else (6,)
            for part in ("fine", "coarse")
            for kind in ("key", "value")
            for name in ("weight", "bias")
        },
        "fusion_weight": (12,),
        "fusion_bias": (1,),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_parameters(name):
    """Names and shapes are what saved models rely on."""
    found = {key: tuple(t.shape) for key, t in modules()[name].named_parameters()}
    assert dict(sorted(found.items())) == dict(sorted(SHAPES[name].items()))


@pytest.mark.parametrize("name", SHAPES)
def test_dtype_device_copy_and_state(name):
    module = modules(dtype=torch.float64, device="meta")[name]
    assert all(p.dtype is torch.float64 and p.is_meta for p in module.parameters())
    module, other = modules()[name], modules()[name]
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for one in (other, copy.deepcopy(module)):
        for mine, theirs in zip(one.parameters(), module.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    assert all(p.dtype is torch.bfloat16 for p in module.bfloat16().parameters())
    assert name.split()[0] in repr(module)


def test_squash():
    x = torch.randn(3, 4, 5)
    module = nn.Squash(1, form="pow_clamp", power=0.5, eps=0.1)
    assert torch.equal(module(x), ops.squash(x, 1, form="pow_clamp", power=0.5, eps=0.1))
    assert "dim=1" in repr(module)


@pytest.mark.parametrize("weight", ["shared", "per_capsule", "per_position"])
def test_dynamic_routing(weight):
    call = routing_call(history="mask", absent_capsules=True)
    inputs, _, logits = call.args
    options = {"iterations": 2, "softmax_over": "inputs", "padding": "ignore"}
    length = 6 if weight == "per_position" else None
    module = nn.DynamicRouting(4, 5, 3, weight=weight, length=length, **options)
    found = module(
        inputs,
        logits=logits,
        mask=call.options["mask"],
        capsule_mask=call.options["capsule_mask"],
    )
    assert torch.equal(
        found, ops.dynamic_routing(inputs, module.weight, logits, **options, **call.options)
    )
    lengths = torch.tensor([0, 1, 2, 3, 6])
    assert torch.equal(
        module(inputs, logits=logits, lengths=lengths),
        ops.dynamic_routing(inputs, module.weight, logits, lengths=lengths, **options),
    )
    _, coupling = module(inputs, logits=logits, lengths=lengths, return_coupling=True)
    assert coupling.shape == (5, 3, 6)


def test_a_weight_per_position_serves_shorter_histories():
    module = nn.DynamicRouting(4, 5, 3, weight="per_position", length=6, initial_logits="zeros")
    x = torch.randn(2, 4, 4)
    capsules = module(x)
    assert torch.equal(capsules, ops.dynamic_routing(x, module.weight[:4]))
    capsules.sum().backward()
    assert module.weight.grad[:4].any()
    assert not module.weight.grad[4:].any()


def by_hand(variant, x, weight, logits, real):
    """What the variant computes, written out for it alone; real is [B, 1, L]."""
    votes = x @ weight if weight.dim() == 2 else torch.einsum("bli,lkid->bkld", x, weight)
    votes = votes[:, None] if votes.dim() == 3 else votes
    axis = 2 if variant is RoutingVariant.COMIREC_PYTORCH else 1
    for step in range(3):
        scores = logits * 20 if variant is RoutingVariant.EASYREC else logits
        if variant is RoutingVariant.MIMNET_RELEASED:
            scores = scores.masked_fill(~real, -1e9)
        coupling = scores.softmax(axis)
        if variant is not RoutingVariant.MIMNET_RELEASED:
            coupling = coupling * real
        seen = votes if step == 2 or variant is RoutingVariant.CAPSNET else votes.detach()
        sums = (coupling[..., None] * seen).sum(2)
        size2 = sums.square().sum(-1, keepdim=True)
        if variant is RoutingVariant.EASYREC:
            capsules = (size2 / (1 + size2)) ** 0.2 * sums / size2.sqrt().clamp_min(1e-7)
            said = sums[:, :, None] * torch.nn.functional.normalize(seen, dim=-1)
            logits = coupling + said.sum(-1)
        else:
            eps = {RoutingVariant.CAPSNET: 0, RoutingVariant.MIMNET: 1e-8}.get(variant, 1e-9)
            capsules = size2 / (1 + size2) * sums / (size2 + eps).sqrt()
            logits = logits + (capsules[:, :, None] * seen).sum(-1)
    return capsules


@pytest.mark.parametrize("variant", RoutingVariant, ids=str)
def test_variants(variant):
    per_position = variant.weight == "per_position"
    module = nn.DynamicRouting(
        4, 5, 3, variant=variant, length=6 if per_position else None, dtype=torch.float64
    )
    assert module.initial_logits == variant.initial_logits
    x = torch.randn(7, 6, 4, dtype=torch.float64)
    logits = torch.randn(7, 3, 6, dtype=torch.float64)
    lengths = torch.tensor([6, 1, 2, 3, 4, 5, 6])
    real = (torch.arange(6) < lengths[:, None])[:, None]
    found = module(x, logits=logits, lengths=lengths)
    expected = by_hand(variant, x, module.weight, logits, real)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    grads = [torch.autograd.grad(out.square().sum(), module.weight)[0] for out in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_variants_are_different_functions():
    logits, lengths = torch.randn(4, 3, 6), torch.tensor([6, 1, 2, 3])
    x, outputs = torch.randn(4, 6, 4), []
    torch.manual_seed(0)
    shared, each = torch.randn(4, 5), torch.randn(6, 3, 4, 5)
    for variant in RoutingVariant:
        weight = each if variant.weight == "per_position" else shared
        outputs.append(ops.dynamic_routing(x, weight, logits, lengths=lengths, **variant.options))
    # MIND and MIMNet differ in an eps, ComiRec and CapsNet in the gradient and an eps.
    same = {
        (a.name, b.name)
        for (a, first), (b, second) in itertools.combinations(
            zip(RoutingVariant, outputs, strict=True), 2
        )
        if torch.allclose(first, second, rtol=1e-3, atol=1e-4)
    }
    assert same == {("MIMNET", "MIND"), ("COMIREC", "CAPSNET")}


def test_arguments_win_over_the_variant():
    module = nn.DynamicRouting(
        4, 5, 3, variant=RoutingVariant.COMIREC, weight="shared", initial_logits="normal", eps=0.5
    )
    assert module.weight.shape == (4, 5)
    assert module.initial_logits == "normal"
    assert module.options == {**RoutingVariant.COMIREC.options, "eps": 0.5}
    with pytest.raises(TypeError):
        RoutingVariant.COMIREC.options["eps"] = 1.0


def test_initial_logits():
    x = torch.randn(2, 5, 4)
    zeros = nn.DynamicRouting(4, 6, 3, initial_logits="zeros")
    capsules = zeros(x)
    assert torch.equal(capsules[:, 0], capsules[:, 1]), "nothing tells the capsules apart"
    assert torch.equal(capsules, ops.dynamic_routing(x, zeros.weight, num_capsules=3))

    normal = nn.DynamicRouting(4, 6, 3)
    torch.manual_seed(5)
    drawn = normal(x)
    torch.manual_seed(5)
    logits = torch.randn(2, 3, 5)
    assert torch.equal(drawn, normal(x, logits=logits)), "standard normal, one for each position"
    assert not torch.equal(drawn, normal(x)), "and new ones each time"


def test_initial_weights():
    torch.manual_seed(0)
    weight = nn.DynamicRouting(64, 64, 2, weight="per_capsule").weight
    assert abs(weight.mean()) < 0.05
    assert abs(weight.std() - 1) < 0.05
    bridge = nn.InterestBridge(16, 8, 8, 100)
    for parameter, fan_in in ((bridge.w1, 16), (bridge.b1, 16), (bridge.w2, 100), (bridge.b2, 100)):
        bound = fan_in**-0.5
        assert 0.9 * bound < parameter.abs().max() <= bound


def test_interest_bridge_is_two_linear_layers():
    """Weights of a PTUPCDR-like meta network load as they are."""
    first, second = torch.nn.Linear(4, 7), torch.nn.Linear(7, 30)
    module = nn.InterestBridge(4, 5, 6, 7)
    module.load_state_dict(
        {"w1": first.weight, "b1": first.bias, "w2": second.weight, "b2": second.bias}
    )
    interests, source = torch.randn(2, 3, 4), torch.randn(2, 5)
    matrices = second(first(interests).relu()).reshape(2, 3, 5, 6)
    expected = torch.einsum("bi,bkij->bkj", source, matrices)
    torch.testing.assert_close(module(interests, source), expected)


def test_target_attention():
    query, interests = torch.randn(2, 6), torch.randn(2, 4, 6)
    mask = torch.tensor([[True, False, True, True], [True] * 4])
    module = nn.TargetAttention(6, scale=0.4)
    keys = linear(interests, module.key_weight, module.key_bias)
    values = linear(interests, module.value_weight, module.value_bias)
    scores = (keys @ query[..., None])[..., 0] * 0.4
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = (weights[:, None] @ values)[:, 0]
    torch.testing.assert_close(module(query, interests, capsule_mask=mask), expected)

    hard = nn.TargetAttention(6, projections=False, hard=True)
    best = (interests @ query[..., None])[..., 0].argmax(-1)
    assert torch.equal(hard(query, interests), interests[torch.arange(2), best])
    assert hard.weights() == (None,) * 4
    power = nn.TargetAttention(6, projections=False, power=2.0)
    torch.testing.assert_close(
        power(query, interests), ops.target_attention(query, interests, power=2.0)
    )


def test_multi_granularity_attention():
    item, prototype, interests, *_ = fusion_call(c=3).args
    module = nn.MultiGranularityAttention(6)
    found = module(item, prototype, interests)
    assert torch.equal(
        found, ops.multi_granularity_attention(item, prototype, interests, *module.weights())
    )
    gate = torch.sigmoid(
        torch.cat([item, prototype], -1) @ module.fusion_weight + module.fusion_bias
    )[..., None]
    mixed = (1 - gate) * module.fine(item, interests) + gate * module.coarse(prototype, interests)
    torch.testing.assert_close(found, mixed)


def test_backend_of_a_module(any_backend):
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    module = nn.DynamicRouting(4, 4, 2, backend=any_backend, dtype=torch.float64)
    logits = torch.randn(5, 2, 3, dtype=torch.float64)
    expected = ops.dynamic_routing(x, module.weight, logits, backend=any_backend)
    assert torch.equal(module(x, logits=logits), expected)
    with pytest.raises(ValueError, match="backend: got 'other'"):
        nn.Squash(backend="other")(x)


def test_a_model_learns():
    """All modules together, trained for a few steps by an ordinary optimizer."""
    torch.manual_seed(0)
    routing, bridge = nn.DynamicRouting(8, 8, 3), nn.InterestBridge(8, 8, 8, 16)
    attention = nn.MultiGranularityAttention(8)
    model = torch.nn.ModuleList([routing, bridge, attention])
    history, source, item, prototype = torch.randn(64, 10, 8), *torch.randn(3, 64, 8)
    logits, ratings = torch.randn(64, 3, 10), torch.randn(64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        interests = bridge(routing(history, logits=logits), source)
        user = attention(item, prototype, interests)
        loss = ((user * item).sum(-1) - ratings).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_frozen_parameters_get_no_gradient():
    module = nn.InterestBridge(4, 4, 4, 8)
    module.w2.requires_grad_(False)
    module(torch.randn(2, 3, 4), torch.randn(2, 4)).sum().backward()
    assert module.w2.grad is None
    assert module.w1.grad is not None

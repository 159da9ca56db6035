"""First and second derivatives against finite differences and against the reference."""

from functools import partial
from itertools import cycle

import pytest
import torch
from cases import (
    EVERY_OP,
    EVERY_WEIGHT,
    WEIGHTS,
    Call,
    attention_call,
    bridge_call,
    directions_of,
    fusion_call,
    mimnet_call,
    routing_call,
    squash_call,
)
from torch.autograd import gradcheck, gradgradcheck

from mimnet_fast import ops
from mimnet_fast._options import PADDINGS, SOFTMAX_AXES, SQUASH_FORMS, UPDATES


def full_routing_call(**options):
    """Three iterations, differentiated through all of them."""
    options = {"history": "mask", "absent_capsules": True, "final_squash": False, **options}
    return routing_call(**{**options, "gradient": "full", "iterations": 3})


# One iteration: with more, a last-pass gradient is not the derivative of the function.
SMALL = {
    **{
        f"squash-{form}": partial(squash_call, b=2, shape=(3,), form=form, eps=1e-3)
        for form in SQUASH_FORMS
    },
    "squash-power": partial(squash_call, b=2, shape=(3,), form="pow_clamp", power=0.4),
    **{
        f"dynamic_routing-{weight}": partial(routing_call, weight=weight, history="mask")
        for weight in WEIGHTS
    },
    **{
        f"dynamic_routing-{axis}-{padding}": partial(
            routing_call,
            weight="per_capsule",
            history="mask",
            softmax_over=axis,
            padding=padding,
            absent_capsules=True,
        )
        for axis in SOFTMAX_AXES
        for padding in PADDINGS
    },
    **{f"dynamic_routing-{form}": partial(routing_call, squash=form) for form in SQUASH_FORMS[1:]},
    "dynamic_routing-open": partial(routing_call, final_squash=False),
    "dynamic_routing-per_position": partial(routing_call, weight="per_position", history="mask"),
    **{
        f"dynamic_routing-full-{weight}-{axis}-{update}{'-normalized' * normalize}": partial(
            full_routing_call,
            weight=weight,
            softmax_over=axis,
            update=update,
            normalize_agreement=normalize,
            padding=padding,
            logits=logits,
        )
        for weight, axis, update, normalize, padding, logits in zip(
            EVERY_WEIGHT * 4,
            ("capsules",) * 10 + ("inputs",) * 10,
            cycle(UPDATES),
            ((False,) * 5 + (True,) * 5) * 2,
            cycle(PADDINGS[::-1]),
            cycle(("batch", "one")),
            strict=False,
        )
    },
    "interest_bridge": bridge_call,
    "interest_bridge-per_interest": partial(bridge_call, per_interest=True),
    **{
        f"target_attention-{project}": partial(attention_call, project=project)
        for project in ("both", "no_bias", "key", "value", "none")
    },
    "target_attention-weights": partial(
        attention_call, c=2, return_weights=True, absent_capsules=True, scale=0.5
    ),
    "target_attention-power": partial(attention_call, project="no_bias", power=3.0),
    "target_attention-hard": partial(attention_call, hard=True),
    "multi_granularity_attention": fusion_call,
    "multi_granularity_attention-gate": partial(fusion_call, c=2, return_gate=True),
    "mimnet_forward": partial(mimnet_call, history="mask", iterations=1),
}
SIZES = {
    routing_call: {"b": 3, "length": 3, "k": 2, "d_in": 2, "d": 3, "iterations": 1},
    full_routing_call: {"b": 3, "length": 3, "k": 2, "d_in": 2, "d": 3},
    bridge_call: {"b": 2, "k": 2, "d_i": 2, "d_s": 3, "d_t": 2, "h": 3},
    attention_call: {"b": 3, "k": 3, "d": 2},
    fusion_call: {"b": 2, "k": 2, "d": 2},
    mimnet_call: {"b": 3, "length": 3, "k": 2, "d": 2, "h": 3},
}


def small(name) -> Call:
    """In float64, on vectors short enough for a squash to have a slope."""
    build = SMALL[name]
    call = build(dtype=torch.float64, **SIZES.get(getattr(build, "func", build), {}))
    if call.op in (ops.dynamic_routing, ops.mimnet_forward):
        inputs = call.tensors()[0]
        call = call.map(lambda t: t / 20 if t is inputs else t)
    elif call.op is ops.squash:
        call = call.map(lambda t: t + 0.1)  # not at 0, where the eps of sqrt_eps rules
    return call.trainable()


def function_of(call, backend):
    """The op as a function of the tensors that need a gradient, without logits that get none."""
    leaves = [t for t in call.leaves() if t.shape != logits_shape(call)]

    def function(*tensors):
        given = dict(zip(map(id, leaves), tensors, strict=True))
        outputs = call.with_tensors([given.get(id(t), t) for t in call.tensors()]).outputs(
            backend=backend
        )
        return tuple(out for out in outputs if out.requires_grad)

    return function, leaves


def logits_shape(call):
    """Of logits that are constants."""
    if call.op is ops.dynamic_routing:
        return None if call.options.get("gradient") == "full" else call.args[2].shape
    return call.args[5].shape if call.op is ops.mimnet_forward else None


@pytest.mark.parametrize("name", SMALL)
def test_first_derivative(backend, name):
    function, leaves = function_of(small(name), backend)
    assert gradcheck(function, leaves)


@pytest.mark.parametrize("name", SMALL)
def test_second_derivative(backend, name):
    function, leaves = function_of(small(name), backend)
    assert gradgradcheck(function, leaves)


def close(mine, other):
    """To rounding, relative to the largest entry."""
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-9 * max(other.abs().max().item(), 1))


def second_derivatives(call, backend):
    """Gradients of a squared gradient, for all inputs."""
    outputs = [out for out in call.outputs(backend=backend) if out.requires_grad]
    leaves = call.leaves()
    first = torch.autograd.grad(
        outputs, leaves, directions_of(outputs), create_graph=True, materialize_grads=True
    )
    total = sum(g.square().sum() for g in first)
    return torch.autograd.grad(total, leaves, materialize_grads=True)


@pytest.mark.parametrize("name", EVERY_OP)
def test_second_derivative_is_that_of_the_reference(backend, name):
    call = EVERY_OP[name](dtype=torch.float64).trainable()
    mine, other = second_derivatives(call, backend), second_derivatives(call, "reference")
    assert any(g.any() for g in mine)
    for one, two in zip(mine, other, strict=True):
        close(one, two)


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 2},
        {"softmax_over": "inputs"},
        {"padding": "fill_before"},
        {"inner_squash": False},
        {"final_squash": False},
        {"temperature": 3.0},
        {"squash": "norm_plus_eps"},
        {"eps": 1.0},
        {"squash": "pow_clamp", "power": 0.4},
        {"update": "coupling"},
        {"normalize_agreement": True},
        {"gradient": "full"},
    ],
    ids=str,
)
def test_second_derivative_knows_every_option(backend, options):
    """On vectors short enough for each option to count."""
    call = routing_call(history="mask", dtype=torch.float64, **options)
    call = call.map(lambda t: t if t.dtype is torch.bool else t / 5).trainable()
    mine = second_derivatives(call, backend)
    for one, two in zip(mine, second_derivatives(call, "reference"), strict=True):
        close(one, two)


def gradients_of(leaves, build, backend, order):
    out = build(*leaves, backend)
    found = torch.autograd.grad(out.square().sum(), leaves, create_graph=order == 2)
    if order == 2:
        found = torch.autograd.grad(sum(g.square().sum() for g in found), leaves)
    return found


def same_item_twice(item, interests, backend):
    fine, coarse, weight, bias = fusion_call(k=3, d=4, dtype=torch.float64).args[3:]
    return ops.multi_granularity_attention(
        item, item, interests, fine, coarse, weight, bias, backend=backend
    )


def same_weights_twice(item, interests, backend):
    matrix = interests[0].T @ interests[0]
    weights = (matrix, item[0], matrix, item[0])
    return ops.multi_granularity_attention(
        item, 2 * item, interests, weights, weights, item[:2].flatten(), item[0, 0], backend=backend
    )


def interests_are_the_source(item, interests, backend):
    w1, b1, w2, b2 = bridge_call(d_i=4, d_s=4, d_t=4, dtype=torch.float64).args[2:]
    return (
        ops.interest_bridge(interests, interests, w1, b1, w2, b2, backend=backend) + item[:, None]
    )


def query_is_an_interest(item, interests, backend):
    return ops.target_attention(interests[:, 0], interests, backend=backend) * item


def keys_are_values(item, interests, backend):
    weight = interests[0].T @ interests[0]
    return ops.target_attention(item, interests, weight, item[0], weight, item[0], backend=backend)


def mimnet_with_one_vector(item, interests, backend):
    """The user's vector, the item and its prototype are one tensor."""
    call = mimnet_call(d=4, k=3, length=3, iterations=1, dtype=torch.float64)
    _, _, _, _, parameters, logits = call.args
    return ops.mimnet_forward(interests, item, item, item, parameters, logits, backend=backend)


@pytest.mark.parametrize(
    "build",
    [
        same_item_twice,
        same_weights_twice,
        interests_are_the_source,
        query_is_an_interest,
        keys_are_values,
        mimnet_with_one_vector,
    ],
)
@pytest.mark.parametrize("order", [1, 2])
def test_one_tensor_in_two_places(backend, order, build):
    """Its gradient is the sum of both places' shares, each counted once."""
    item = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    interests = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    found = {}
    for name in (backend, "reference"):
        torch.manual_seed(3)
        found[name] = gradients_of([item, interests], build, name, order)
    for mine, other in zip(found[backend], found["reference"], strict=True):
        close(mine, other)


@pytest.mark.parametrize("name", EVERY_OP)
def test_each_input_alone(backend, name):
    """A kernel is told which gradients are wanted; each comes out the same as together."""
    call = EVERY_OP[name]().trainable()
    leaves = call.leaves()
    outputs = len(call.outputs(backend=backend))
    together = call.gradients(backend=backend)[outputs:]
    for i, expected in enumerate(together):
        alone = call.with_tensors([t if t is leaves[i] else t.detach() for t in call.tensors()])
        results = [out for out in alone.outputs(backend=backend) if out.requires_grad]
        if not results:
            assert not expected.any()
            continue
        every = directions_of(call.outputs(backend=backend))
        (found,) = torch.autograd.grad(results, leaves[i], every[: len(results)])
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", EVERY_OP)
def test_no_graph_without_grad(backend, name):
    call = EVERY_OP[name]().trainable()
    with torch.no_grad():
        assert not any(out.requires_grad for out in call.outputs(backend=backend))
    with torch.inference_mode():
        inferred = call.outputs(backend=backend)
    for one, two in zip(inferred, call.outputs(backend=backend), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", EVERY_OP)
def test_backward_twice_needs_the_graph(backend, name):
    """As any op: the second backward through a freed graph is an error, a retained one is not."""
    call = EVERY_OP[name]().trainable()
    out = next(out for out in call.outputs(backend=backend) if out.requires_grad)
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


@pytest.mark.parametrize("name", EVERY_OP)
def test_inputs_changed_in_place_before_backward_are_noticed(backend, name):
    call = EVERY_OP[name]()
    call = call.map(lambda t: t.detach().clone()).trainable()
    out = next(out for out in call.outputs(backend=backend) if out.requires_grad)
    with torch.no_grad():
        call.leaves()[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()

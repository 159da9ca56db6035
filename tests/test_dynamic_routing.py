"""The dynamic routing op: every option and shape, and what the options mean."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import (
    CUDA_ON_HOST,
    DTYPES,
    EVERY_WEIGHT,
    SINGLE_AND_HALF,
    WEIGHTS,
    dtype_id,
    interpreted,
    routing_call,
    shape_id,
    some_users,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mimnet_fast import ops
from mimnet_fast._options import GRADIENTS, PADDINGS, SOFTMAX_AXES, SQUASH_FORMS, UPDATES

SHAPES = [
    {"b": 33, "length": 20, "k": 7, "d_in": 10, "d": 10},
    {"b": 1, "length": 1, "k": 1, "d_in": 1, "d": 1},
    {"b": 0, "length": 5, "k": 3, "d_in": 4, "d": 4},
    {"b": 2, "length": 1, "k": 5, "d_in": 7, "d": 3},
    {"b": 17, "length": 9, "k": 1, "d_in": 3, "d": 8},
    {"b": 1, "length": 50, "k": 4, "d_in": 64, "d": 64},
    {"b": 16, "length": 3, "k": 9, "d_in": 33, "d": 33},
    {"b": 65, "length": 4, "k": 2, "d_in": 16, "d": 33},
]
HISTORIES = [
    ("all", "zero_after"),
    *itertools.product(("mask", "lengths"), PADDINGS),
]
OPTIONS = [
    {"iterations": 1},
    {"iterations": 2},
    {"iterations": 5},
    {"logits": None},
    {"logits": "one"},
    {"inner_squash": False},
    {"final_squash": False},
    {"temperature": 3.0},
    {"temperature": 0.5, "softmax_over": "inputs"},
    {"absent_capsules": True},
    {"absent_capsules": True, "softmax_over": "inputs", "history": "mask", "padding": "ignore"},
    {"absent_capsules": True, "history": "lengths", "padding": "fill_before"},
    {"squash": "pow_clamp", "power": 0.2},
    {"eps": 0.1},
    *({"squash": form} for form in SQUASH_FORMS[1:]),
]

UPDATES_AND_GRADIENTS = [
    {"update": "replace"},
    {"update": "coupling", "history": "mask"},
    {"update": "coupling", "history": "mask", "softmax_over": "inputs"},
    {"normalize_agreement": True},
    {"normalize_agreement": True, "update": "replace", "softmax_over": "inputs"},
    {
        "normalize_agreement": True,
        "update": "coupling",
        "absent_capsules": True,
        "history": "lengths",
        "temperature": 0.05,
        "inner_squash": False,
        "squash": "pow_clamp",
        "power": 0.2,
        "eps": 1e-7,
    },
    *({"gradient": "full", "iterations": iterations} for iterations in (1, 2, 5)),
    *({"gradient": "full", "logits": logits} for logits in ("one", None)),
    *({"gradient": "full", "update": update} for update in UPDATES[1:]),
    {"gradient": "full", "history": "mask", "softmax_over": "inputs", "temperature": 3.0},
    {"gradient": "full", "history": "lengths", "padding": "fill_before", "inner_squash": False},
    {
        "gradient": "full",
        "normalize_agreement": True,
        "absent_capsules": True,
        "history": "mask",
        "softmax_over": "inputs",
        "padding": "ignore",
        "final_squash": False,
    },
    {"gradient": "full", "normalize_agreement": True, "update": "coupling", "squash": "no_div"},
]


def gentle(call):
    """A full gradient on vectors short enough for it to flow: a softmax at 0 and 1 stops it."""
    if call.options.get("gradient") != "full":
        return call
    return call.map(lambda t: t / 20 if t.is_floating_point() else t)


def some_positions(backend, weight, shape):
    """The shape, or what of it Triton's interpreter does in seconds."""
    shape = {**shape, "b": some_users(backend, shape["b"])}
    if interpreted(backend) and weight == "per_position":
        shape["length"] = min(shape["length"], 4)
    return shape


def option_id(options):
    return "-".join(f"{name}={value}" for name, value in options.items())


@pytest.mark.parametrize(("history", "padding"), HISTORIES)
@pytest.mark.parametrize("softmax_over", SOFTMAX_AXES)
@pytest.mark.parametrize("weight", EVERY_WEIGHT)
@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=dtype_id)
def test_weights_and_paddings(backend, dtype, weight, softmax_over, history, padding):
    routing_call(
        weight=weight, softmax_over=softmax_over, history=history, padding=padding, dtype=dtype
    ).verify(backend)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("weight", EVERY_WEIGHT)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_shapes(backend, dtype, weight, shape):
    shape = some_positions(backend, weight, shape)
    routing_call(weight=weight, history="mask", dtype=dtype, **shape).verify(backend)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("weight", EVERY_WEIGHT)
def test_shapes_with_a_full_gradient(backend, weight, shape):
    options = {"gradient": "full", "normalize_agreement": len(weight) % 2 == 0}
    shape = some_positions(backend, weight, shape)
    call = routing_call(weight=weight, history="mask", logits="one", **options, **shape)
    gentle(call).verify(backend)


@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=dtype_id)
def test_options(backend, dtype, weight, options):
    routing_call(weight=weight, dtype=dtype, **options).verify(backend)


@st.composite
def calls(draw, users, every_option):
    """Any combination of shapes and options, or of those that the kernels of every device serve."""
    options = {}
    if every_option:
        options = {
            "update": draw(st.sampled_from(UPDATES)),
            "normalize_agreement": draw(st.booleans()),
            "gradient": draw(st.sampled_from(GRADIENTS)),
        }
    form = draw(st.sampled_from(SQUASH_FORMS))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return routing_call(
        b=draw(st.integers(0, users)),
        length=draw(st.integers(1, 24)),
        k=draw(st.integers(1, 9)),
        d_in=draw(st.integers(1, 20)),
        d=draw(st.integers(1, 20)),
        weight=draw(st.sampled_from(EVERY_WEIGHT if every_option else WEIGHTS)),
        logits=draw(st.sampled_from((None, "one", "batch"))),
        history=draw(st.sampled_from(("all", "mask", "lengths"))),
        absent_capsules=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        iterations=draw(st.integers(1, 4)),
        softmax_over=draw(st.sampled_from(SOFTMAX_AXES)),
        padding=draw(st.sampled_from(PADDINGS)),
        **options,
        inner_squash=draw(st.booleans()),
        final_squash=draw(st.booleans()),
        temperature=draw(st.sampled_from((0.7, 1.0, 2.0))),
        squash=form,
        power=0.5 if form == "pow_clamp" else 1.0,
    )


@pytest.mark.slow
@pytest.mark.parametrize("every_option", [False, True])
def test_combinations(backend, every_option):
    examples = 25 if interpreted(backend) else 100

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(calls(some_users(backend, 40), every_option))
    def check(call):
        gentle(call).verify(backend)

    check()


MUTATIONS = {
    "softmax_over": {"softmax_over": "inputs"},
    "padding": {"padding": "fill_before"},
    "padding ignore over inputs": {"padding": "ignore", "softmax_over": "inputs"},
    "iterations": {"iterations": 2},
    "one iteration more": {"iterations": 4},
    "inner_squash": {"inner_squash": False},
    "final_squash": {"final_squash": False},
    "temperature": {"temperature": 2.0},
    "form": {"squash": "norm_plus_eps", "eps": 1.0},
    "eps": {"eps": 1.0},
    "no mask": {"mask": None},
    "lengths for mask": {"mask": None, "lengths": torch.tensor([0, 6, 3, 2, 1])},
    "capsule_mask": {"capsule_mask": torch.tensor([[True, False, True]]).repeat(5, 1)},
}
UPDATE_MUTATIONS = {
    "update replace": {"update": "replace"},
    "update coupling": {"update": "coupling"},
    "normalize_agreement": {"normalize_agreement": True},
}
"""Of what CUDA C++ does not offer."""


def changed(call, backend, options):
    """Largest change of a capsule for clearly different couplings."""
    return (call(backend=backend) - call(backend=backend, **options)).abs().max()


def unsaturated(call):
    """The call with vectors short enough for a squash and a softmax to be far from 1."""
    return call.map(lambda t: t / 5 if t.is_floating_point() else t)


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("weight", WEIGHTS[1:])
def test_every_option_counts(backend, weight, mutation):
    call = routing_call(weight=weight, history="mask", dtype=torch.float64)
    call = unsaturated(call)
    assert changed(call, backend, MUTATIONS[mutation]) > 1e-2


def test_padding_ignore_differs_from_zero_after_only_over_inputs(backend):
    """Over the capsules a padded position has a softmax of its own, so both are one function."""
    for axis, differs in (("capsules", False), ("inputs", True)):
        call = unsaturated(routing_call(history="mask", dtype=torch.float64, softmax_over=axis))
        distance = changed(call, backend, {"padding": "ignore"})
        assert distance > 1e-2 if differs else distance < 1e-12


@pytest.mark.parametrize("mutation", UPDATE_MUTATIONS)
@pytest.mark.parametrize("weight", EVERY_WEIGHT)
def test_every_option_of_the_update_counts(backend, weight, mutation):
    call = routing_call(weight=weight, history="mask", dtype=torch.float64)
    call = unsaturated(call)
    assert changed(call, backend, UPDATE_MUTATIONS[mutation]) > 1e-2


@pytest.mark.parametrize("options", UPDATES_AND_GRADIENTS, ids=option_id)
@pytest.mark.parametrize("weight", EVERY_WEIGHT)
@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=dtype_id)
def test_updates_and_gradients(backend, dtype, weight, options):
    gentle(routing_call(weight=weight, dtype=dtype, **options)).verify(backend)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("softmax_over", SOFTMAX_AXES)
def test_users_without_items(any_backend, softmax_over, padding):
    """Capsules 0 and gradients 0, except where the filled logits leave the coupling 1/K or 1/L."""
    call = routing_call(
        lengths=torch.zeros(5, dtype=torch.int64), softmax_over=softmax_over, padding=padding
    )
    found = call.gradients(backend=any_backend)
    assert all(tensor.isfinite().all() for tensor in found)
    if padding != "fill_before":
        assert all(not tensor.any() for tensor in found)
    else:
        inputs, weight, _ = call.args
        share = 1 / (3 if softmax_over == "capsules" else inputs.shape[1])
        expected = ops.squash((share * inputs).sum(1) @ weight)[:, None].expand(-1, 3, -1)
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_absent_capsules_and_zero_histories(any_backend, weight):
    present = torch.tensor([[False] * 3, [True] * 3, [True, False, True]])
    call = routing_call(b=3, d=4, weight=weight, capsule_mask=present)
    inputs = call.args[0]
    inputs[1] = 0
    capsules, grad, *others = call.gradients(backend=any_backend)
    assert all(tensor.isfinite().all() for tensor in (capsules, grad, *others))
    assert not capsules[0].any()
    assert not grad[0].any()
    assert not capsules[1].any()
    assert not capsules[2, 1].any()
    assert capsules[2, 0].any()


def test_lengths_are_a_mask(backend):
    call = routing_call(history="lengths", softmax_over="inputs")
    lengths = call.options["lengths"]
    mask = torch.arange(call.args[0].shape[1]) < lengths[:, None]
    expected = call(backend=backend, lengths=None, mask=mask)
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(call(backend=backend, lengths=lengths.to(dtype)), expected)


COUPLINGS = [
    {"history": "mask", "padding": padding, "softmax_over": axis}
    for padding in PADDINGS
    for axis in SOFTMAX_AXES
] + [
    {"iterations": 1, "absent_capsules": True, "history": "lengths"},
    {"weight": "per_capsule", "absent_capsules": True, "temperature": 3.0, "dtype": torch.bfloat16},
    {"weight": "votes", "logits": None, "history": "mask"},
]
COUPLINGS_OF_UPDATES = [
    {"weight": "per_position", "history": "mask"},
    {"weight": "per_position", "gradient": "full", "history": "lengths"},
    *({"gradient": "full", "history": "mask", "update": update} for update in UPDATES),
]


@pytest.mark.parametrize("options", COUPLINGS, ids=option_id)
def test_coupling(backend, options):
    unsaturated(routing_call(**options, return_coupling=True)).verify(backend)


@pytest.mark.parametrize("options", COUPLINGS_OF_UPDATES, ids=option_id)
def test_coupling_after_updates(backend, options):
    gentle(routing_call(**options, return_coupling=True)).verify(backend)


def test_coupling_is_a_constant(any_backend):
    call = routing_call(return_coupling=True, dtype=torch.bfloat16).trainable()
    capsules, coupling = call(backend=any_backend)
    assert capsules.requires_grad
    assert not coupling.requires_grad
    assert coupling.dtype is torch.bfloat16


def test_padding_content_does_not_matter(backend):
    """Padded positions hold whatever the pad id maps to; only fill_before looks at it."""
    for padding, axis in itertools.product(("zero_after", "ignore"), SOFTMAX_AXES):
        if (padding, axis) == ("zero_after", "inputs"):
            continue  # there a padded position keeps its share of the softmax
        call = routing_call(history="mask", padding=padding, softmax_over=axis)
        other = call.with_tensors([t.clone() for t in call.tensors()])
        other.args[0][~call.options["mask"]] = 7.0
        assert torch.equal(call(backend=backend), other(backend=backend))


@pytest.mark.parametrize("weight", ["shared", "per_capsule", "per_position", "shared_votes"])
@pytest.mark.parametrize("axis", SOFTMAX_AXES)
@pytest.mark.parametrize("padding", ["zero_after", "ignore"])
def test_the_end_of_a_history_can_be_told_in_several_ways(backend, device, weight, padding, axis):
    """Users enough for groups of short histories, after which kernels may stop."""
    if interpreted(backend) and (weight, padding, axis) != ("shared", "ignore", "inputs"):
        pytest.skip("seconds in Triton's interpreter, and no kernel there stops early")
    call = routing_call(
        b=37, length=9, weight=weight, history="lengths", padding=padding, softmax_over=axis,
        return_coupling=True,
    )  # fmt: skip
    call.verify(backend)
    inputs, lengths = call.args[0], call.options["lengths"]
    real = torch.arange(9) < lengths[:, None]
    expected = call(backend=backend)
    assert not expected[1].mT[~real].any()
    others = [
        {"mask": real},
        {"mask": real.T.contiguous().T},
        {"mask": real.repeat_interleave(2, 1)[:, ::2]},
    ]
    for other in others:
        found = call(backend=backend, lengths=None, **other)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    apart = torch.nn.functional.pad(inputs, (0, 0, 0, 2))[:, :9]
    torch.testing.assert_close(
        call.with_tensors([apart, *call.tensors()[1:]])(backend=backend), expected
    )
    of_cpu = backend == "native" and device == "cpu" and not CUDA_ON_HOST
    if of_cpu and (padding, axis) != ("zero_after", "inputs"):
        unknown = inputs.where(real.unsqueeze(-1), torch.nan)
        found = call.with_tensors([unknown, *call.tensors()[1:]])(backend=backend)
        assert torch.equal(found[0], expected[0])


def test_logits_are_shared_by_the_batch_or_not(backend):
    call = routing_call(logits="one")
    inputs, weight, logits = call.args
    each = ops.dynamic_routing(inputs, weight, logits.repeat(5, 1, 1), backend=backend)
    assert torch.equal(call(backend=backend), each)
    none = ops.dynamic_routing(inputs, weight, num_capsules=3, backend=backend)
    zeros = ops.dynamic_routing(inputs, weight, torch.zeros(1, 3, 6), backend=backend)
    assert torch.equal(none, zeros)


def test_votes_are_inputs_times_the_weight(backend):
    call = routing_call(weight="per_capsule", history="mask", dtype=torch.float64)
    inputs, weight, logits = call.args
    votes = torch.einsum("bli,kid->bkld", inputs, weight)
    found = ops.dynamic_routing(votes, None, logits, **call.options, backend=backend)
    torch.testing.assert_close(found, call(backend=backend), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", GRADIENTS)
def test_gradient_modes_differ(mode):
    call = routing_call(dtype=torch.float64, gradient=mode).map(lambda t: t / 5)
    last = call.gradients(backend="reference", gradient="last")
    found = call.gradients(backend="auto")
    differs = [(a - b).abs().max() > 1e-3 for a, b in zip(found, last, strict=True)]
    assert differs == [False, *[mode == "full"] * 3]


def test_a_gradient_that_nobody_wants_is_not_computed(backend):
    call = routing_call(weight="per_capsule")
    for wanted in ((True, False), (False, True)):
        inputs, weight, logits = call.args
        tensors = [
            t.clone().requires_grad_(w) for t, w in zip((inputs, weight), wanted, strict=True)
        ]
        ops.dynamic_routing(*tensors, logits, backend=backend).sum().backward()
        assert [t.grad is not None for t in tensors] == list(wanted)
    # logits are constants: they need no gradient and get none
    logits = call.args[2].clone().requires_grad_()
    assert not ops.dynamic_routing(*call.args[:2], logits, backend=backend).requires_grad


@pytest.mark.parametrize("weight", ["shared", "per_position"])
@pytest.mark.parametrize("rows", [1, 5])
def test_logits_alone_get_a_full_gradient(backend, weight, rows):
    call = routing_call(weight=weight, dtype=torch.float64, gradient="full")
    call = unsaturated(call)
    inputs, matrix, logits = call.args
    logits = logits[:rows].clone().requires_grad_()
    grads = [
        torch.autograd.grad(
            ops.dynamic_routing(inputs, matrix, logits, gradient="full", backend=name).sum(), logits
        )[0]
        for name in (backend, "reference")
    ]
    assert grads[0].shape == logits.shape
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_votes_shorter_than_the_eps_of_their_norm(backend):
    """torch.nn.functional.normalize divides by 1e-12 then, and has another gradient."""
    call = routing_call(
        weight="votes", dtype=torch.float64, gradient="full", normalize_agreement=True
    )
    call.args[0][:, :, 1] *= 1e-14
    call.args[0][:, :, 2] = 0
    _, *found = call.gradients(backend=backend)
    _, *expected = call.gradients(backend="reference")
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_large_history_and_batch(backend):
    """More users than a block of lanes, more positions than fit a cache line."""
    shape = {"b": some_users(backend, 130), "length": 200, "k": 3, "d_in": 5, "d": 5}
    for weight in WEIGHTS:
        routing_call(weight=weight, history="lengths", **shape).verify(backend)


@pytest.mark.parametrize("softmax_over", SOFTMAX_AXES)
def test_large_history_with_every_update(backend, softmax_over):
    """Several tiles of positions, in which the coupling of the last iteration is read again."""
    shape = {"b": some_users(backend, 33), "length": 150, "k": 3, "d_in": 5, "d": 5}
    options = {"history": "mask", "softmax_over": softmax_over, "normalize_agreement": True}
    for weight, update in zip(("shared", "per_capsule"), UPDATES[1:], strict=True):
        routing_call(weight=weight, update=update, **options, **shape).verify(backend)


@pytest.mark.parametrize("weight", ["shared", "per_capsule"])
def test_wide_normalized_votes(backend, weight):
    """Their lengths come from several chunks of the inputs and of the weight."""
    shape = {"b": 2, "length": 5, "k": 2, "d_in": 40, "d": 70}
    options = {"normalize_agreement": True, "update": "replace"}
    routing_call(weight=weight, **shape, **options).verify(backend)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_large_history_and_batch_with_a_weight_per_position(backend, gradient):
    """Several chunks of positions, the last one short; votes that a group can keep, and more."""
    sizes = {"d_in": 3, "weight": "per_position", "history": "mask"}
    shapes = {"b": 130, "length": 70, "k": 3, "d": 5}, {"b": 3, "length": 200, "k": 8, "d": 24}
    normalize, updates = (False, True), list(zip(SOFTMAX_AXES, UPDATES[::2], strict=True))
    if interpreted(backend):
        shapes, normalize = ({"b": 34, "length": 33, "k": 1, "d": 5},), (True,)
        updates = updates[1:]
    for axis, update in updates:
        options = {"gradient": gradient, "softmax_over": axis, "update": update}
        for shape in shapes:
            call = routing_call(**sizes, **shape, **options)
            for on in normalize:
                options_of_call = {**call.options, "normalize_agreement": on}
                gentle(replace(call, options=options_of_call)).verify(backend)


def test_random_numbers_are_never_drawn(backend):
    call = routing_call()
    state = torch.get_rng_state()
    call(backend=backend)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("squash", SQUASH_FORMS)
def test_inputs_that_the_weight_nearly_annihilates(backend, squash):
    """Their capsules are short, and their norms are not to be lost beside those of the inputs."""
    b, d = some_users(backend, 40), 8
    call = routing_call(b=b, length=9, k=5, d_in=d, d=d, squash=squash)
    inputs, weight, logits = call.args
    left, values, right = torch.linalg.svd(weight)
    values[1:] = 1e-4
    inputs[1:] @= left[:, 1:] @ left[:, 1:].T  # all users but one
    inputs[1:] *= 10
    weight = left @ values.diag() @ right
    replace(call, args=(inputs, weight, logits)).verify(backend)
    together = ops.dynamic_routing(inputs, weight, logits, squash=squash, backend=backend)
    alone = ops.dynamic_routing(inputs[:1], weight, logits[:1], squash=squash, backend=backend)
    assert torch.equal(together[:1], alone), "what is done for the others changes nobody else"

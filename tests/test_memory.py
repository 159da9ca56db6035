"""What the ops read and write: strides, every element of an output, no user's data for another."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import (
    DTYPES,
    EVERY_OP,
    SINGLE_AND_HALF,
    attention_call,
    bridge_call,
    directions_of,
    dtype_id,
    fusion_call,
    interpreted,
    mimnet_call,
    own_programs,
    routing_call,
    some_users,
)
from torch.profiler import profile

WIDE = {
    "dynamic_routing": partial(routing_call, d_in=32, d=32, history="mask"),
    "dynamic_routing_votes": partial(routing_call, d_in=32, d=32, weight="votes"),
    "interest_bridge": partial(bridge_call, d_i=32, d_s=32, d_t=32, h=24),
    "target_attention": partial(attention_call, d=32),
    "multi_granularity_attention": partial(fusion_call, d=32, c=2),
    "mimnet_forward": partial(mimnet_call, d=32, h=24, history="mask"),
}
"""Calls that tensor cores serve, where rows are long enough for loads of 16 bytes."""

every_op = pytest.mark.parametrize("name", EVERY_OP)


def equal(found, expected):
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=False)


def transposed(t):
    """The same values, the memory in the order of the last dimension."""
    return t.movedim(-1, 0).contiguous().movedim(0, -1) if t.dim() > 1 else strided(t)


def strided(t):
    """The same values as every second element of a larger tensor, from an offset on."""
    larger = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), 99, dtype=t.dtype)
    larger[..., 1::2] = t
    return larger[..., 1::2]


def inner_gap(t):
    """The same values, rows further apart than they are long."""
    larger = torch.full((*t.shape[:-1], t.shape[-1] + 3), 99, dtype=t.dtype)
    larger[..., : t.shape[-1]] = t
    return larger[..., : t.shape[-1]]


def unaligned(t):
    """The same values one element after an address that wide loads can take."""
    return torch.cat([t.new_full((1,), 99), t.flatten()])[1:].view(t.shape)


LAYOUTS = {
    "transposed": transposed,
    "strided": strided,
    "rows_apart": inner_gap,
    "unaligned": unaligned,
}


def check_layout(call, layout, backend):
    if interpreted(backend) and layout not in ("transposed", "strided"):
        pytest.skip("addresses are strides times indices in Triton, whatever the layout")

    def change(t):
        return LAYOUTS[layout](t) if t.dim() and t.dtype is not torch.bool else t

    other = call.map(lambda t: change(t) if t.numel() else t)
    assert any(not t.is_contiguous() or t.data_ptr() % 16 for t in other.tensors())
    equal(other.gradients(backend=backend), call.gradients(backend=backend))


@every_op
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=dtype_id)
def test_any_strides(backend, dtype, layout, name):
    check_layout(EVERY_OP[name](b=some_users(backend, 9), dtype=dtype), layout, backend)


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=dtype_id)
def test_any_strides_of_wide_tensors(backend, dtype, layout, name):
    check_layout(WIDE[name](b=3, dtype=dtype), layout, backend)


@every_op
def test_strided_masks_lengths_and_ids(backend, name):
    call = EVERY_OP[name](b=some_users(backend, 9))
    other = call.map(lambda t: t if t.is_floating_point() else strided(t))
    equal(other.gradients(backend=backend), call.gradients(backend=backend))


@every_op
def test_expanded_batch(backend, name):
    """One user's tensors shown many times, with a stride of 0."""
    b = some_users(backend, 9)
    first = EVERY_OP[name](b=b)

    def expand(t):
        return t[:1].expand(t.shape) if t.dim() and t.shape[0] == b else t

    expanded = first.map(expand)
    assert any(0 in t.stride() for t in expanded.tensors())
    contiguous = expanded.map(torch.Tensor.contiguous)
    equal(expanded.gradients(backend=backend), contiguous.gradients(backend=backend))


@every_op
def test_expanded_and_transposed_output_gradients(backend, name):
    """What sum().backward() and a following transpose hand to a backward op."""
    call = EVERY_OP[name]().trainable()
    outputs = [out for out in call.outputs(backend=backend) if out.requires_grad]
    for change in (lambda t: torch.ones(()).expand(t.shape), transposed):
        grads = [change(g) if g.dim() else g for g in directions_of(outputs)]
        found, expected = (
            torch.autograd.grad(
                outputs, call.leaves(), g, retain_graph=True, materialize_grads=True
            )
            for g in (grads, [g.contiguous() for g in grads])
        )
        equal(found, expected)


@every_op
def test_empty_batch(backend, name):
    call = EVERY_OP[name](b=0)
    outputs = call.outputs(backend=backend)
    assert [out.shape for out in outputs] == [
        out.shape for out in call.outputs(backend="reference")
    ]
    gradients = call.gradients(backend=backend)[len(outputs) :]
    for leaf, gradient in zip(call.trainable().leaves(), gradients, strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any(), "no user, no gradient"


def test_poison_reaches_the_outputs_of_the_kernels(backend, poisoned):
    call = EVERY_OP["squash"]()
    with profile() as events:
        call(backend=backend)
    counts = {e.key: e.count for e in events.key_averages()}
    # One tensor is the output; the interpreter of Triton makes some of its own.
    assert counts["aten::fill_"] == counts["aten::empty"] >= 1


@every_op
@pytest.mark.parametrize("b", [1, 5, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_element_of_an_output_is_written(backend, poisoned, dtype, b, name):
    if b > some_users(backend, b) and own_programs(name):
        pytest.skip("more programs of one kind for Triton's interpreter")
    found = EVERY_OP[name](b=b, dtype=dtype).gradients(backend=backend)
    assert all(tensor.isfinite().all() for tensor in found)


@every_op
def test_nothing_is_left_from_a_call_before(backend, name):
    """Kernels keep their working memory: a larger call full of NaN must not be seen by the next."""
    call = EVERY_OP[name]()
    expected = call.gradients(backend=backend)
    nan = EVERY_OP[name](b=some_users(backend, 70)).map(
        lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t
    )
    assert not nan.gradients(backend=backend)[0].isfinite().all()
    equal(call.gradients(backend=backend), expected)


@every_op
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_users_do_not_touch_each_other(backend, bad, name):
    """A user whose numbers are not finite spoils no other user's output and gradient."""
    if interpreted(backend) and bad == torch.inf:
        pytest.skip("spreads in Triton's interpreter where NaN does")
    b = some_users(backend, 19)  # first sizes that nothing but the batch has
    bad_user = b // 2
    call = EVERY_OP[name](b=b)

    def spoil(t):
        if t.is_floating_point() and t.dim() and t.shape[0] == b:
            t = t.clone()
            t[bad_user] = bad
        return t

    good, spoilt = call.gradients(backend=backend), call.map(spoil).gradients(backend=backend)
    others = torch.arange(b) != bad_user
    for mine, other in zip(spoilt, good, strict=True):
        if mine.dim() and mine.shape[0] == b:
            equal([mine[others]], [other[others]])


@every_op
def test_a_user_alone_or_in_a_batch(backend, name):
    """To rounding: sums are ordered the same for everybody."""
    b = 19
    call = EVERY_OP[name](b=b, dtype=torch.float64)
    every = call.outputs(backend=backend)
    for user in (3,) if interpreted(backend) else (0, 3, 18):
        one = call.map(
            lambda t, user=user: t[user : user + 1] if t.dim() and t.shape[0] == b else t
        )
        for mine, other in zip(one.outputs(backend=backend), every, strict=True):
            torch.testing.assert_close(mine[0], other[user], rtol=1e-12, atol=1e-14)


@every_op
@pytest.mark.parametrize("b", [3, 70, 2000])
def test_bit_identical_from_run_to_run_and_for_any_number_of_threads(backend, b, name):
    if interpreted(backend):
        pytest.skip("Triton's interpreter has one thread and one order of programs")
    call = EVERY_OP[name](b=b)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 2, 3, 1):
            torch.set_num_threads(threads)
            runs.append(call.gradients(backend=backend))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        equal(run, runs[0])


@pytest.mark.parametrize("options", [{}, {"gradient": "full", "normalize_agreement": True}])
def test_votes_of_a_weight_per_position_are_never_held(options):
    """Neither as a tensor nor in a kernel's own memory: the process grows by less than that."""
    b, length, k, d = 256, 64, 16, 64
    votes = 4 * b * length * k * d
    code = f"""
import resource, sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from cases import routing_call
torch.set_num_threads(1)
sizes = dict(b={b}, length={length}, k={k}, d_in=8, d={d}, weight="per_position")
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
routing_call(**{{**sizes, "b": 1}}, **{options}).gradients(backend="native")
call = routing_call(**sizes, **{options})
before = peak()
call.gradients(backend="native")
print(peak() - before)
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) < votes / 2


@every_op
def test_inputs_are_left_alone(backend, name):
    call = EVERY_OP[name]()
    copies = [t.clone() for t in call.tensors()]
    call.gradients(backend=backend)
    equal(call.tensors(), copies)
    for out in call.outputs(backend=backend):
        assert all(out.data_ptr() != t.data_ptr() for t in call.tensors())

"""Histories without padding: the same results as with it, for both ops that take histories."""

from itertools import cycle

import pytest
import torch
from cases import (
    CUDA_ON_HOST,
    DTYPES,
    Call,
    dtype_id,
    interpreted,
    mimnet_call,
    offsets_of,
    padded_and_jagged,
    randn,
    routing_call,
    values_of,
)

from mimnet_fast import backends, nn, ops
from mimnet_fast._options import PADDINGS

pytestmark = pytest.mark.skipif(CUDA_ON_HOST, reason="no CUDA kernel for jagged histories")

LOGITS = ("one", "batch", "each", None)
OPTIONS = [
    {},
    {"softmax_over": "inputs"},
    {"weight": "shared_votes", "absent_capsules": True},
    {"weight": "per_capsule", "temperature": 1.5, "final_squash": False},
    {"normalize_agreement": True, "update": "replace"},
    {"gradient": "full", "update": "coupling", "absent_capsules": True},
    {"gradient": "full", "softmax_over": "inputs", "weight": "per_capsule"},
    {"gradient": "full", "normalize_agreement": True},
    {"gradient": "full", "normalize_agreement": True, "weight": "per_capsule"},
    {"weight": "per_position"},
    {"weight": "per_position", "gradient": "full", "absent_capsules": True},
    {
        "weight": "per_position",
        "gradient": "full",
        "normalize_agreement": True,
        "softmax_over": "inputs",
    },
    {"return_coupling": True, "softmax_over": "inputs", "absent_capsules": True},
]
LENGTHS = {
    "skewed": [3, 0, 9, 1, 1, 2, 0, 5, 1, 1, 4, 1, 2, 1, 1, 6, 3, 2, 1, 9, 1, 0, 7] * 2,
    "empty": [0, 0, 0],
    "one": [4],
    "nobody": [],
}
FEW = [2, 0, 19, 1]
"""An empty history, one longer than a tile of positions, and none that ends where a tile does."""
ids = {"ids": lambda o: "-".join(map(str, o.values())) if isinstance(o, dict) else str(o)}


def expect(dense, found, lengths, exact=True):
    """Outputs and gradients of both, of which those by position lose their padding."""
    position = (len(lengths), 9)
    for mine, other in zip(found, dense, strict=True):
        if other.dim() > 1 and other.shape[:2] == position:
            other = values_of(other, lengths)
        elif mine.dim() < other.dim():
            other = values_of(other.mT, lengths).mT
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(mine, other, **tolerance)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("options", OPTIONS, **ids)
def test_routing_equals_the_padded(options, logits, lengths):
    first = "batch" if logits == "each" else logits
    call = routing_call(b=len(lengths), length=9, logits=first, **options)
    dense, jagged = padded_and_jagged(call, lengths, logits == "each")
    # Rows of padding that are not there move the others in the blocks that a gradient is summed in,
    # and for matrices that positions have of their own users are summed as they are routed.
    exact = not (
        options.get("weight") == "per_position"
        or (options.get("gradient") and options.get("normalize_agreement"))
    )
    found = jagged.gradients(backend="native")
    expect(dense.gradients(backend="native"), found, lengths, exact)


@pytest.mark.parametrize(
    "options",
    [
        {"weight": "per_position"},
        {"weight": "per_position", "gradient": "full", "softmax_over": "inputs"},
        {"weight": "per_position", "gradient": "full", "update": "coupling"},
        {"weight": "per_capsule", "gradient": "full", "normalize_agreement": True},
    ],
    **ids,
)
def test_votes_too_many_to_keep(options):
    """Chunks of positions, some of which no history of a group reaches."""
    lengths = [140, 0, 5, 33, 64, 32, *range(1, 30, 3), 96, 65]
    call = routing_call(
        b=len(lengths), length=140, k=8, d=32, logits="one", dtype=torch.float64, **options
    )
    dense, jagged = padded_and_jagged(call, lengths)
    expected, found = (each.gradients(backend="native") for each in (dense, jagged))
    for mine, other in zip(found, expected, strict=True):
        if other.shape[:2] == (len(lengths), 140):
            other = values_of(other, lengths)
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("logits", LOGITS[:3])
@pytest.mark.parametrize("table", [None, torch.int32, torch.int64])
def test_mimnet_equals_the_padded(table, logits, lengths):
    call = mimnet_call(b=len(lengths), length=9, one_logits=logits == "one", ids=table)
    dense, jagged = padded_and_jagged(call, lengths, logits == "each")
    found, other = jagged.gradients(backend="native"), dense.gradients(backend="native")
    users = 5 if table is None else 4  # then parameters, whose sums follow the order of histories
    expect(other[:users], found[:users], lengths)
    expect(other[users:], found[users:], lengths, exact=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("build", [routing_call, mimnet_call])
def test_verified(backend, poisoned, build, dtype):
    lengths = FEW if interpreted(backend) else LENGTHS["skewed"]
    call = build(b=len(lengths), length=max(lengths), dtype=dtype)
    padded_and_jagged(call, lengths, True)[1].verify(backend)


@pytest.mark.parametrize(
    ("options", "logits"),
    [*zip(OPTIONS, cycle(LOGITS)), ({"gradient": "full"}, "one")],
    **ids,
)
def test_options_verified(backend, options, logits):
    first = "batch" if logits == "each" else logits
    call = routing_call(b=len(FEW), length=max(FEW) + 1, logits=first, **options)
    padded_and_jagged(call, FEW, logits == "each")[1].verify(backend)


@pytest.mark.parametrize(
    ("d", "table", "logits"),
    [(4, torch.int32, "one"), (33, None, "each"), (33, torch.int64, "batch")],
)
def test_mimnet_verified(backend, d, table, logits):
    """Widths that one program of Triton's serves and that it does not."""
    length = max(FEW) + 1
    call = mimnet_call(b=4, length=length, d=d, one_logits=logits == "one", ids=table)
    padded_and_jagged(call, FEW, logits == "each")[1].verify(backend)


@pytest.mark.parametrize("options", [{}, {"gradient": "full"}], **ids)
@pytest.mark.parametrize("lengths", [FEW, *LENGTHS.values()], ids=["few", *LENGTHS])
def test_every_element_is_written(backend, poisoned, lengths, options):
    if interpreted(backend) and len(lengths) > len(FEW):
        pytest.skip("more programs of one kind for Triton's interpreter")
    call = routing_call(b=len(lengths), length=max(lengths, default=0) + 1, logits="one", **options)
    found = padded_and_jagged(call, lengths)[1].gradients(backend=backend, return_coupling=True)
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("options", OPTIONS, **ids)
def test_reference_equals_the_padded(options):
    lengths = LENGTHS["skewed"]
    call = routing_call(b=len(lengths), length=9, dtype=torch.float64, **options)
    dense, jagged = padded_and_jagged(call, lengths)
    dense, found = (c.gradients(backend="reference") for c in (dense, jagged))
    expect(dense, found, lengths, exact=False)


@pytest.mark.parametrize("padding", PADDINGS)
def test_there_is_no_padding(padding):
    lengths = LENGTHS["skewed"]
    call = routing_call(b=len(lengths), length=9, softmax_over="inputs")
    _, jagged = padded_and_jagged(call, lengths)
    for backend in ("native", "reference"):
        assert torch.equal(jagged(backend=backend, padding=padding), jagged(backend=backend))


def test_users_do_not_touch_each_other(backend):
    call = routing_call(b=len(FEW), length=max(FEW), gradient="full", normalize_agreement=False)
    _, jagged = padded_and_jagged(call, FEW, True)
    at = 2  # the first of the third user
    spoilt = jagged.map(torch.clone)
    spoilt.args[0][at] = torch.nan
    users, rows = torch.tensor([0, 1, 3]), torch.tensor([0, 1, 21])
    (out, x_grad, *_), (good, good_x_grad, *_) = (
        each.gradients(backend=backend) for each in (spoilt, jagged)
    )
    assert torch.equal(out[users], good[users])
    assert torch.equal(x_grad[rows], good_x_grad[rows])


def test_the_order_of_users_and_their_number_of_threads_change_nothing():
    lengths = LENGTHS["skewed"] * 4
    b = len(lengths)
    call = routing_call(b=b, length=9, logits="one", gradient="full")
    inputs, weight, logits = call.args
    values, offsets = values_of(inputs, lengths), offsets_of(lengths)
    expected = ops.dynamic_routing(values, weight, logits, offsets=offsets, backend="native")
    order = torch.randperm(b).tolist()
    shuffled = [lengths[i] for i in order]
    values = values_of(inputs[order], shuffled)
    found = ops.dynamic_routing(
        values, weight, logits, offsets=offsets_of(shuffled), backend="native"
    )
    assert torch.equal(found, expected[order])
    before = torch.get_num_threads()
    jagged = padded_and_jagged(call, lengths)[1]
    one = jagged.gradients(backend="native")
    try:
        torch.set_num_threads(3)
        three = jagged.gradients(backend="native")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("build", [routing_call, mimnet_call])
def test_strided_values_and_offsets(backend, build, offset_dtype):
    lengths = FEW if interpreted(backend) else LENGTHS["skewed"]
    call = build(b=len(lengths), length=max(lengths))
    _, jagged = padded_and_jagged(call, lengths, True)
    offsets = offsets_of(lengths, offset_dtype)
    strided = torch.stack([offsets, offsets + 99], 1)[:, 0]
    values, *others = jagged.args
    other = Call(
        jagged.op, (values.mT.contiguous().mT, *others), {**jagged.options, "offsets": strided}
    )
    found, expected = other.gradients(backend=backend), jagged.gradients(backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"gradient": "full"}], **ids)
def test_gradcheck(options):
    lengths = [2, 0, 3]
    call = routing_call(b=3, length=3, dtype=torch.float64, final_squash=False, **options)
    values, weight, logits = padded_and_jagged(call, lengths, True)[1].trainable().args
    values = (values.detach() / 10).requires_grad_()
    logits.requires_grad_(bool(options))

    def run(*tensors):
        return ops.dynamic_routing(
            *tensors, offsets=offsets_of(lengths), iterations=1, backend="native", **options
        )

    inputs = (values, weight, logits)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("build", [routing_call, mimnet_call])
def test_double_backward_is_the_reference(build):
    lengths = [2, 0, 3, 9]
    _, jagged = padded_and_jagged(build(b=4, length=9, dtype=torch.float64), lengths, True)
    found = []
    for backend in ("native", "reference"):
        call = jagged.trainable()
        out = call(backend=backend)
        first = torch.autograd.grad(out.sum(), call.args[0], create_graph=True, allow_unused=True)[
            0
        ]
        found.append(first.detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("build", [routing_call, mimnet_call])
def test_compiled_with_any_number_of_values_and_users(build):
    def run(values, offsets, *others):
        return op(values, *others, offsets=offsets, backend="native")

    op = build(b=1).op
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ([3, 0, 9], [5, 1], [2] * 20):
        _, jagged = padded_and_jagged(build(b=len(lengths), length=9), lengths, True)
        values, *others = jagged.args
        offsets = offsets_of(lengths)
        assert torch.equal(compiled(values, offsets, *others), run(values, offsets, *others))


def test_opcheck_and_export():
    lengths = [3, 0, 9, 2]
    _, jagged = padded_and_jagged(routing_call(b=4, length=9), lengths, True)
    values, weight, logits = jagged.trainable().args
    op = torch.ops.mimnet_fast.dynamic_routing.default
    rest = (3, 3, 0, 2, 0, False, False, True, True, 1.0, 0, 1e-8, 1.0)
    torch.library.opcheck(op, (values, weight, logits.detach(), offsets_of(lengths), None, *rest))

    class Routing(torch.nn.Module):
        def forward(self, values, weight, logits, offsets):
            return ops.dynamic_routing(values, weight, logits, offsets=offsets, backend="native")

    args = (*jagged.args, offsets_of(lengths))
    exported = torch.export.export(Routing(), args).module()
    assert torch.equal(exported(*args), Routing()(*args))


def test_compiled_offsets_of_mimnet_are_bounded(backend, poisoned):
    call = mimnet_call(b=3, length=9, one_logits=True)
    _, jagged = padded_and_jagged(call, [3, 0, 9])

    def run(history, *others):
        return jagged.op(history, *others[:-1], offsets=others[-1], backend=backend)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    history, *others = jagged.args
    history.requires_grad_()
    for wrong in ([5, -(2**40), 2**40, 1], [0, 3, 3, 99]):
        out = compiled(history, *others, torch.tensor(wrong))
        (grad,) = torch.autograd.grad(out.sum(), history)
        assert out.isfinite().all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("each", [True, False])
def test_compiled_offsets_are_bounded(backend, poisoned, each):
    """Where Python sees no values, wrong ones touch no memory but the tensor's."""
    call = routing_call(b=3, length=9, gradient="full")
    _, jagged = padded_and_jagged(call, [3, 0, 9], each)

    def run(values, weight, logits, offsets):
        return jagged.op(values, weight, logits, offsets=offsets, gradient="full", backend=backend)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for wrong in ([5, -(2**40), 2**40, 1], [12, 12, 0, 0], [0, 3, 3, 99]):
        values, weight, logits = jagged.trainable().args
        out = compiled(values, weight, logits, torch.tensor(wrong))
        out.sum().backward()
        found = out, values.grad, weight.grad, logits.grad
        assert all(tensor.isfinite().all() for tensor in found)


def test_nested_tensor_is_taken_without_a_copy():
    lengths = [3, 1, 9]
    call = padded_and_jagged(routing_call(b=3, length=9), lengths, True)[1]
    values, weight, logits = call.args
    nested = torch.nested.nested_tensor_from_jagged(values, offsets_of(lengths))
    assert nested.values().data_ptr() == values.data_ptr()
    assert torch.equal(ops.dynamic_routing(nested, weight, logits), call())
    leaf = nested.detach().requires_grad_()
    ops.dynamic_routing(leaf, weight, logits).sum().backward()
    values = values.requires_grad_()
    ops.dynamic_routing(values, weight, logits, offsets=offsets_of(lengths)).sum().backward()
    assert torch.equal(leaf.grad.values(), values.grad)
    for arguments, message in [
        ({"offsets": offsets_of(lengths)}, "offsets: got them next to a nested tensor"),
        ({"lengths": torch.tensor(lengths)}, "offsets: got them together with mask or lengths"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.dynamic_routing(nested, weight, logits, **arguments)
    with pytest.raises(ValueError, match="dimension 2 is ragged"):
        ops.dynamic_routing(nested.transpose(1, 2), weight, logits)
    holes = torch.nested.nested_tensor_from_jagged(
        values, torch.tensor([0, 4, 13]), lengths=torch.tensor([2, 5])
    )
    with pytest.raises(ValueError, match="holes between its rows"):
        ops.dynamic_routing(holes, weight, logits)
    strided = torch.nested.nested_tensor([values[:3], values[3:]], layout=torch.strided)
    with pytest.raises(ValueError, match=r"need torch\.jagged"):
        ops.dynamic_routing(strided, weight, logits)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"offsets": torch.tensor([1, 3, 12])}, ValueError, "offsets: start at 1, need 0"),
        ({"offsets": torch.tensor([0, 3, 11])}, ValueError, "offsets: end at 11, need T = 12"),
        ({"offsets": torch.tensor([0, 8, 3, 12])}, ValueError, "offsets: decrease by 5"),
        ({"offsets": torch.tensor([0, 2, 12])}, ValueError, "history of 10 items, .* L = 9"),
        ({"offsets": torch.tensor([0.0, 12.0])}, TypeError, "need int64 or int32"),
        ({"offsets": torch.tensor([[0, 12]])}, ValueError, r"need \[B\+1\]"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "got no value"),
        ({"offsets": [0, 12]}, TypeError, "offsets: got list, need a tensor"),
        ({"lengths": torch.tensor([3, 9])}, ValueError, "together with mask or lengths"),
        ({"mask": torch.ones(2, 9, dtype=torch.bool)}, ValueError, "together with mask or lengths"),
        ({"logits": torch.zeros(3, 11)}, ValueError, r"logits: got shape \[3, 11\], need \[K, T\]"),
        ({"logits": torch.zeros(4, 3, 9)}, ValueError, r"logits: got shape \[4, 3, 9\]"),
        ({"inputs": torch.zeros(2, 9, 4)}, ValueError, r"need \[T, D_in\] with offsets"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "inputs": torch.zeros(12, 4),
        "weight": torch.zeros(4, 5),
        "logits": torch.zeros(1, 3, 9),
        "offsets": torch.tensor([0, 3, 12]),
        **change,
    }
    with pytest.raises(error, match=message):
        ops.dynamic_routing(**arguments)


def test_what_has_no_kernel_goes_to_the_reference():
    lengths = [3, 0, 9]
    for call, option in [
        (routing_call(b=3, length=9, weight="per_position"), "a weight per position and capsule"),
        (
            routing_call(b=3, length=9, gradient="full", normalize_agreement=True),
            'a weight, gradient="full" and normalize_agreement',
        ),
    ]:
        _, jagged = padded_and_jagged(call, lengths)
        found = backends.explain(jagged.op, *jagged.args, **jagged.options)
        assert not found["native"]
        message = f"no Triton kernel for jagged histories with {option} in this version"
        assert message in found["triton"]


def test_layer():
    lengths = [3, 1, 9]
    values, offsets = randn(13, 4, dtype=torch.float32), offsets_of(lengths)
    layer = nn.DynamicRouting(4, 5, 3)
    nested = torch.nested.nested_tensor_from_jagged(values, offsets)
    found = []
    for call in (lambda: layer(values, offsets=offsets), lambda: layer(nested)):
        torch.manual_seed(0)
        found.append(call())
    assert torch.equal(*found)
    by_position = nn.DynamicRouting(4, 5, 3, weight="per_position", length=12)
    assert by_position(nested).shape == (3, 3, 5)


def test_padding_takes_no_memory():
    """One long history among many: padded, the batch would not fit into memory at all."""
    lengths = [1] * 400_000 + [100_000]
    values = torch.zeros(sum(lengths), 2).requires_grad_()
    weight = torch.zeros(2, 2).requires_grad_()
    out = ops.dynamic_routing(
        values, weight, num_capsules=2, offsets=offsets_of(lengths), backend="native"
    )
    out.sum().backward()
    assert values.grad.shape == values.shape


def test_no_items_and_a_table_without_rows(backend):
    call = mimnet_call(b=2, length=9, ids=torch.int64, one_logits=True)
    _, *others = call.args
    options = {"offsets": torch.tensor([0, 0, 0]), "backend": backend}
    nothing = torch.zeros(0, dtype=torch.int64)
    table = call.options["table"]
    expected = call.op(nothing, *others, table=table, **{**options, "backend": "reference"})
    for rows in (table, table[:0]):
        torch.testing.assert_close(call.op(nothing, *others, table=rows, **options), expected)

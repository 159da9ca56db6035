"""The whole second stage of MIMNet as one op."""

import itertools

import pytest
import torch
from cases import (
    CUDA_ON_HOST,
    DTYPES,
    SINGLE_AND_HALF,
    Call,
    dtype_id,
    interpreted,
    mimnet_call,
    shape_id,
    some_users,
)

from mimnet_fast import BackendUnavailable, ops
from mimnet_fast._options import PADDINGS
from mimnet_fast.ops._autograd import SUFFIX

SHAPES = [
    {"b": 33, "length": 20, "k": 7, "d": 10, "h": 50},
    {"b": 1, "length": 1, "k": 1, "d": 1, "h": 1},
    {"b": 0, "length": 5, "k": 3, "d": 4, "h": 4},
    {"b": 17, "length": 1, "k": 5, "d": 3, "h": 9},
    {"b": 2, "length": 9, "k": 1, "d": 8, "h": 13},
    {"b": 16, "length": 3, "k": 9, "d": 33, "h": 21},
    {"b": 1, "length": 30, "k": 4, "d": 64, "h": 64},
    {"b": 130, "length": 4, "k": 2, "d": 5, "h": 7},
    {"b": 3, "length": 150, "k": 4, "d": 10, "h": 9},
]
IDS = [None, torch.int64, torch.int32]


def ids_id(dtype):
    return "embedded" if dtype is None else dtype_id(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("ids", IDS, ids=ids_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_shapes(backend, dtype, ids, shape):
    if interpreted(backend) and ids is torch.int32:
        pytest.skip("as int64 in Triton's interpreter, but slow")
    shape = {**shape, "b": some_users(backend, shape["b"])}
    mimnet_call(ids=ids, history="lengths", dtype=dtype, **shape).verify(backend)


@pytest.mark.parametrize(
    ("history", "padding"),
    [("all", "zero_after"), *itertools.product(("mask", "lengths"), PADDINGS)],
)
@pytest.mark.parametrize("ids", IDS[:2], ids=ids_id)
@pytest.mark.parametrize("one_logits", [False, True], ids=["logits", "one_logits"])
@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=dtype_id)
def test_paddings(backend, dtype, one_logits, ids, history, padding):
    if interpreted(backend) and one_logits == (ids is None):
        pytest.skip("every second is enough for Triton's interpreter, which is slow")
    mimnet_call(
        history=history, padding=padding, ids=ids, one_logits=one_logits, dtype=dtype
    ).verify(backend)


@pytest.mark.parametrize("ids", IDS[:2], ids=ids_id)
@pytest.mark.parametrize("padding", ["zero_after", "ignore"])
def test_the_end_of_a_history_can_be_told_in_several_ways(backend, device, padding, ids):
    """Users enough for groups of short histories, after which kernels may stop."""
    if interpreted(backend) and (padding, ids) != ("ignore", None):
        pytest.skip("seconds in Triton's interpreter, and no kernel there stops early")
    call = mimnet_call(b=37, length=9, ids=ids, history="lengths", padding=padding)
    call.verify(backend)
    lengths = call.options["lengths"]
    real = torch.arange(9) < lengths[:, None]
    expected = call(backend=backend)
    for mask in (real, real.T.contiguous().T, real.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(call(backend=backend, lengths=None, mask=mask), expected)
    history, *others = call.args
    wide = torch.nn.functional.pad(history, (0,) * (3 if ids is None else 1) + (2,))
    apart = Call(call.op, (wide[:, :9], *others), call.options)
    torch.testing.assert_close(apart(backend=backend), expected)
    if backend == "native" and device == "cpu" and not CUDA_ON_HOST and ids is None:
        unknown = history.where(real.unsqueeze(-1), torch.nan)
        assert torch.equal(
            Call(call.op, (unknown, *others), call.options)(backend=backend), expected
        )


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("bias_dims", [0, 1], ids=["scalar_bias", "vector_bias"])
def test_iterations(backend, bias_dims, iterations):
    mimnet_call(history="mask", iterations=iterations, bias_dims=bias_dims).verify(backend)


@pytest.mark.parametrize("ids", IDS[:2], ids=ids_id)
def test_is_its_parts(backend, ids):
    call = mimnet_call(history="mask", ids=ids, dtype=torch.float64)
    history, source, item, prototype, p, logits = call.args
    mask = call.options["mask"]
    if ids is not None:
        history = call.options["table"][history]
    interests = ops.dynamic_routing(history, p.routing_weight, logits, mask=mask, backend=backend)
    transferred = ops.interest_bridge(interests, source, p.w1, p.b1, p.w2, p.b2, backend=backend)
    user = ops.multi_granularity_attention(
        item, prototype, transferred, p.fine, p.coarse, p.fusion_weight, p.fusion_bias,
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(call(backend=backend), (user * item).sum(-1), rtol=1e-9, atol=1e-12)


def test_every_argument_counts(backend):
    call = mimnet_call(history="mask", dtype=torch.float64, iterations=2)
    expected = call(backend=backend)
    cancel = {"fine key_bias": 10, "coarse key_bias": 14}.values()
    for i, tensor in enumerate(call.tensors()):
        tensors = call.tensors()
        if tensor.dtype is torch.bool:
            tensors[i] = ~tensor
        else:
            tensors[i] = tensor + torch.randn_like(tensor) * tensor.abs().max()
        distance = (call.with_tensors(tensors)(backend=backend) - expected).abs().max()
        assert distance < 1e-9 if i in cancel else distance > 1e-5, i


@pytest.mark.parametrize(
    "options",
    [{"iterations": 1}, {"iterations": 2}, {"padding": "fill_before"}, {"mask": None}],
    ids=str,
)
def test_every_option_counts(backend, options):
    call = mimnet_call(history="mask", dtype=torch.float64)
    assert (call(backend=backend, **options) - call(backend=backend)).abs().max() > 1e-3


def test_ids_are_rows_of_the_table(backend):
    for dtype in (torch.int32, torch.int64):
        call = mimnet_call(history="lengths", ids=dtype)
        history, *others = call.args
        table = call.options["table"]
        options = {"lengths": call.options["lengths"]}
        embedded = Call(call.op, (table[history.long()], *others), options)
        mine, other = call.gradients(backend=backend), embedded.gradients(backend=backend)
        assert torch.equal(mine[0], other[0])
        for one, two in zip(mine[1:], other[2:], strict=True):
            assert torch.equal(one, two)


def test_table_is_frozen_or_the_reference_trains_it(backend):
    call = mimnet_call(ids=torch.int64)
    table = call.options["table"].requires_grad_()
    with pytest.raises(BackendUnavailable, match="table is frozen"):
        call(backend=backend)
    call().sum().backward()
    assert table.grad is not None
    assert table.grad.any()


@pytest.mark.parametrize("padding", PADDINGS)
def test_users_without_items(any_backend, padding):
    call = mimnet_call(lengths=torch.zeros(5, dtype=torch.int64), padding=padding)
    assert all(tensor.isfinite().all() for tensor in call.gradients(backend=any_backend))


def test_zero_embeddings(any_backend):
    call = mimnet_call()
    zeros = call.with_tensors([torch.zeros_like(t) for t in call.tensors()])
    assert all(not tensor.any() for tensor in zeros.gradients(backend=any_backend)[:1])
    assert all(tensor.isfinite().all() for tensor in zeros.gradients(backend=any_backend))


def test_compiled_code_checks_ids(backend, device):
    """Where Python sees no values the kernel does, before it reads memory.

    CUDA kernels cannot raise without somebody waiting for them: they spoil the user's own rating.
    """
    call = mimnet_call(ids=torch.int64)
    history, *others = call.args
    compiled = torch.compile(call.op, backend="aot_eager", fullgraph=True)
    options = {**call.options, "backend": backend}
    expected = call(backend=backend)
    torch.testing.assert_close(compiled(history, *others, **options), expected)
    for wrong in (-1, 23, 2**40):
        bad = history.clone()
        bad[2, 3] = wrong
        if device == "cuda" or CUDA_ON_HOST:
            found = compiled(bad, *others, **options)
            assert found.isnan().nonzero().tolist() == [[2]]
            assert torch.equal(found[found.isfinite()], expected[found.isfinite()])
        else:
            with pytest.raises((RuntimeError, ValueError), match=f"history: got id {wrong}"):
                compiled(bad, *others, **options)


def test_op_refuses_what_does_not_fit(backend, device):
    """Callers of `torch.ops`, exported programs among them, are not looked after by Python."""
    if backend != "native":
        pytest.skip("of the binding that compiled kernels share")
    call = mimnet_call(history="mask", ids=torch.int64)
    history, source, item, prototype, parameters, logits = call.args
    table, mask = call.options["table"], call.options["mask"]
    fitting = [history, table, source, item, prototype, *parameters.flat(), logits, mask]
    op = torch.ops.mimnet_fast.mimnet_forward
    assert op(*fitting, 3, 0, False)[0].shape == source.shape[:1]
    for position, tensor in enumerate(fitting):
        wrong_dtype = tensor.half() if tensor.is_floating_point() else tensor.float()
        for wrong in (
            wrong_dtype,
            torch.cat([tensor, tensor]) if tensor.dim() else tensor[None, None],
        ):
            if tensor is table and wrong.dtype == table.dtype:
                continue  # a larger table fits
            with pytest.raises(RuntimeError, match="do not fit each other"):
                op(*fitting[:position], wrong, *fitting[position + 1 :], 3, 0, False)
    for options in ((0, 0), (3, -1), (3, 3)):
        with pytest.raises(RuntimeError, match="do not fit each other"):
            op(*fitting, *options, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("history", ["mask", "lengths"])
def test_kept_gradient_is_what_backward_finds_without(backend, device, history, dtype):
    """Users with a gradient of 0 and of the other sign among them."""
    b, k, d, h = 37, 3, 10, 7
    call = mimnet_call(b=b, k=k, d=d, h=h, history=history, dtype=dtype)
    embedded, *rest, parameters, logits = call.args
    inputs = [embedded, None, *rest, *parameters.flat(), logits, next(iter(call.options.values()))]
    op = torch.ops.mimnet_fast
    suffix = SUFFIX[backend]
    forward = getattr(op, f"mimnet_forward{suffix}")
    if backend == "triton" or device == "cuda" or CUDA_ON_HOST:
        with pytest.raises(RuntimeError, match="only the CPU keeps"):
            forward(*inputs, 3, 0, True)
        return
    without, kept = forward(*inputs, 3, 0, False), forward(*inputs, 3, 0, True)
    assert without[3].shape == (0,)
    assert kept[3].shape == (b, k, h)
    grad = torch.randn(b, dtype=dtype)
    grad[::5] = 0
    found, expected = (
        op.mimnet_forward_backward(grad, *results[1:], *inputs, 3, 0, 2**19 - 1)
        for results in (kept, without)
    )
    assert all(torch.equal(a, b) for a, b in zip(kept[:3], without[:3], strict=True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)

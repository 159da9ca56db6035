"""The multi-granularity attention op."""

import pytest
import torch
from cases import DTYPES, Call, dtype_id, fusion_call, shape_id, some_users

from mimnet_fast import ops

SHAPES = [
    {"b": 33, "k": 7, "d": 10},
    {"b": 1, "k": 1, "d": 1},
    {"b": 0, "k": 3, "d": 4},
    {"b": 17, "k": 1, "d": 5},
    {"b": 1, "k": 9, "d": 33},
    {"b": 130, "k": 3, "d": 4},
    {"b": 7, "k": 4, "d": 10, "c": 20},
    {"b": 0, "k": 4, "d": 10, "c": 3},
    {"b": 3, "k": 2, "d": 64, "c": 1},
    {"b": 3, "k": 2, "d": 5, "c": 0},
]


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("return_gate", [False, True], ids=["output", "gate"])
@pytest.mark.parametrize("bias_dims", [0, 1], ids=["scalar_bias", "vector_bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_matches_the_reference(backend, dtype, bias_dims, return_gate, shape):
    shape = {**shape, "b": some_users(backend, shape["b"])}
    fusion_call(bias_dims=bias_dims, return_gate=return_gate, dtype=dtype, **shape).verify(backend)


def test_every_argument_counts(backend):
    call = fusion_call(dtype=torch.float64)
    expected = call(backend=backend)
    key_biases = (4, 8)
    for i, tensor in enumerate(call.tensors()):
        tensors = call.tensors()
        tensors[i] = tensor + torch.randn_like(tensor)
        distance = (call.with_tensors(tensors)(backend=backend) - expected).abs().max()
        assert distance < 1e-12 if i in key_biases else distance > 1e-3, i


def test_gate_mixes_the_two_attentions(backend):
    """Gate 0 is the item's attention, gate 1 the prototype's."""
    call = fusion_call(dtype=torch.float64)
    item, prototype, interests, fine, coarse, weight, bias = call.args
    for shift, query, weights in ((-1e3, item, fine), (1e3, prototype, coarse)):
        out, gate = ops.multi_granularity_attention(
            item, prototype, interests, fine, coarse, weight, bias + shift,
            return_gate=True, backend=backend,
        )  # fmt: skip
        expected = ops.target_attention(query, interests, *weights, backend=backend)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gate, torch.full_like(gate, shift > 0))


def test_gate_is_a_sigmoid_of_item_then_prototype(backend):
    call = fusion_call(dtype=torch.float64, return_gate=True)
    item, prototype, *_, weight, bias = call.args
    _, gate = call(backend=backend)
    expected = torch.sigmoid(item @ weight[:6] + prototype @ weight[6:] + bias)
    torch.testing.assert_close(gate, expected, rtol=1e-12, atol=1e-12)


def test_gradient_through_the_gate_alone(backend):
    call = fusion_call(c=3, dtype=torch.float64, return_gate=True).trainable()
    grads = {}
    for name in (backend, "reference"):
        _, gate = call(backend=name)
        grads[name] = torch.autograd.grad(
            gate.square().sum(), call.leaves(), allow_unused=True, materialize_grads=True
        )
    assert grads[backend][0].any()
    for mine, other in zip(grads[backend], grads["reference"], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_candidates_are_independent(backend):
    call = fusion_call(c=5, dtype=torch.float64)
    item, prototype, *others = call.args
    every = call(backend=backend)
    for i in range(5):
        one = Call(call.op, (item[:, i], prototype[:, i], *others))(backend=backend)
        torch.testing.assert_close(one, every[:, i], rtol=1e-12, atol=1e-13)


def test_large_inputs_stay_finite(backend):
    call = fusion_call(return_gate=True).map(lambda t: t * 1e4)
    assert all(tensor.isfinite().all() for tensor in call.gradients(backend=backend))


def test_lists_of_weights(backend):
    call = fusion_call()
    item, prototype, interests, fine, coarse, *fusion = call.args
    found = ops.multi_granularity_attention(
        item, prototype, interests, list(fine), list(coarse), *fusion, backend=backend
    )
    assert torch.equal(found, call(backend=backend))

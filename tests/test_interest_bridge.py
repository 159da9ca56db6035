"""The interest bridge op."""

import pytest
import torch
from cases import DTYPES, bridge_call, dtype_id, shape_id, some_users

from mimnet_fast import ops

SHAPES = [
    {"b": 33, "k": 7, "d_i": 10, "d_s": 10, "d_t": 10, "h": 50},
    {"b": 1, "k": 1, "d_i": 1, "d_s": 1, "d_t": 1, "h": 1},
    {"b": 0, "k": 3, "d_i": 4, "d_s": 5, "d_t": 6, "h": 7},
    {"b": 17, "k": 1, "d_i": 3, "d_s": 8, "d_t": 2, "h": 9},
    {"b": 1, "k": 5, "d_i": 33, "d_s": 33, "d_t": 33, "h": 13},
    {"b": 4, "k": 2, "d_i": 64, "d_s": 64, "d_t": 64, "h": 64},
    {"b": 130, "k": 2, "d_i": 5, "d_s": 3, "d_t": 4, "h": 17},
    {"b": 70, "k": 3, "d_i": 32, "d_s": 32, "d_t": 32, "h": 20},
    {"b": 5, "k": 9, "d_i": 32, "d_s": 32, "d_t": 32, "h": 40},
    {"b": 2, "k": 17, "d_i": 32, "d_s": 32, "d_t": 32, "h": 33},
    {"b": 65, "k": 1, "d_i": 64, "d_s": 64, "d_t": 64, "h": 17},
    {"b": 65, "k": 1, "d_i": 128, "d_s": 128, "d_t": 128, "h": 8},
    {"b": 3, "k": 8, "d_i": 128, "d_s": 128, "d_t": 128, "h": 50},
]


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("per_interest", [False, True], ids=["per_user", "per_interest"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_matches_the_reference(backend, dtype, per_interest, shape):
    if shape["d_t"] > 16:
        shape = {**shape, "b": some_users(backend, shape["b"])}
    bridge_call(per_interest=per_interest, dtype=dtype, **shape).verify(backend)


def test_source_is_a_row_vector(backend):
    """Row i*D_t+j of w2 generates entry (i, j), and the source multiplies from the left."""
    matrix = torch.arange(6.0).reshape(2, 3)
    interests, source = torch.zeros(1, 1, 4), torch.tensor([[10.0, 1.0]])
    w1, b1, w2 = torch.zeros(5, 4), torch.zeros(5), torch.zeros(6, 5)
    out = ops.interest_bridge(interests, source, w1, b1, w2, matrix.flatten(), backend=backend)
    assert out.tolist() == [[[3.0, 14.0, 25.0]]]


def test_source_of_a_user_is_that_of_each_interest(backend):
    call = bridge_call(d_i=5, d_s=5, dtype=torch.float64)
    interests, source, *weights = call.args
    each = source[:, None].expand(-1, 3, -1)
    found = ops.interest_bridge(interests, each, *weights, backend=backend)
    torch.testing.assert_close(found, call(backend=backend), rtol=1e-12, atol=1e-12)


def test_every_argument_counts(backend):
    call = bridge_call(dtype=torch.float64)
    expected = call(backend=backend)
    for i, tensor in enumerate(call.tensors()):
        tensors = call.tensors()
        tensors[i] = tensor + 1
        assert (call.with_tensors(tensors)(backend=backend) - expected).abs().max() > 1e-2


def test_dead_hidden_units(backend):
    """The relu and its slope are 0, also where its argument is exactly 0."""
    call = bridge_call(dtype=torch.float64)
    interests, source, w1, b1, w2, b2 = call.args
    b1 = b1.clone()
    b1[0], b1[1] = -1e3, 0
    w1 = w1.clone()
    w1[1] = 0
    dead = call.with_tensors([interests, source, w1, b1, w2, b2])
    dead.verify(backend)
    found = dead.gradients(backend=backend)
    for gradient in (found[3][:2], found[4][:2], found[5][:, :2]):
        assert not gradient.any()


def test_odd_hidden_sizes(backend):
    for h in range(1, 20):
        bridge_call(b=3, k=2, h=h).verify(backend)


def test_zero_interests_give_the_bias_matrix(backend):
    call = bridge_call(dtype=torch.float64)
    _, source, w1, b1, w2, b2 = call.args
    out = ops.interest_bridge(
        torch.zeros(5, 3, 4).double(), source, w1, torch.zeros_like(b1), w2, b2, backend=backend
    )
    torch.testing.assert_close(out, (source @ b2.reshape(5, 6))[:, None].expand(-1, 3, -1))


def test_outputs_of_half_precision_are_rounded_once(backend):
    """Many small terms: sums kept in half precision would stall."""
    ones = torch.ones
    h = 4096
    out = ops.interest_bridge(
        ones(1, 1, 1).bfloat16(), ones(1, 1).bfloat16(), ones(h, 1).bfloat16(),
        torch.zeros(h).bfloat16(), ones(1, h).bfloat16(), torch.zeros(1).bfloat16(),
        backend=backend,
    )  # fmt: skip
    assert out.item() == h

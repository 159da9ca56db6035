"""The target attention op."""

import pytest
import torch
from cases import DTYPES, SINGLE_AND_HALF, Call, attention_call, dtype_id, shape_id

from mimnet_fast import BackendUnavailable, ops

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
PROJECTIONS = ("both", "no_bias", "key", "value", "none")


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("project", PROJECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_matches_the_reference(backend, dtype, project, shape):
    attention_call(project=project, dtype=dtype, **shape).verify(backend)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.3},
        {"hard": True},
        {"absent_capsules": True},
        {"absent_capsules": True, "hard": True},
        {"absent_capsules": True, "scale": 0.5},
        {"power": 2.0, "project": "no_bias"},
        {"power": 3.0, "scale": 0.1, "project": "value"},
        {"power": 2.0, "project": "none", "absent_capsules": True},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
@pytest.mark.parametrize("c", [None, 3], ids=["one", "candidates"])
@pytest.mark.parametrize("return_weights", [False, True], ids=["output", "weights"])
@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=dtype_id)
def test_options(backend, dtype, return_weights, c, options):
    attention_call(c=c, dtype=dtype, return_weights=return_weights, **options).verify(backend)


def test_every_argument_counts(backend):
    call = attention_call(dtype=torch.float64)
    expected = call(backend=backend)
    for i, tensor in enumerate(call.tensors()):
        tensors = call.tensors()
        tensors[i] = tensor + torch.randn_like(tensor)
        distance = (call.with_tensors(tensors)(backend=backend) - expected).abs().max()
        assert distance < 1e-12 if i == 3 else distance > 1e-2, "the key bias alone cancels"


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 2.0},
        {"hard": True},
        {"power": 2.0},
        {"power": 3.0},
        {"capsule_mask": torch.tensor([[True, True, False, True]]).repeat(5, 1)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_counts(backend, options):
    call = attention_call(project="none", dtype=torch.float64)
    call = call.map(lambda t: t / 2)
    assert (call(backend=backend, **options) - call(backend=backend)).abs().max() > 1e-2


def test_weights_are_shares(backend):
    call = attention_call(c=3, absent_capsules=True, return_weights=True, dtype=torch.float64)
    out, weights = call(backend=backend)
    mask = call.options["capsule_mask"]
    assert weights.shape == (5, 3, 4)
    assert torch.equal(weights > 0, mask[:, None].expand(-1, 3, -1))
    present = mask.any(1, keepdim=True).double().expand(-1, 3)
    torch.testing.assert_close(weights.sum(-1), present)
    assert not out[0].any(), "a user without interests gets 0"


def test_gradient_through_the_weights_alone(backend):
    call = attention_call(c=3, dtype=torch.float64, return_weights=True).trainable()
    grads = {}
    for name in (backend, "reference"):
        _, weights = call(backend=name)
        grads[name] = torch.autograd.grad(
            weights.square().sum(), call.leaves(), allow_unused=True, materialize_grads=True
        )
    assert grads[backend][0].any()
    for mine, other in zip(grads[backend], grads["reference"], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_hard_takes_the_first_of_equals(backend):
    query = torch.ones(1, 2)
    interests = torch.tensor([[[0.0, 1.0], [1.0, 2.0], [2.0, 1.0], [3.0, -9.0]]])
    out, weights = ops.target_attention(
        query, interests, hard=True, return_weights=True, backend=backend
    )
    assert weights.tolist() == [[0, 1, 0, 0]]
    assert out.tolist() == [[1, 2]]


def test_hard_gradient_reaches_the_values_only(backend):
    call = attention_call(hard=True, dtype=torch.float64)
    _, query, interests, key_weight, key_bias, value_weight, value_bias = call.gradients(
        backend=backend
    )
    for nothing in (query, key_weight, key_bias):
        assert not nothing.any()
    for something in (value_weight, value_bias):
        assert something.any()
    assert (interests.abs().sum(-1) > 0).sum().item() == 5, "one interest per user"


def test_large_scores_do_not_overflow(backend):
    for dtype in (torch.float32, torch.bfloat16):
        call = attention_call(project="none", dtype=dtype).map(lambda t: t * 1e4)
        found = call.gradients(backend=backend)
        assert all(tensor.isfinite().all() for tensor in found)
        hard = call(backend=backend, hard=True)
        assert torch.equal(found[0], hard), "a softmax this sharp is a maximum"


def test_power_with_a_key_bias_falls_back_or_says_so(backend):
    call = attention_call(power=2.0)
    assert torch.equal(call(), call(backend="reference"))
    with pytest.raises(BackendUnavailable, match="key bias"):
        call(backend=backend)


def test_users_without_interests(any_backend):
    for hard in (False, True):
        call = attention_call(hard=hard, capsule_mask=torch.zeros(5, 4, dtype=torch.bool))
        assert all(not tensor.any() for tensor in call.gradients(backend=any_backend))


def test_candidates_are_independent(backend):
    call = attention_call(c=7, dtype=torch.float64)
    query, *others = call.args
    every = call(backend=backend)
    for i in range(7):
        one = Call(call.op, (query[:, i], *others))(backend=backend)
        torch.testing.assert_close(one, every[:, i], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_every_half_precision_number_is_read_and_rounded_as_by_torch(backend, dtype):
    """Means of two interests of equal score; 17 values a row leave a part of a vector."""
    if backend != "native":
        pytest.skip("of the conversions that compiled kernels make themselves")
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)[: 17 * (2**16 // 17)]
    first = bits.view(dtype).reshape(-1, 17)
    second = first[torch.randperm(len(first))]
    found = ops.target_attention(
        torch.zeros_like(first), torch.stack([first, second], 1), backend=backend
    )
    # Not infinity, of which 0 times makes a score NaN, nor what float32 may flush to 0 on a GPU.
    usable = torch.stack([first, second]).float().abs()
    usable = ((usable > 2.0**-120) & usable.isfinite()).all(-1).all(0)
    expected = (first.float() / 2 + second.float() / 2).to(dtype)
    assert torch.equal(found[usable], expected[usable])
    assert found[first.isnan().any(-1)].isnan().any(-1).all()

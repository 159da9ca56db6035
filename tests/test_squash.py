"""The squash op."""

import pytest
import torch
from cases import DTYPES, Call, dtype_id, randn, squash_call

from mimnet_fast import ops
from mimnet_fast._options import SQUASH_FORMS

SHAPES = [(1,), (10,), (3, 1), (35, 33), (2, 3, 7), (2, 3, 4, 5), (2, 1, 3, 2, 4, 5), (70, 64)]


@pytest.mark.parametrize("form", SQUASH_FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(backend, shape, dtype, form):
    power = 0.2 if form == "pow_clamp" else 1.0
    x = randn(*shape, dtype=dtype, scale=2.0)
    if len(shape) > 1:
        x[0] = 0
    Call(ops.squash, (x,), {"form": form, "power": power}).verify(backend)


@pytest.mark.parametrize("dim", [0, 1, 2, -3])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_any_dimension(backend, dim, dtype):
    squash_call(dim=dim, dtype=dtype).verify(backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :3],
        lambda x: x[:, :1],
        lambda x: x[..., 3:],
        lambda x: x[..., ::2],
        lambda x: x[..., :1],
        lambda x: x.transpose(0, 1),
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x[..., :1].expand(-1, -1, 20),
    ],
    ids=["rows", "row", "elements", "step", "element", "transposed", "same rows", "same elements"],
)
def test_any_strides(backend, view, dtype):
    Call(ops.squash, (view(randn(9, 5, 20, dtype=dtype)),)).verify(backend)


@pytest.mark.parametrize("scale", [1e-20, 1e-4, 1e4, 1e10, 1e15])
@pytest.mark.parametrize(
    ("form", "power"), [*((form, 1.0) for form in SQUASH_FORMS), ("pow_clamp", 0.2)]
)
def test_short_and_long_vectors(backend, form, power, scale):
    x = randn(9, 10, dtype=torch.float32, scale=scale)
    Call(ops.squash, (x,), {"form": form, "power": power}).verify(backend)


def test_very_long_vectors_keep_the_length_one(backend):
    assert ops.squash(torch.full((1, 4), 1e18), backend=backend).norm().item() == pytest.approx(1)


@pytest.mark.parametrize("form", SQUASH_FORMS)
def test_zero_stays_zero_with_a_gradient_of_zero(any_backend, form):
    x = torch.zeros(2, 5, requires_grad=True)
    out = ops.squash(x, form=form, backend=any_backend)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(grad, torch.full_like(x, form == "identity"))


def test_every_form_is_another_function(backend):
    """Where eps counts; no_div and none_eps are one function by definition."""
    x = randn(8, 10, dtype=torch.float64, scale=0.1)
    results = {
        form: ops.squash(x, form=form, eps=0.05, backend=backend)
        for form in SQUASH_FORMS
        if form != "none_eps"
    }
    results["pow_clamp, power 0.2"] = ops.squash(
        x, form="pow_clamp", eps=0.05, power=0.2, backend=backend
    )
    results["sqrt_eps, eps 0.1"] = ops.squash(x, eps=0.1, backend=backend)
    # a clamp counts below eps only
    results["pow_clamp, eps 0.5"] = ops.squash(x, form="pow_clamp", eps=0.5, backend=backend)
    assert torch.equal(results["no_div"], ops.squash(x, form="none_eps", eps=0.05, backend=backend))
    names = list(results)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if {one, other} == {"no_div", "pow_clamp"}:
                continue  # equal above eps
            distance = (results[one] - results[other]).abs().max()
            assert distance > 1e-3, (one, other)


def test_length_of_the_result(backend):
    """n^2 / (1 + n^2) for the standard form."""
    x = torch.tensor([[3.0, 4.0], [0.6, 0.8], [300.0, 400.0]])
    length = ops.squash(x, backend=backend).norm(dim=-1)
    torch.testing.assert_close(length, torch.tensor([25 / 26, 0.5, 250000 / 250001]))

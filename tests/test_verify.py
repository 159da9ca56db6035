"""`verify` accepts what is right and rejects what is wrong."""

import pytest
import torch
from cases import DTYPES, EVERY_OP, attention_call, dtype_id, mimnet_call, routing_call

from mimnet_fast import BackendUnavailable, ops, verify


def impostor(op, change):
    """An op whose fast backends are changed: what `verify` is there to find."""

    def wrong(*args, backend, **kwargs):
        out = op(*args, backend="reference", **kwargs)
        return out if backend == "reference" else change(out)

    wrong.__name__, wrong.__module__ = op.__name__, op.__module__
    return wrong


class GradientTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


def one_element(out, value):
    out = out.clone()
    out.view(-1)[7] += value
    return out


def tolerance(dtype):
    return 40 * torch.finfo(dtype).eps


WRONG = {
    "scaled": lambda out: out * (1 + tolerance(out.dtype)),
    "shifted": lambda out: out + tolerance(out.dtype),
    "one element": lambda out: one_element(out, 1000 * tolerance(out.dtype)),
    "one element is NaN": lambda out: one_element(out, torch.nan),
    "one element is infinite": lambda out: one_element(out, torch.inf),
    "rows swapped": lambda out: out.flip(0),
    "zero": lambda out: out * 0,
    "gradient": lambda out: GradientTimes.apply(out, 1 + tolerance(out.dtype)),
    "no gradient": lambda out: GradientTimes.apply(out, 0.0),
    "gradient is NaN": lambda out: GradientTimes.apply(out, torch.nan),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_finds_what_is_wrong(dtype, wrong):
    x = torch.randn(20, 10, dtype=torch.float64).to(dtype)
    same = impostor(ops.squash, lambda out: GradientTimes.apply(out, 1.0))
    assert verify(same, x)
    found = verify(impostor(ops.squash, WRONG[wrong]), x)
    assert not found
    assert "TOO FAR" in str(found)
    outputs = [d.ok for d in found.differences if d.name == "output"]
    assert outputs == ["gradient" in wrong], "and says where"


@pytest.mark.parametrize("name", EVERY_OP)
def test_accepts_the_ops(name):
    call = EVERY_OP[name]()
    found = verify(call.op, *call.args, **call.options)
    assert found
    assert str(found).startswith(f"{call.op.__name__}: error (rms) against float64")
    assert str(found).count("ok") == len(found.differences)


def test_names_every_tensor():
    call = mimnet_call(ids=torch.int64)
    found = verify(call.op, *call.args, **call.options)
    names = [d.name for d in found.differences]
    assert names[0] == "output"
    assert "grad of input.4.w1" in names
    assert "grad of input.4.fine.0" in names
    assert not any("table" in name for name in names), "frozen inside the op"
    assert found.differences[0].shape == (5,)


def test_the_reference_is_as_far_as_itself():
    call = routing_call()
    found = verify(call.op, *call.args, backend="reference")
    assert found
    assert found.backend == "reference"


def test_inputs_stay_as_they_are():
    call = routing_call()
    inputs = call.args[0].requires_grad_()
    before = inputs.detach().clone()
    verify(call.op, *call.args)
    assert inputs.grad is None
    assert torch.equal(inputs, before)
    assert inputs.requires_grad


def test_one_tensor_in_two_places():
    x = torch.randn(4, 3, 5)
    w1, b1, w2, b2 = torch.randn(7, 5), torch.randn(7), torch.randn(25, 7), torch.randn(25)
    found = verify(ops.interest_bridge, x, x, w1, b1, w2, b2)
    assert found
    assert len(found.differences) == 6, "one output, one gradient for each tensor"


def test_outputs_without_a_gradient():
    interests = torch.randn(2, 3, 4)
    assert verify(ops.target_attention, interests[:, 0], interests, hard=True, return_weights=True)


def test_empty_batch():
    assert verify(ops.squash, torch.zeros(0, 3))


def test_a_backend_that_cannot_serve():
    call = attention_call(power=2.0)
    with pytest.raises(BackendUnavailable):
        verify(call.op, *call.args, **call.options, backend="native")
    assert verify(call.op, *call.args, **call.options), "auto is the reference here"

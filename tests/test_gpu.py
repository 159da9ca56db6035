"""What only a GPU can show: streams, graphs, several devices, no synchronisation."""

import pytest
import torch
from cases import EVERY_OP, SINGLE_AND_HALF, dtype_id, mimnet_call

from mimnet_fast import backends, ops

every_op = pytest.mark.parametrize("name", EVERY_OP)


@pytest.fixture(autouse=True)
def _needs_a_gpu(device):
    if device != "cuda":
        pytest.skip("needs a GPU: run with --device cuda")


@every_op
def test_current_stream(backend, name):
    """Kernels wait for what their stream has queued, and for nothing else."""
    call = EVERY_OP[name](b=33)
    expected = call.gradients(backend=backend)
    late = call.map(torch.zeros_like)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for slow, tensor in zip(late.tensors(), call.tensors(), strict=True):
            slow.copy_(tensor)
        found = late.gradients(backend=backend)
    side.synchronize()
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


@every_op
def test_no_synchronisation(backend, name):
    call = EVERY_OP[name]()
    call.gradients(backend=backend)
    torch.cuda.synchronize()
    trainable = call.trainable()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = trainable.outputs(backend=backend)[0]
        torch.autograd.grad(out, trainable.leaves(), torch.ones_like(out), allow_unused=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_op
def test_graph_capture(backend, name):
    """Forward and backward replay on new values in the same memory."""
    call = EVERY_OP[name](b=7).trainable()
    leaves = call.leaves()

    def step():
        out = call.outputs(backend=backend)[0]
        grads = torch.autograd.grad(
            out, leaves, torch.ones_like(out), allow_unused=True, materialize_grads=True
        )
        return [out, *grads]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    graph.replay()
    for mine, other in zip(captured, step(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


@every_op
def test_backward_is_deterministic(backend, name):
    call = EVERY_OP[name](b=600)
    first = call.gradients(backend=backend)
    for _ in range(3):
        assert all(map(torch.equal, call.gradients(backend=backend), first))


@every_op
def test_second_device(backend, name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    call = EVERY_OP[name]()
    other = call.map(lambda t: t.to("cuda:1"))
    for mine, there in zip(call.gradients(backend=backend), other.gradients(backend=backend),
                           strict=True):  # fmt: skip
        assert there.device.index == 1
        assert torch.equal(mine, there.to(mine.device))


def test_tensors_on_two_devices_are_refused(backend):
    call = mimnet_call()
    history, source, *others = call.args
    with pytest.raises(ValueError, match="history: is on cpu"):
        call.op(history.cpu(), source, *others, backend=backend)


def test_ids_out_of_range_spoil_their_own_rating_alone(backend):
    """Nothing may be read outside of the table, and nothing can be raised without waiting."""
    call = mimnet_call(ids=torch.int64)
    history, *others = call.args
    expected = call(backend=backend)
    for wrong in (-1, 23, 2**40):
        bad = history.clone()
        bad[2, 3] = wrong
        found = call.op(bad, *others, **call.options, backend=backend)
        assert found[2].isnan()
        keep = torch.arange(len(found)) != 2
        assert torch.equal(found[keep], expected[keep])


@pytest.mark.parametrize("dtype", SINGLE_AND_HALF, ids=dtype_id)
@pytest.mark.parametrize("d", [32, 64, 128])
def test_whole_model_at_large_width(backend, d, dtype):
    call = mimnet_call(b=67, length=50, k=8, d=d, h=64, history="lengths", dtype=dtype)
    call.verify(backend)


def test_more_elements_than_an_int_counts(backend):
    """Offsets are 64 bits wide."""
    rows = 2**31 // 64 + 3
    x = torch.zeros(rows, 64, dtype=torch.bfloat16)
    x[-1] = torch.arange(64)
    last = ops.squash(x, backend=backend)[-1]
    torch.testing.assert_close(last, ops.squash(x[-1:].clone(), backend=backend)[0])


def test_float64_says_why(device):
    reasons = backends.explain("squash", torch.ones(3, dtype=torch.float64))
    for name in ("native", "triton"):
        assert reasons[name] == [f"no {name} kernels for float64 cuda tensors: use float32"]

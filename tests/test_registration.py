"""The ops as torch sees them: schemas, fakes, compile, export, autocast."""

import copy

import pytest
import torch
from cases import EVERY_OP, Call, interpreted, mimnet_call, own_programs, routing_call, some_users
from torch.utils._python_dispatch import TorchDispatchMode

from mimnet_fast import _schemas, nn, ops
from mimnet_fast.ops._autograd import SUFFIX

every_op = pytest.mark.parametrize("name", EVERY_OP)
NAMES = [schema.split("(")[0] for schema in _schemas.SCHEMAS]


class Recorder(TorchDispatchMode):
    """Calls of the package's ops, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mimnet_fast":
            detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
            self.calls.append((func, detached))
        return func(*args, **(kwargs or {}))


def recorded(call: Call, backend):
    """What a forward and backward hand to the registered ops."""
    with Recorder() as recorder:
        call.gradients(backend=backend)
    return recorder.calls


def test_every_op_with_a_gradient_has_a_backward_op():
    in_place = {schema.split("(")[0] for schema in _schemas.IN_PLACE}
    backward = {f"{name}_backward" for name in ops.DIFFERENTIABLE}
    assert {*NAMES} | in_place == {*ops.FUNCTIONS} | backward


SAMPLES = {
    "usual": {},
    "empty": {"b": 0},
    "one_user": {"b": 1},
    "double": {"dtype": torch.float64},
    "half": {"dtype": torch.bfloat16},
}


SHOWN_IN_INTERPRETER = {
    "squash",
    "dynamic_routing_options",
    "dynamic_routing_per_position",
    "dynamic_routing_full_shared",
    "interest_bridge_per_interest",
    "target_attention_candidates",
    "multi_granularity_attention_candidates",
    "mimnet_forward_ids",
}
"""Calls with every op and shape of result: schemas and fakes are those of the native ops."""


@pytest.fixture
def shown_backend(backend, name):
    """The backend, for the calls that its interpreter has time for."""
    if interpreted(backend) and name not in SHOWN_IN_INTERPRETER:
        pytest.skip("what torch sees of this op, other calls show in Triton's interpreter")
    return backend


@every_op
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(shown_backend, sample, name):
    backend = shown_backend
    if interpreted(backend) and sample not in ("empty", "one_user"):
        pytest.skip("one user shows as much in Triton's interpreter")
    calls = recorded(EVERY_OP[name](**SAMPLES[sample]), backend)
    assert len(calls) == 2, "one op forward, one backward"
    (forward, arguments), (backward, backward_arguments) = calls
    arguments = [
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    torch.library.opcheck(forward, arguments)
    torch.library.opcheck(backward, backward_arguments)


@every_op
def test_opcheck_of_strided_inputs(shown_backend, name):
    backend = shown_backend
    call = EVERY_OP[name](**SAMPLES["one_user"] if interpreted(backend) else {})
    call = call.map(lambda t: t.T.contiguous().T if t.dim() == 2 else t.movedim(-1, 0).contiguous()
                    .movedim(0, -1) if t.dim() > 2 else t)  # fmt: skip
    for op, arguments in recorded(call, backend):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("weight", ["votes", "per_capsule"])
def test_opcheck_of_one_capsule(backend, weight):
    for op, arguments in recorded(routing_call(k=1, length=1, weight=weight), backend):
        torch.library.opcheck(op, arguments)


def sizes(name, b, length):
    return {"b": b, "length": length} if "routing" in name or "mimnet" in name else {"b": b}


def differentiate(call, function, backend):
    leaves = call.leaves()
    out = function(*call.args, **call.options, backend=backend)
    outputs = out if isinstance(out, tuple) else (out,)
    loss = sum(o.square().sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


@every_op
def test_compile_with_dynamic_shapes(shown_backend, name):
    """Same numbers as eager, and what was compiled once serves every batch and length."""
    backend = shown_backend
    EVERY_OP[name]()(backend=backend)  # a backend without this option says so in its own words
    torch._dynamo.reset()
    function = EVERY_OP[name]().op
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    # The first sizes differ from all others: equal ones are taken for one and the same.
    batches = (9, 2, 12) if interpreted(backend) and own_programs(name) else (19, 9, 31)
    for i, (b, length) in enumerate(zip(batches, (11, 4, 17), strict=True)):
        call = EVERY_OP[name](**sizes(name, b, length)).trainable()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            found = differentiate(call, compiled, backend)
        for mine, other in zip(found, differentiate(call, function, backend), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)


class EveryOp(torch.nn.Module):
    """A model made of every module and op."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        self.routing = nn.DynamicRouting(4, 4, 3, initial_logits="zeros", backend=backend)
        self.bridge = nn.InterestBridge(4, 4, 4, 7, backend=backend)
        self.own = nn.TargetAttention(4, backend=backend)
        self.attention = nn.MultiGranularityAttention(4, backend=backend)
        self.squash = nn.Squash(backend=backend)

    def forward(self, history, mask, source, item, prototype, logits, ids, table):
        capsules = self.routing(history, mask=mask, logits=logits)
        interests = self.squash(self.bridge(capsules, source))
        user = self.attention(item, prototype, interests) + self.own(item, interests)
        parameters = ops.MIMNetParameters(
            self.routing.weight, *self.bridge.parameters(), *self.attention.weights()
        )
        options = {"mask": mask, "backend": self.backend}
        whole = ops.mimnet_forward(
            history, source, item, prototype, parameters, logits, **options
        ) + ops.mimnet_forward(
            ids, source, item, prototype, parameters, logits, table=table, **options
        )
        return (user * item).sum(-1) + whole


def inputs_of_every_op(b, length):
    return (
        torch.randn(b, length, 4),
        torch.rand(b, length) > 0.4,
        *torch.randn(3, b, 4),
        torch.randn(b, 3, length),
        torch.randint(0, 11, (b, length)),
        torch.randn(11, 4),
    )


def test_export(backend):
    model = EveryOp(backend)
    b, length = torch.export.Dim("b", min=2), torch.export.Dim("length", min=2)
    history, user = {0: b, 1: length}, {0: b}
    dynamic = (history, history, user, user, user, {0: b, 2: length}, history, None)
    program = torch.export.export(model, inputs_of_every_op(5, 6), dynamic_shapes=dynamic)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    for name in ops.DIFFERENTIABLE:
        assert f"mimnet_fast.{name}{SUFFIX[backend]}.default" in called
    for sizes in ((5, 6), (2, 9), (some_users(backend, 33), 20)):
        inputs = inputs_of_every_op(*sizes)
        torch.testing.assert_close(program.module()(*inputs), model(*inputs), rtol=0, atol=0)


@pytest.mark.slow
def test_compile_with_inductor(backend):
    """The whole model through the default compiler, forward and backward."""
    torch._dynamo.reset()
    model = EveryOp(backend)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True)
    for sizes in ((5, 6), (9, 4)):
        inputs = inputs_of_every_op(*sizes)
        found, expected = compiled(*inputs), model(*inputs)
        torch.testing.assert_close(found, expected)
        found.sum().backward()
        expected.sum().backward()
    for mine, other in zip(compiled.parameters(), model.parameters(), strict=True):
        if other.grad is None:  # the key biases cancel
            assert mine.grad is None or not mine.grad.any()
        else:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_compiled_lengths_are_clamped(backend):
    """A traced graph looks at no values, so lengths out of range become 0 and L."""
    call = routing_call(lengths=torch.tensor([-5, 0, 3, 6, 99]))
    compiled = torch.compile(call.op, fullgraph=True, backend="aot_eager")
    found = compiled(*call.args, **call.options, backend=backend)
    clamped = torch.tensor([0, 0, 3, 6, 6])
    assert torch.equal(found, call(lengths=clamped, backend=backend))
    with pytest.raises(ValueError, match="lengths: got -5"):
        call(backend=backend)


@pytest.mark.parametrize("name", [name for name in EVERY_OP if not name.startswith("squash")])
def test_autocast(backend, name, device):
    """As for a linear layer: inputs in bfloat16, gradients in the inputs' own dtype."""
    call = EVERY_OP[name]().trainable()
    half = call.map(lambda t: t.bfloat16() if t.is_floating_point() else t)
    with torch.autocast(device, torch.bfloat16):
        outputs = call.outputs(backend=backend)
    for mine, other in zip(outputs, half.outputs(backend=backend), strict=True):
        assert mine.dtype is torch.bfloat16
        assert torch.equal(mine, other)
    leaves = call.leaves()
    loss = next(out for out in outputs if out.requires_grad).float().square().sum()
    for leaf, grad in zip(
        leaves, torch.autograd.grad(loss, leaves, materialize_grads=True), strict=True
    ):
        assert grad.dtype is leaf.dtype is torch.float32
    double = EVERY_OP[name](dtype=torch.float64)
    with torch.autocast(device, torch.bfloat16):
        assert double.outputs(backend=backend)[0].dtype is torch.float64


def test_autocast_mixes_dtypes_and_leaves_squash_alone(backend, device):
    """A model under autocast hands over bfloat16 activations and float32 parameters."""
    call = mimnet_call()
    history, source, *others = call.args
    with torch.autocast(device, torch.bfloat16):
        mixed = call.op(history.bfloat16(), source, *others, backend=backend)
        assert ops.squash(history, backend=backend).dtype is torch.float32
    assert mixed.dtype is torch.bfloat16

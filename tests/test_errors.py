"""Wrong calls: the type of the error, the argument that it names, and that nothing was computed."""

import re
from functools import partial

import pytest
import torch
from cases import EVERY_OP, attention_call, bridge_call, fusion_call, mimnet_call, routing_call
from torch.utils._python_dispatch import TorchDispatchMode

from mimnet_fast import RoutingVariant, backends, nn, ops, use_backend, verify

ones = torch.ones
X = ones(2, 5, 4)  # [B, L, D_in]
W, WK = ones(4, 3), ones(6, 4, 3)
IDS = torch.zeros(2, 5, dtype=torch.int64)


def route(*args, **options):
    return partial(ops.dynamic_routing, *args, **options)


def changed(call, path, value):
    """The call with one argument, or one entry of an argument, replaced."""
    args, options = list(call.args), dict(call.options)
    name, *rest = path if isinstance(path, tuple) else (path,)
    if isinstance(name, str):
        options[name] = value
    elif not rest:
        args[name] = value
    elif isinstance(rest[0], str):
        args[name] = args[name]._replace(**{rest[0]: value})
    else:
        args[name] = tuple(value if i == rest[0] else v for i, v in enumerate(args[name]))
    return partial(call.op, *args, **options)


def bridge(path, value, **options):
    return changed(bridge_call(**options), path, value)


def attend(path, value, **options):
    return changed(attention_call(**options), path, value)


def fuse(path, value, **options):
    return changed(fusion_call(**options), path, value)


def forward(path, value, **options):
    return changed(mimnet_call(**options), path, value)


def enter(context):
    with context:
        pass


# name: (call, exception, what the message has to say)
WRONG = {
    # squash
    "squash: a list": (partial(ops.squash, [1.0]), TypeError, "x: got list, need a tensor"),
    "squash: integers": (partial(ops.squash, IDS), TypeError, "x: got dtype torch.int64"),
    "squash: complex": (partial(ops.squash, X.cfloat()), TypeError, "x: got dtype torch.complex64"),
    "squash: scalar": (partial(ops.squash, ones(())), ValueError, r"x: got shape \[\]"),
    "squash: dim": (partial(ops.squash, X, 3), ValueError, "dim: got 3, need at most 2"),
    "squash: negative dim": (
        partial(ops.squash, X, -4),
        ValueError,
        "dim: got -4, need at least -3",
    ),
    "squash: dim of 0": (partial(ops.squash, ones(2, 0)), ValueError, "x: got D = 0"),
    "squash: eps 0": (partial(ops.squash, X, eps=0.0), ValueError, "eps: got 0.0.*above 0"),
    "squash: eps < 0": (partial(ops.squash, X, eps=-1.0), ValueError, "eps: got -1.0"),
    "squash: eps nan": (partial(ops.squash, X, eps=float("nan")), ValueError, "eps: got nan"),
    "squash: eps text": (partial(ops.squash, X, eps="1"), TypeError, "eps: got str, need a number"),
    "squash: form": (
        partial(ops.squash, X, form="tanh"),
        ValueError,
        "form: got 'tanh', need one of 'sqrt_eps'",
    ),
    "squash: form None": (partial(ops.squash, X, form=None), ValueError, "form: got None"),
    "squash: power": (
        partial(ops.squash, X, power=2.0),
        ValueError,
        "power: got 2.0 with form='sqrt_eps'",
    ),
    "squash: power 0": (
        partial(ops.squash, X, form="pow_clamp", power=0.0),
        ValueError,
        "power: got 0.0",
    ),
    "squash: backend": (
        partial(ops.squash, X, backend="cuda"),
        ValueError,
        "backend: got 'cuda', need one of",
    ),
    "squash: dim is text": (partial(ops.squash, X, "last"), TypeError, "dim: got str"),
    # dynamic routing
    "routing: array": (route([[1.0]], W), TypeError, "inputs: got list"),
    "routing: dims": (route(ones(5, 4), W), ValueError, r"inputs: got shape \[5, 4\]"),
    "routing: integers": (route(X.long(), W), TypeError, "inputs: got dtype torch.int64"),
    "routing: no K": (route(X, W), ValueError, "num_capsules: got None.*pass num_capsules"),
    "routing: K of logits": (
        route(X, WK, ones(2, 5, 5)),
        ValueError,
        "logits: got 5 capsules, but weight has 6",
    ),
    "routing: K of num_capsules": (
        route(X, WK, num_capsules=5),
        ValueError,
        "num_capsules: got 5 capsules, but weight has 6",
    ),
    "routing: K of votes": (
        route(ones(2, 6, 5, 4), num_capsules=5),
        ValueError,
        "num_capsules.*but inputs has 6",
    ),
    "routing: K 0": (route(X, W, num_capsules=0), ValueError, "num_capsules: got 0"),
    "routing: K float": (route(X, W, num_capsules=3.0), TypeError, "num_capsules: got float"),
    "routing: K of logits 0": (route(X, W, ones(2, 0, 5)), ValueError, "logits: got K = 0"),
    "routing: votes and weight": (
        route(ones(2, 6, 5, 4), W),
        ValueError,
        "inputs: got votes.*together with a weight",
    ),
    "routing: L 0": (route(ones(2, 0, 4), WK), ValueError, "inputs: got L = 0"),
    "routing: D_in 0": (
        route(ones(2, 5, 0), ones(6, 0, 3)),
        ValueError,
        "inputs: got .*D_in = 0",
    ),
    "routing: D 0": (route(X, ones(6, 4, 0)), ValueError, "weight: got D = 0"),
    "routing: weight": (route(X, W[0]), ValueError, r"weight: got shape \[3\]"),
    "routing: D_in": (
        route(X, ones(5, 3), num_capsules=2),
        ValueError,
        r"weight: got shape \[5, 3\].*= \[4, 3\]",
    ),
    "routing: weight per position": (
        route(X, ones(4, 6, 4, 3)),
        ValueError,
        r"weight: got shape \[4, 6, 4, 3\].*= \[5, 6, 4, 3\]",
    ),
    "routing: dtype of weight": (
        route(X, WK.double()),
        TypeError,
        "weight: got dtype torch.float64, need torch.float32",
    ),
    "routing: device of weight": (
        route(X, WK.to("meta")),
        ValueError,
        "weight: is on meta, but the other arguments are on cpu",
    ),
    "routing: logits": (route(X, W, ones(3, 5)), ValueError, r"logits: got shape \[3, 5\]"),
    "routing: B of logits": (
        route(X, W, ones(3, 6, 5)),
        ValueError,
        r"logits: got shape \[3, 6, 5\].*\[2, 6, 5\]",
    ),
    "routing: L of logits": (route(X, W, ones(2, 6, 4)), ValueError, "logits: got shape"),
    "routing: dtype of logits": (route(X, W, ones(2, 6, 5).half()), TypeError, "logits: got dtype"),
    "routing: mask and lengths": (
        route(X, WK, mask=IDS.bool(), lengths=IDS[:, 0]),
        ValueError,
        "mask, lengths: got both",
    ),
    "routing: integer mask": (
        route(X, WK, mask=IDS),
        TypeError,
        "mask: got dtype torch.int64, need bool",
    ),
    "routing: float mask": (route(X, WK, mask=ones(2, 5)), TypeError, "mask: got dtype.*need bool"),
    "routing: shape of mask": (
        route(X, WK, mask=ones(5, 2).bool()),
        ValueError,
        r"mask: got shape \[5, 2\].*\[2, 5\]",
    ),
    "routing: device of mask": (
        route(X, WK, mask=IDS.bool().to("meta")),
        ValueError,
        "mask: is on meta",
    ),
    "routing: mask is a list": (route(X, WK, mask=[True]), TypeError, "mask: got list"),
    "routing: lengths < 0": (
        route(X, WK, lengths=torch.tensor([1, -1])),
        ValueError,
        "lengths: got -1, need 0 to 5",
    ),
    "routing: lengths > L": (
        route(X, WK, lengths=torch.tensor([6, 1])),
        ValueError,
        "lengths: got 6, need 0 to 5",
    ),
    "routing: float lengths": (route(X, WK, lengths=ones(2)), TypeError, "lengths: got dtype"),
    "routing: bool lengths": (
        route(X, WK, lengths=ones(2).bool()),
        TypeError,
        "lengths: got dtype",
    ),
    "routing: B of lengths": (
        route(X, WK, lengths=IDS[0]),
        ValueError,
        r"lengths: got shape \[5\], need \[B\] = \[2\]",
    ),
    "routing: lengths is a list": (route(X, WK, lengths=[1, 2]), TypeError, "lengths: got list"),
    "routing: capsule_mask": (
        route(X, WK, capsule_mask=ones(2, 5).bool()),
        ValueError,
        r"capsule_mask.*\[2, 6\]",
    ),
    "routing: float capsule_mask": (
        route(X, WK, capsule_mask=ones(2, 6)),
        TypeError,
        "capsule_mask: got dtype.*need bool",
    ),
    "routing: iterations 0": (route(X, WK, iterations=0), ValueError, "iterations: got 0"),
    "routing: iterations float": (route(X, WK, iterations=2.0), TypeError, "iterations: got float"),
    "routing: iterations bool": (route(X, WK, iterations=True), TypeError, "iterations: got bool"),
    "routing: temperature 0": (route(X, WK, temperature=0.0), ValueError, "temperature: got 0.0"),
    "routing: temperature inf": (
        route(X, WK, temperature=float("inf")),
        ValueError,
        "temperature: got inf",
    ),
    "routing: axis": (
        route(X, WK, softmax_over="k"),
        ValueError,
        "softmax_over: got 'k', need one of 'capsules'",
    ),
    "routing: padding": (route(X, WK, padding="zero"), ValueError, "padding: got 'zero'"),
    "routing: gradient": (route(X, WK, gradient=True), ValueError, "gradient: got True"),
    "routing: update": (route(X, WK, update="add"), ValueError, "update: got 'add'"),
    "routing: squash": (route(X, WK, squash="tanh"), ValueError, "squash: got 'tanh'"),
    "routing: eps": (route(X, WK, eps=0), ValueError, "eps: got 0"),
    "routing: power": (
        route(X, WK, power=2.0),
        ValueError,
        "power: got 2.0 with squash='sqrt_eps'",
    ),
    # interest bridge
    "bridge: interests": (bridge(0, ones(5, 4)), ValueError, r"interests: got shape \[5, 4\]"),
    "bridge: K 0": (bridge(0, ones(5, 0, 4)), ValueError, "interests: got K = 0"),
    "bridge: D_i": (bridge(0, ones(5, 3, 4), d_i=3), ValueError, r"w1: got shape \[7, 3\]"),
    "bridge: source": (bridge(1, ones(5)), ValueError, r"source: got shape \[5\]"),
    "bridge: B of source": (bridge(1, ones(4, 5)), ValueError, r"source: got shape \[4, 5\]"),
    "bridge: K of source": (bridge(1, ones(5, 2, 5)), ValueError, r"source: .*\[5, 3, 5\]"),
    "bridge: D_s 0": (bridge(1, ones(5, 0)), ValueError, "source: got D_s = 0"),
    "bridge: D_i 0": (bridge(0, ones(5, 3, 0)), ValueError, "interests: got D_i = 0"),
    "bridge: H 0": (
        partial(
            ops.interest_bridge,
            ones(5, 3, 4),
            ones(5, 5),
            ones(0, 4),
            ones(0),
            ones(30, 0),
            ones(30),
        ),
        ValueError,
        "w1: got H = 0",
    ),
    "bridge: b1": (bridge(3, ones(6)), ValueError, r"b1: got shape \[6\], need \[H\] = \[7\]"),
    "bridge: w2": (bridge(4, ones(30, 6)), ValueError, r"w2: got shape \[30, 6\]"),
    "bridge: w2 transposed": (bridge(4, ones(7, 30)), ValueError, r"w2: .*= \[30, 7\]"),
    "bridge: b2": (
        bridge(5, ones(31)),
        ValueError,
        "b2: got 31 values, need a multiple of D_s = 5",
    ),
    "bridge: D_t 0": (bridge(5, ones(0), d_t=0), ValueError, "b2: got D_t = 0"),
    "bridge: b2 is None": (bridge(5, None), TypeError, "b2: got NoneType, need a tensor"),
    "bridge: dtype": (bridge(4, ones(30, 7).double()), TypeError, "w2: got dtype torch.float64"),
    "bridge: device": (bridge(3, ones(7, device="meta")), ValueError, "b1: is on meta"),
    # target attention
    "attention: query": (attend(0, ones(6)), ValueError, r"query: got shape \[6\]"),
    "attention: interests": (attend(1, ones(5, 6)), ValueError, r"interests: got shape \[5, 6\]"),
    "attention: B": (attend(1, ones(4, 4, 6)), ValueError, "interests: got shape.*= \\[5, 4, 6\\]"),
    "attention: D": (attend(1, ones(5, 4, 7)), ValueError, "interests: got shape"),
    "attention: K 0": (attend(1, ones(5, 0, 6)), ValueError, "interests: got K = 0"),
    "attention: D 0": (
        partial(ops.target_attention, ones(5, 0), ones(5, 4, 0)),
        ValueError,
        "interests: got D = 0",
    ),
    "attention: key_weight": (attend(2, ones(6, 5)), ValueError, r"key_weight: .*= \[6, 6\]"),
    "attention: key_bias": (attend(3, ones(5)), ValueError, "key_bias: got shape"),
    "attention: key_bias alone": (
        attend(2, None),
        ValueError,
        "key_bias: got a tensor, but key_weight is None",
    ),
    "attention: value_weight": (attend(4, ones(6)), ValueError, "value_weight: got shape"),
    "attention: value_bias alone": (
        attend(4, None),
        ValueError,
        "value_bias: got a tensor, but value_weight is None",
    ),
    "attention: dtype": (attend(5, ones(6).half()), TypeError, "value_bias: got dtype"),
    "attention: capsule_mask": (
        attend("capsule_mask", ones(5, 3).bool()),
        ValueError,
        r"capsule_mask: .*\[5, 4\]",
    ),
    "attention: scale 0": (attend("scale", 0.0), ValueError, "scale: got 0.0"),
    "attention: power 1.5": (
        attend("power", 1.5),
        ValueError,
        "power: got 1.5, need a whole number",
    ),
    "attention: power 0": (attend("power", 0.0), ValueError, "power: got 0.0"),
    # multi-granularity attention
    "fusion: item": (fuse(0, ones(6)), ValueError, r"item: got shape \[6\]"),
    "fusion: prototype": (
        fuse(1, ones(5, 3, 6)),
        ValueError,
        r"prototype: got shape \[5, 3, 6\].*the shape of item",
    ),
    "fusion: prototype is None": (fuse(1, None), TypeError, "prototype: got NoneType"),
    "fusion: interests": (fuse(2, ones(5, 4, 5)), ValueError, "interests: got shape"),
    "fusion: 3 tensors": (
        fuse(3, fusion_call().args[3][:3]),
        ValueError,
        "fine: got 3 tensors, need 4",
    ),
    "fusion: a tensor": (fuse(4, ones(4, 6, 6)), TypeError, "coarse: got Tensor, need"),
    "fusion: a part": (fuse((4, 0), ones(6)), ValueError, "coarse.key_weight: got shape"),
    "fusion: a part is None": (fuse((3, 1), None), TypeError, "fine.key_bias: got NoneType"),
    "fusion: dtype of a part": (
        fuse((3, 3), ones(6).half()),
        TypeError,
        "fine.value_bias: got dtype",
    ),
    "fusion: weight": (
        fuse(5, ones(6)),
        ValueError,
        r"fusion_weight: got shape \[6\], need \[2\*D\] = \[12\]",
    ),
    "fusion: bias": (fuse(6, ones(2)), ValueError, r"fusion_bias: got shape \[2\]"),
    "fusion: bias is a number": (fuse(6, 0.5), TypeError, "fusion_bias: got float, need a tensor"),
    # the whole stage
    "mimnet: source": (forward(1, ones(5)), ValueError, r"source: got shape \[5\]"),
    "mimnet: history": (forward(0, ones(5, 6)), ValueError, r"history: got shape \[5, 6\]"),
    "mimnet: B of history": (forward(0, ones(4, 6, 4)), ValueError, "history: got shape"),
    "mimnet: ids without a table": (forward(0, IDS), ValueError, r"history: got shape \[2, 5\]"),
    "mimnet: ids are floats": (
        forward(0, ones(5, 6), ids=torch.int64),
        TypeError,
        "history: got dtype torch.float32",
    ),
    "mimnet: ids of int16": (
        forward(0, ones(5, 6).short(), ids=torch.int64),
        TypeError,
        "history: got dtype torch.int16",
    ),
    "mimnet: embedded with a table": (
        forward(0, ones(5, 6, 4), ids=torch.int64),
        ValueError,
        "history: .*ids .* with a table",
    ),
    "mimnet: lengths as the mask": (
        forward("mask", torch.ones(5).long()),
        ValueError,
        r"mask: got shape \[5\]",
    ),
    "mimnet: id too large": (
        forward(0, torch.full((5, 6), 23), ids=torch.int64),
        ValueError,
        "history: got 23, need 0 to 22",
    ),
    "mimnet: id negative": (
        forward(0, torch.full((5, 6), -1), ids=torch.int32),
        ValueError,
        "history: got -1",
    ),
    "mimnet: B of ids": (
        forward(0, torch.zeros(4, 6).long(), ids=torch.int64),
        ValueError,
        "history: got 4 rows",
    ),
    "mimnet: table": (forward("table", ones(23), ids=torch.int64), ValueError, "table: got shape"),
    "mimnet: D of table": (
        forward("table", ones(23, 5), ids=torch.int64),
        ValueError,
        r"table: .*= \[23, 4\]",
    ),
    "mimnet: item": (forward(2, ones(5, 3)), ValueError, "item: got shape"),
    "mimnet: prototype": (forward(3, None), TypeError, "prototype: got NoneType"),
    "mimnet: parameters": (forward(4, (ones(4, 4),)), TypeError, "parameters: got tuple"),
    "mimnet: routing_weight": (
        forward((4, "routing_weight"), ones(4, 5)),
        ValueError,
        "routing_weight: got shape",
    ),
    "mimnet: w1": (forward((4, "w1"), ones(7, 5)), ValueError, "w1: got shape"),
    "mimnet: b2": (
        forward((4, "b2"), ones(20)),
        ValueError,
        r"(w2: got shape|b2: got 20 values)",
    ),
    "mimnet: fine": (
        forward((4, "fine"), (ones(4, 4),)),
        ValueError,
        "parameters.fine: got 1 tensors, need 4",
    ),
    "mimnet: coarse is None": (
        forward((4, "coarse"), None),
        TypeError,
        "parameters.coarse: got NoneType",
    ),
    "mimnet: fusion_bias": (
        forward((4, "fusion_bias"), ones(1, 1)),
        ValueError,
        "fusion_bias: got",
    ),
    "mimnet: logits are None": (forward(5, None), TypeError, "logits: got NoneType, need a tensor"),
    "mimnet: L of logits": (forward(5, ones(5, 3, 7)), ValueError, "logits: got shape"),
    "mimnet: K 0": (forward(5, ones(5, 0, 6)), ValueError, "logits: got K = 0"),
    "mimnet: L 0": (
        forward(0, ones(5, 0, 4), length=0),
        ValueError,
        "logits: got .*L = 0",
    ),
    "mimnet: iterations": (forward("iterations", -1), ValueError, "iterations: got -1"),
    "mimnet: padding": (forward("padding", "none"), ValueError, "padding: got 'none'"),
    "mimnet: lengths": (
        forward("lengths", torch.full((5,), 7)),
        ValueError,
        "lengths: got 7, need 0 to 6",
    ),
    # modules
    "nn: weight": (
        partial(nn.DynamicRouting, 4, 4, 2, weight="both"),
        ValueError,
        "weight: got 'both'",
    ),
    "nn: length": (
        partial(nn.DynamicRouting, 4, 4, 2, weight="per_position"),
        ValueError,
        "length: got None.*weight='per_position'",
    ),
    "nn: length of a variant": (
        partial(nn.DynamicRouting, 4, 4, 2, variant=RoutingVariant.MIND, length=5),
        ValueError,
        "length: got 5.*weight='shared'",
    ),
    "nn: variant": (
        partial(nn.DynamicRouting, 4, 4, 2, variant="mind"),
        TypeError,
        "variant: got 'mind', need a member of RoutingVariant",
    ),
    "nn: a history longer than the weight": (
        partial(nn.DynamicRouting(4, 4, 2, weight="per_position", length=4), X),
        ValueError,
        r"weight: got shape \[4, 2, 4, 4\].*= \[5, 2, 4, 4\]",
    ),
    "nn: initial_logits": (
        partial(nn.DynamicRouting, 4, 4, 2, initial_logits="one"),
        ValueError,
        "initial_logits: got",
    ),
    "nn: width": (partial(nn.DynamicRouting(3, 4, 2), X), ValueError, "weight: got shape"),
    "nn: interests": (
        partial(nn.InterestBridge(4, 4, 4, 8), ones(2, 3, 5), ones(2, 4)),
        ValueError,
        "w1: got shape",
    ),
    "nn: form": (partial(nn.Squash(form="no"), X), ValueError, "form: got 'no'"),
    "nn: dtype": (
        partial(nn.TargetAttention(4), ones(2, 4).double(), ones(2, 3, 4).double()),
        TypeError,
        "key_weight: got dtype torch.float32, need torch.float64",
    ),
    # backends and verify
    "backends: use_backend": (
        partial(enter, use_backend("numpy")),
        ValueError,
        "use_backend: got 'numpy', need one of",
    ),
    "backends: explain": (
        partial(backends.explain, "route", X),
        ValueError,
        "op: got 'route', need one of squash",
    ),
    "backends: explain what": (
        partial(backends.explain, torch.relu, X),
        ValueError,
        "op: got .*relu.*need one of squash",
    ),
    "backends: explain a wrong call": (
        partial(backends.explain, ops.squash, X, eps=0.0),
        ValueError,
        "eps: got 0.0",
    ),
    "verify: not an op": (
        partial(verify, torch.relu, X),
        TypeError,
        "op: got 'relu', need a function of mimnet_fast.ops",
    ),
    "verify: a module": (
        partial(verify, nn.Squash(), X),
        TypeError,
        "need a function of mimnet_fast",
    ),
    "verify: backend": (
        partial(verify, ops.squash, X, backend="cpu"),
        ValueError,
        "backend: got 'cpu'",
    ),
    "verify: a wrong call": (
        partial(verify, ops.squash, X, form="no"),
        ValueError,
        "form: got 'no'",
    ),
}

# Looks at lengths and ids, a module's first logits, and the copies that `verify` works on.
LOOKS = {"aminmax", "_local_scalar_dense", "select", "randn", "detach", "_to_copy"}
# Ops that refuse a wrong call themselves; what is wrong is looked for afterwards.
REFUSE = {op for op in ops.DIFFERENTIABLE if op != "squash"}


class NothingComputed(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        assert name in LOOKS | REFUSE, f"{name} ran before the arguments were checked"
        result = func(*args, **(kwargs or {}))
        assert name in LOOKS, f"{name} computed something"
        return result


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name):
    call, exception, message = WRONG[name]
    with NothingComputed(), pytest.raises(exception) as caught:
        call()
    assert caught.type is exception
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


def test_the_table_is_long_enough():
    assert len(WRONG) >= 60


@pytest.mark.parametrize("option", ["capsules", "iteration", "axis"])
def test_unknown_keywords(option):
    with pytest.raises(TypeError, match=option):
        ops.dynamic_routing(X, WK, **{option: 2})
    with pytest.raises(TypeError, match=option):
        nn.DynamicRouting(4, 4, 2, **{option: 2})(X)


@pytest.mark.parametrize("name", EVERY_OP)
def test_every_tensor_is_checked_for_dtype_and_device(name):
    """Whichever tensor is the odd one, an error names an argument; no kernel sees a mixture."""
    call = EVERY_OP[name]()
    if call.op is ops.squash:
        pytest.skip("squash takes one tensor")
    tensors = call.tensors()
    for i, tensor in enumerate(tensors):
        other = torch.float64 if tensor.is_floating_point() else torch.uint8
        for odd, exception in ((tensor.to(other), TypeError), (tensor.to("meta"), ValueError)):
            wrong = call.with_tensors([odd if j == i else t for j, t in enumerate(tensors)])
            with NothingComputed(), pytest.raises(exception, match=r"^[a-z0-9_.]+: (got|is on) "):
                wrong()


def refusal(call, **options):
    try:
        outputs = call.outputs(**options)
    except ValueError as error:
        return str(error)
    assert all(out.isfinite().all() for out in outputs)
    return None


@pytest.mark.parametrize("name", EVERY_OP)
def test_every_tensor_is_checked_for_shape(name):
    """One element more in any dimension of any tensor does not fit, or is another valid size.

    Compiled ops are the judges of their calls, and have to agree with the checks in Python.
    """
    call = EVERY_OP[name]()
    if call.op is ops.squash:
        pytest.skip("squash takes one tensor")
    tensors = call.tensors()
    rejected = 0
    for i, tensor in enumerate(tensors):
        for dim in range(tensor.dim()):
            larger = torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
            wrong = call.with_tensors([larger if j == i else t for j, t in enumerate(tensors)])
            message = refusal(wrong)
            assert message == refusal(wrong, backend="reference")
            if message is not None:  # else it fits: more items in a table, interests, candidates
                assert re.match(r"[a-z0-9_.]+: got ", message)
                rejected += 1
    assert rejected > 2 * len(tensors) / 3


@pytest.mark.parametrize("name", EVERY_OP)
def test_integers_where_numbers_belong(name):
    """All tensors of one dtype fit each other, and still no kernel can compute with integers."""
    wrong = EVERY_OP[name]().map(lambda t: t.long() if t.is_floating_point() else t)
    with NothingComputed(), pytest.raises(TypeError, match=r"^[a-z]+: got dtype torch.int64"):
        wrong()


class Caught(TorchDispatchMode):
    """The compiled ops that are called, with what they are called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mimnet_fast" and not func.name().endswith("_triton"):
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


needs_kernels = pytest.mark.skipif(
    backends.available()["native"] is not None, reason="the compiled kernels are missing"
)


@needs_kernels
@pytest.mark.parametrize("name", EVERY_OP)
def test_compiled_ops_refuse_what_does_not_fit(name):
    """Those who call `torch.ops` themselves get an error and no look beyond a tensor's end."""
    call = EVERY_OP[name]()
    if call.op is ops.squash:
        pytest.skip("squash takes one tensor")
    with Caught() as caught:
        call.gradients(backend="native")
    inputs = {arg.data_ptr() for arg in caught.calls[0][1] if isinstance(arg, torch.Tensor)}
    refused = 0
    for op, args in caught.calls:  # forward and backward
        for i, arg in enumerate(args):
            if isinstance(arg, torch.Tensor) and arg.data_ptr() in inputs:
                wrong = arg[None] if arg.dim() else arg.expand(2)
                with pytest.raises(RuntimeError, match=r"do not fit|need offsets"):
                    op(*args[:i], wrong, *args[i + 1 :])
                refused += 1
    assert refused > len(inputs)


@needs_kernels
@pytest.mark.parametrize("make", [routing_call, mimnet_call])
def test_compiled_ops_refuse_lengths_of_other_users(make):
    call = make(history="lengths")
    lengths = call.options["lengths"]
    with Caught() as caught:
        call(backend="native")
    ((op, args),) = caught.calls
    for wrong in (lengths[1:], lengths.repeat(2), lengths.float()):
        with pytest.raises(RuntimeError, match="do not fit"):
            op(*(wrong if arg is lengths else arg for arg in args))


def test_options_that_equal_valid_ones():
    """A number that was seen to be valid vouches for no equal value of another type."""
    logits = ones(1, 6, 5)
    ops.dynamic_routing(X, WK, logits, iterations=1, temperature=1.0)
    for option in ("iterations", "temperature"):
        with pytest.raises(TypeError, match=rf"^{option}: got bool"):
            ops.dynamic_routing(X, WK, logits, **{"iterations": 1, option: True})


def test_edges_that_are_no_errors():
    """What looks wrong and is documented to work."""
    assert ops.squash(ones(0, 3)).shape == (0, 3)
    assert ops.dynamic_routing(ones(0, 5, 4), WK).shape == (0, 6, 3)
    assert not ops.dynamic_routing(X, WK, lengths=torch.zeros(2).long()).any()
    assert not ops.dynamic_routing(X, WK, mask=torch.zeros(2, 5).bool()).any()
    assert not ops.dynamic_routing(X, WK, capsule_mask=torch.zeros(2, 6).bool()).any()
    absent = torch.zeros(5, 4).bool()
    assert not attention_call()(capsule_mask=absent).any()
    assert attention_call(c=0)().shape == (5, 0, 6)
    assert bridge_call(b=0)().shape == (0, 3, 6)
    assert fusion_call(b=0)().shape == (0, 6)
    assert mimnet_call(b=0)().shape == (0,)
    assert mimnet_call(b=0, ids=torch.int64)(table=ones(0, 4)).shape == (0,)
    assert routing_call(iterations=1)().shape == (5, 3, 5)

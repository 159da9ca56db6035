"""The ops on NumPy arrays: the numbers and the refusals of the ops on tensors."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import Call, catalogue_call, mimnet_call

_host = pytest.importorskip("mimnet_fast._host", reason="_host is not built")

DTYPES = [torch.float32, torch.float64, torch.float16]
STRIDES = {"contiguous": lambda a: a, "strided": lambda a: np.stack([a, a], -1)[..., 0]}


def arrays(value: Any, layout: Any = lambda a: a) -> Any:
    """Tensors as arrays, in the nesting that they have."""
    if isinstance(value, torch.Tensor):
        return layout(value.detach().numpy())
    if isinstance(value, tuple):
        return tuple(arrays(each, layout) for each in value)
    return value


def run(function: Any, call: Any, layout: Any = lambda a: a) -> Any:
    options = {name: arrays(value, layout) for name, value in call.options.items()}
    return function(*arrays(tuple(call.args), layout), **options)


@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", [None, torch.int32, torch.int64])
def test_mimnet_forward(dtype, ids, layout):
    for b, history in ((0, "all"), (1, "lengths"), (37, "lengths")):
        call = mimnet_call(b=b, ids=ids, history=history, dtype=dtype, one_logits=b == 37)
        ratings, interests = run(_host.mimnet_forward, call, STRIDES[layout])
        expected = call(backend="native")
        assert torch.equal(torch.from_numpy(ratings), expected)
        assert interests.shape == (b, 3, 4)
        assert interests.dtype == (np.float64 if dtype is torch.float64 else np.float32)


@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_catalogue_top_k(dtype, layout):
    for options in ({"seen": 5}, {"prototypes": None}, {"n": 3, "bias_dims": 1}, {"b": 0}):
        call = catalogue_call(dtype=dtype, **options)
        expected = call(backend="native")
        for found, wanted in zip(
            run(_host.catalogue_top_k, call, STRIDES[layout]), expected, strict=True
        ):
            assert torch.equal(torch.from_numpy(found), wanted)


def test_many_users_on_several_threads():
    call = catalogue_call(b=400, n=3000, d=8, seen=20)
    found, expected = run(_host.catalogue_top_k, call), call(backend="native")
    for each, wanted in zip(found, expected, strict=True):
        assert torch.equal(torch.from_numpy(each), wanted)


def changed(call: Call, **changes: Any) -> Call:
    """The call with arguments replaced, by position (``_0``) or by name."""
    args = list(call.args)
    for name in [name for name in changes if name.startswith("_")]:
        args[int(name[1:])] = changes.pop(name)
    return replace(call, args=tuple(args), options={**call.options, **changes})


def parameters(**changes: Any) -> Any:
    return mimnet_call().args[4]._replace(**changes)


zeros = torch.zeros
TWO = zeros(2, dtype=torch.int64)
REFUSED = {
    "source dtype": (mimnet_call, {"_1": zeros(5, 4, dtype=torch.int64)}),
    "source dims": (mimnet_call, {"_1": zeros(5)}),
    "item": (mimnet_call, {"_2": zeros(5, 3)}),
    "prototype": (mimnet_call, {"_3": zeros(5, 4, dtype=torch.float64)}),
    "history": (mimnet_call, {"_0": zeros(4, 6, 4)}),
    "history dims": (mimnet_call, {"_0": zeros(5, 6)}),
    "history id dtype": (mimnet_call, {"table": zeros(3, 4), "_0": zeros(5, 6)}),
    "history ids": (mimnet_call, {"table": zeros(3, 4), "_0": torch.full((5, 6), 3)}),
    "history ids below": (mimnet_call, {"table": zeros(3, 4), "_0": torch.full((5, 6), -1)}),
    "table": (mimnet_call, {"table": zeros(3, 5), "_0": torch.full((5, 6), 0)}),
    "lengths": (mimnet_call, {"lengths": torch.full((5,), 7)}),
    "lengths shape": (mimnet_call, {"lengths": TWO}),
    "lengths dtype": (mimnet_call, {"lengths": zeros(5)}),
    "logits": (mimnet_call, {"_5": zeros(2, 3, 6)}),
    "logits length": (mimnet_call, {"_5": zeros(1, 3, 5)}),
    "logits empty": (mimnet_call, {"_5": zeros(1, 0, 6)}),
    "routing_weight": (mimnet_call, {"_4": parameters(routing_weight=zeros(4, 3))}),
    "w1": (mimnet_call, {"_4": parameters(w1=zeros(7, 3))}),
    "b1": (mimnet_call, {"_4": parameters(b1=zeros(6))}),
    "w2": (mimnet_call, {"_4": parameters(w2=zeros(16, 6))}),
    "fine": (mimnet_call, {"_4": parameters(fine=(zeros(4, 4), zeros(4)))}),
    "coarse": (mimnet_call, {"_4": parameters(coarse=(zeros(4, 3), *parameters().fine[1:]))}),
    "fusion_weight": (mimnet_call, {"_4": parameters(fusion_weight=zeros(7))}),
    "fusion_bias": (mimnet_call, {"_4": parameters(fusion_bias=zeros(2))}),
    "iterations": (mimnet_call, {"iterations": 0}),
    "padding": (mimnet_call, {"padding": "zero"}),
    "interests": (catalogue_call, {"_0": zeros(5, 6)}),
    "interests empty": (catalogue_call, {"_0": zeros(5, 0, 6)}),
    "items": (catalogue_call, {"_1": zeros(40, 5)}),
    "items empty": (catalogue_call, {"_1": zeros(0, 6)}),
    "prototypes": (catalogue_call, {"prototype_ids": None}),
    "prototype_ids": (catalogue_call, {"prototype_ids": torch.full((40,), 3)}),
    "prototype_ids shape": (catalogue_call, {"prototype_ids": TWO}),
    "k": (catalogue_call, {"k": 0}),
    "exclude": (catalogue_call, {"exclude": TWO}),
    "exclude[0]": (catalogue_call, {"exclude": (torch.full((2,), 40), zeros(6).long())}),
    "exclude[1]": (catalogue_call, {"exclude": (TWO, zeros(6).long())}),
    "exclude[1] falls": (catalogue_call, {"exclude": (TWO, torch.tensor([0, 2, 1, 2, 2, 2]))}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_as_tensors_are(case):
    build, changes = REFUSED[case]
    call = changed(build(), **changes)
    with pytest.raises((ValueError, TypeError)) as expected:
        call()
    with pytest.raises(expected.type) as found:
        run(getattr(_host, call.op.__name__), call)
    argument = case.split()[0]
    assert argument in str(found.value).partition(":")[0]
    assert argument in str(expected.value).partition(":")[0]


def test_what_is_no_array_is_refused():
    call = catalogue_call()
    with pytest.raises(TypeError, match="interests: got Tensor, need a NumPy array"):
        _host.catalogue_top_k(*call.args, k=1)
    with pytest.raises(TypeError, match="fine: got int, need a tuple"):
        run(_host.catalogue_top_k, changed(call, _3=1))
    packed = np.zeros(5 * 4 * 6, [("flag", "u1"), ("value", "f4")])["value"].reshape(5, 4, 6)
    with pytest.raises(ValueError, match=r"interests: is a view whose strides .*contiguous"):
        _host.catalogue_top_k(packed, *arrays(tuple(call.args[1:])), k=1)

"""`swap` replaces what it can prove to be the same, in one instance, and takes it back."""

import copy
import re
import sys
from functools import partial
from types import SimpleNamespace

import lookalikes
import pytest
import torch
from lookalikes import CapsuleNetwork, D, K, L, named
from torch import nn
from torch.nn import functional as F

import mimnet_fast
from mimnet_fast import _adapters, backends, ops, register_adapter, swap

CASES = lookalikes.cases()
MODULE = sys.modules["mimnet_fast.swap"]  # the name in the package is the function


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """Adapters of one test are unknown to the next."""
    monkeypatch.setattr(MODULE, "_registered", [])


def outputs_and_gradients(module, inputs, seed=0):
    """By name, for one fixed random output gradient."""
    torch.manual_seed(seed)
    result = module(*inputs)
    floats = [out for out in (result if isinstance(result, tuple) else (result,)) if is_float(out)]
    torch.manual_seed(1)
    total = sum((out * torch.randn_like(out)).sum() for out in floats)
    wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
    wanted |= {f"input {i}": t for i, t in enumerate(inputs) if is_leaf(t)}
    grads = [None] * len(wanted)
    if total.requires_grad:
        grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    found = {f"output {i}": out.detach() for i, out in enumerate(floats)}
    for (name, leaf), grad in zip(wanted.items(), grads, strict=True):
        found[name] = torch.zeros_like(leaf) if grad is None else grad
    return found


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def is_leaf(value):
    return isinstance(value, torch.Tensor) and value.requires_grad


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Against what is large in it: sums cancel. Which rounding is right, the check has decided.
        assert torch.isfinite(value).all(), name
        assert (found[name] - value).abs().max() <= 1e-4 * (1e-2 + value.abs().max()), name


# Published models


@pytest.fixture(params=["MIND", "ComirecDR"])
def published(request):
    """A model of torch-rechub as published, and a batch."""
    matching = pytest.importorskip("torch_rechub.models.matching")
    from torch_rechub.basic.features import SequenceFeature, SparseFeature

    make = partial(SequenceFeature, vocab_size=50, embed_dim=16, pooling="concat")
    model = getattr(matching, request.param)(
        [SparseFeature("user", vocab_size=20, embed_dim=16)],
        [make("history", shared_with="item")],
        [SparseFeature("item", vocab_size=50, embed_dim=16)],
        [make("negative", shared_with="item")],
        max_length=10,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    batch = {
        "user": torch.randint(20, (32,)),
        "history": torch.randint(50, (32, 10)) * (torch.rand(32, 10) > 0.3),
        "item": torch.randint(1, 50, (32,)),
        "negative": torch.randint(1, 50, (32, 3)),
    }
    return model, (batch,)


def object_graph(model):
    modules = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    return modules, {name: id(p) for name, p in model.named_parameters()}, sorted(vars(model))


def test_published_model_keeps_its_numbers(published):
    model, inputs = published
    before = outputs_and_gradients(model, inputs)
    handle = swap(model, inputs)
    (row,) = handle.report
    assert (row.path, row.layer, row.adapter) == ("capsule", "CapsuleNetwork", "comirec")
    assert row.swapped, row
    assert row.worst.error <= row.worst.allowed
    assert_same(outputs_and_gradients(model, inputs), before)
    handle.undo()
    again = outputs_and_gradients(model, inputs)
    assert all(torch.equal(again[name], value) for name, value in before.items())


def test_undo_restores_the_object_graph(published):
    model, inputs = published
    graph, keys = object_graph(model), list(model.state_dict())
    attributes = [sorted(vars(module)) for module in model.modules()]
    handle = swap(model, inputs)
    assert object_graph(model) == graph, "the same objects while it is swapped"
    assert list(model.state_dict()) == keys
    handle.undo()
    handle.undo()
    assert object_graph(model) == graph
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert type(model.capsule).forward is type(copy.deepcopy(model.capsule)).forward


def train(model, optimiser, batch, steps, seed):
    losses = []
    for step in range(steps):
        torch.manual_seed(seed + step)
        loss = F.cross_entropy(model(batch), torch.zeros(32, dtype=torch.long))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_training_goes_on(published):
    model, inputs = published
    model.capsule.stop_grad = True
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    train(model, optimiser, *inputs, 3, seed=10)
    twin = copy.deepcopy(model)
    its_optimiser = torch.optim.Adam(twin.parameters(), lr=1e-3)
    its_optimiser.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    states = {id(p): id(state["exp_avg"]) for p, state in optimiser.state.items()}
    assert swap(model, inputs).report[0].swapped
    expected = train(twin, its_optimiser, *inputs, 5, seed=20)
    assert train(model, optimiser, *inputs, 5, seed=20) == pytest.approx(expected, rel=1e-4)
    assert {id(p): id(state["exp_avg"]) for p, state in optimiser.state.items()} == states


@pytest.mark.parametrize("first", ["swap", "compile"])
def test_compiles(published, first):
    model, inputs = published
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain = outputs_and_gradients(model, inputs)
    if first == "compile":
        assert_same(of_compiled(compiled, inputs), plain)
    handle = swap(compiled if first == "compile" else model, inputs)
    assert handle.report[0].swapped
    with backends.watch() as served:
        assert_same(of_compiled(compiled, inputs), plain)
    assert served, "it was compiled anew"
    handle.undo()
    assert_same(of_compiled(compiled, inputs), plain)


def of_compiled(compiled, inputs):
    found = outputs_and_gradients(compiled, inputs)
    return {name.removeprefix("_orig_mod."): value for name, value in found.items()}


def test_lives_on_as_the_model_does(published, tmp_path):
    model, inputs = published
    swap(model, inputs)
    model.eval()
    twin = copy.deepcopy(model)
    assert twin.capsule.forward.__self__ is twin.capsule, "a copy runs its own layer"
    torch.save(model.state_dict(), tmp_path / "model.pt")
    twin.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    torch.manual_seed(0)
    out = twin.train()(*inputs)
    torch.manual_seed(0)
    assert torch.equal(model(*inputs), out)
    with backends.watch() as served:
        twin.capsule.to(torch.float64)(torch.randn(3, 10, 16).double(), torch.ones(3, 10))
    assert [call.op for call in served] == ["dynamic_routing"]


# Adapters


@pytest.mark.parametrize("name", CASES)
def test_adapter(name):
    case = CASES[name]
    layer, inputs = case.make(), case.inputs()
    for tensor in inputs:
        if is_float(tensor):
            tensor.requires_grad_()
    before = outputs_and_gradients(layer, inputs)
    handle = swap(layer, inputs)
    row = next(row for row in handle.report if row.path == "(the model)")
    assert row.adapter == case.adapter
    assert row.swapped, f"\n{handle.report}"
    assert name.endswith("train_tgt") or " on " in row.outcome
    assert_same(outputs_and_gradients(layer, inputs), before)


@pytest.mark.parametrize(
    "name", {case.adapter: name for name, case in CASES.items() if "train_tgt" not in name}.values()
)
def test_adapter_compiles(name):
    layer, inputs = CASES[name].make(), CASES[name].inputs()
    swap(layer, check=False)
    eager = outputs_and_gradients(layer, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same(of_compiled(compiled, inputs), eager)


def test_every_adapter_has_a_case():
    tested = {case.adapter for case in CASES.values()}
    left_alone = {"kept_logits", "batch_capsules"}
    assert {adapter.__name__ for adapter in _adapters.ADAPTERS} == tested | left_alone


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("easyrec", torch.float64), ("gram", torch.float64), ("adambielski", torch.bfloat16)],
)
def test_adapter_in_other_dtypes(name, dtype):
    layer = CASES[name].make().to(dtype)
    inputs = [t.to(dtype) if is_float(t) else t for t in CASES[name].inputs()]
    (row, *_) = swap(layer, inputs).report
    assert row.swapped, row


def test_half_precision_that_becomes_single():
    layer, (inputs,) = CASES["xifengguo"].make().bfloat16(), CASES["xifengguo"].inputs()
    (row,) = swap(layer, (inputs.bfloat16(),)).report
    assert row.outcome == (
        "its replacement returns bfloat16 [5, 3, 5], the layer float32 [5, 3, 5]"
    )


def test_nested_layers_are_swapped_together():
    model, inputs = (
        CASES["mimnet-model-train_meta"].make(),
        CASES["mimnet-model-train_meta"].inputs(),
    )
    rows = {row.path: row for row in swap(model, inputs).report}
    assert set(rows) == {"(the model)", "capsule_bridge.capsuleLayer"}
    assert all(row.swapped for row in rows.values())
    with backends.watch() as served:
        model(*inputs)
    assert [call.op for call in served] == [
        "dynamic_routing", "interest_bridge", "multi_granularity_attention",
        "dynamic_routing", "interest_bridge", "target_attention",
    ]  # fmt: skip


def test_shared_layer_is_swapped_once():
    layer = lookalikes.DenseCapsule()
    model = nn.ModuleDict({"one": layer, "other": nn.Sequential(layer)})
    model.forward = lambda x: model["one"](x) + model["other"](x)
    handle = swap(model, CASES["xifengguo"].inputs())
    (row,) = handle.report
    assert row.path == "one, other.0"
    assert row.swapped
    handle.undo()
    assert "forward" not in vars(layer)


# Left alone


def unmatchable():
    return {
        "timomernick": named("CapsuleLayer", lookalikes.MeanLogits)(
            in_units=8, num_units=K, use_routing=True
        ),
        "jindongwang": named("DigitCaps", lookalikes.MeanLogits)(num_routes=L, num_capsules=K),
        "fun-rec": named("CapsuleLayer", lookalikes.KeptLogits)(),
        "mimnet ablation": named("MFBasedModel", lookalikes.MIMNetModel)(wo_capsule=1),
    }


@pytest.mark.parametrize("name", unmatchable())
def test_unmatchable_layer_is_reported(name):
    layer = unmatchable()[name]
    rows = [row for row in swap(layer, check=False).report if row.path == "(the model)"]
    assert [row.swapped for row in rows] == [False]
    assert "forward" not in vars(layer)
    assert re.search("over the batch|no kernel", rows[0].outcome)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (CapsuleNetwork(0, routing_times=0), "routing_times is 0"),
        (named("CapsuleLayer", lookalikes.EasyRecCapsules)(scale=0.0), "no softmax temperature"),
    ],
)
def test_option_without_a_counterpart(layer, reason):
    (row,) = swap(layer, check=False).report
    assert not row.swapped
    assert reason in row.outcome


def test_changed_parts_are_left_alone():
    layer = CapsuleNetwork(0)
    layer.linear = nn.Linear(D, D)
    assert "not a plain linear" in swap(layer, check=False).report[0].outcome
    model = lookalikes.MFBasedModel()
    model.meta_net.decoder.append(nn.Dropout())
    assert "not Linear, ReLU, Linear" in swap(model, check=False).report[0].outcome
    model = named("MFBasedModel", lookalikes.MIMNetModel)()
    model.capsule_bridge.decoder[1] = nn.Tanh()
    assert "not Linear, ReLU, Linear" in swap(model, check=False).report[0].outcome


def test_layers_of_no_adapter_are_not_in_the_report():
    primary = named("CapsuleLayer", lookalikes.GramCapsules)(num_route_nodes=-1)
    handle = swap(nn.Sequential(primary, nn.Linear(3, 3)), check=False)
    assert len(handle.report) == 0
    assert "register_adapter" in str(handle.report)


def test_unreached_layer():
    layer = CASES["mimnet"].make()
    model = nn.ModuleDict({"capsules": layer, "other": nn.Linear(2, 2)})
    model.forward = lambda x: model["other"](x)
    (row,) = swap(model, (torch.ones(2),)).report
    assert not row.swapped
    assert "do not reach it" in row.outcome


# The check


class Liar(lookalikes.DenseCapsule):
    """Squashes a little less than it should."""

    def forward(self, x):
        return 1.001 * super().forward(x)


class Tempered(named("CapsuleLayer", lookalikes.MIMNetCapsules)):
    """The same numbers, with other gradients."""

    def forward(self, behavior_embs, seq_len):
        out = super().forward(behavior_embs, seq_len)
        return out.detach() + 1.01 * (out - out.detach())


class Zeroed(CapsuleNetwork):
    def forward(self, item_eb, mask, device):
        return super().forward(item_eb, mask, device)[:, :1]


@pytest.mark.parametrize(
    ("name", "case", "change", "told"),
    [
        ("DenseCapsule", "xifengguo", Liar, "output is "),
        ("CapsuleLayer", "mimnet", Tempered, "grad of "),
        ("CapsuleNetwork", "comirec-2", lambda: Zeroed(2), "returns float32 [5, 3, 5], the layer"),
    ],
)
def test_a_layer_that_computes_something_else_is_refused(name, case, change, told):
    layer = change()
    layer.__class__.__name__ = name
    inputs = CASES[case].inputs()
    before = outputs_and_gradients(layer, inputs)
    handle = swap(layer, inputs)
    (row,) = handle.report
    assert not row.swapped
    assert told in row.outcome
    if row.worst:
        assert row.worst.error > row.worst.allowed
        assert f"{row.worst.error:.1e}" in row.outcome
    after = outputs_and_gradients(layer, inputs)
    assert all(torch.equal(after[name], value) for name, value in before.items())


MUTATIONS = [
    ("comirec-0", {"softmax_over": "capsules"}),
    ("comirec-0", {"padding": "fill_before"}),
    ("comirec-0", {"iterations": 2}),
    ("comirec-2", {"eps": 1e-2}),
    ("comirec-1", {"gradient": "full"}),
    ("comirec-0-stop_grad=False", {"gradient": "last"}),
    ("mimnet", {"padding": "zero_after"}),
    ("mimnet", {"softmax_over": "inputs"}),
    ("easyrec", {"update": "accumulate"}),
    ("easyrec", {"normalize_agreement": False}),
    ("easyrec", {"temperature": 1.0}),
    ("easyrec", {"final_squash": True}),
    ("easyrec", {"inner_squash": True}),
    ("xifengguo", {"eps": 1e-2}),
    ("xifengguo", {"gradient": "full"}),
    ("danielhavir", {"softmax_over": "inputs"}),
    ("gram", {"gradient": "last"}),
    ("gram", {"final_squash": False}),
    ("adambielski", {"iterations": 3}),
    ("adambielski-votes", {"softmax_over": "inputs"}),
]


@pytest.mark.parametrize(("name", "wrong"), MUTATIONS)
def test_a_wrong_option_is_caught(name, wrong, monkeypatch):
    def mutated(*args, **kwargs):
        return ops.dynamic_routing(*args, **{**kwargs, **wrong})

    monkeypatch.setattr(_adapters, "ops", SimpleNamespace(dynamic_routing=mutated))
    (row, *_) = swap(CASES[name].make(), CASES[name].inputs()).report
    assert not row.swapped, row
    assert "allowed" in row.outcome


def test_another_draw_of_the_logits_is_caught(monkeypatch):
    layer, inputs = CASES["mimnet"].make(), CASES["mimnet"].inputs()

    def transposed(mean, std, shape, device):
        return torch.randn(shape[0], shape[2], shape[1], device=device).mT

    torch_of_adapter = SimpleNamespace(normal=transposed, arange=torch.arange)
    monkeypatch.setattr(_adapters, "torch", torch_of_adapter)
    assert not swap(layer, inputs).report[0].swapped


def test_a_layer_with_random_numbers_of_its_own_is_refused():
    """Else the difference of its draws would be the tolerance."""
    drawn = torch.Generator()

    class OwnDraw(lookalikes.DenseCapsule):
        def forward(self, x):
            return super().forward(x) * torch.rand(K, 1, generator=drawn, device="cpu").to(x)

    layer = named("DenseCapsule", OwnDraw)()
    (row,) = swap(layer, CASES["xifengguo"].inputs()).report
    assert not row.swapped
    assert "nothing can be compared with that" in row.outcome


def test_not_finite_is_refused():
    case = CASES["gram"]
    inputs = case.inputs()
    inputs[0][0] = 0  # its squash divides 0 by 0, ours does not
    (row,) = swap(case.make(), inputs).report
    assert not row.swapped
    assert "nan" in row.outcome


def test_every_call_of_a_layer_is_checked():
    layer = lookalikes.DenseCapsule()

    def only_the_first_is_right(layer, x):
        out = type(layer).forward(layer, x)
        return out if len(x) == lookalikes.B else 2 * out

    model = nn.ModuleDict({"layer": layer})
    model.forward = lambda x: model["layer"](x).sum() + model["layer"](x[1:]).sum()
    register_adapter(lambda layer: only_the_first_is_right if is_dense(layer) else None)
    assert not swap(model, (lookalikes.history(),)).report[0].swapped


def test_nothing_of_the_model_changes():
    layer = lookalikes.RoutingCapsules()
    model = nn.Sequential(nn.BatchNorm1d(L), nn.Dropout(), layer)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    inputs, calls = CASES["danielhavir"].inputs(), []
    random = torch.get_rng_state()
    layer.register_forward_hook(lambda *_: calls.append(1))
    assert swap(model, inputs).report[0].swapped
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert calls == [1], "the run of the model, and no call of the check"
    model(*inputs)
    assert calls == [1, 1], "hooks go on"


def test_error_in_the_model_leaves_no_trace():
    model = nn.Sequential(lookalikes.DenseCapsule(), nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        swap(model, CASES["xifengguo"].inputs())
    assert not any("forward" in vars(module) for module in model.modules())


def test_unchecked():
    layer, inputs = CASES["gram"].make(), CASES["gram"].inputs()
    (row,) = swap(layer, check=False).report
    assert (row.swapped, row.outcome, row.worst) == (True, "not checked", None)
    assert layer(*inputs).shape == (K, lookalikes.B, 1, 1, D)


# The handle


def test_context_manager():
    layer, inputs = CASES["mimnet"].make(), CASES["mimnet"].inputs()
    with swap(layer, inputs) as handle:
        assert handle.report[0].swapped
        assert "forward" in vars(layer)
    assert "forward" not in vars(layer)
    with pytest.raises(ZeroDivisionError), swap(layer, inputs):
        1 / 0  # noqa: B018
    assert "forward" not in vars(layer)


def test_second_swap_leaves_the_first():
    layer, inputs = CASES["mimnet"].make(), CASES["mimnet"].inputs()
    first = swap(layer, inputs)
    second = swap(layer, inputs)
    assert "was replaced before" in second.report[0].outcome
    second.undo()
    assert "forward" in vars(layer)
    first.undo()
    assert "forward" not in vars(layer)


def test_undo_leaves_what_came_later():
    layer, inputs = CASES["mimnet"].make(), CASES["mimnet"].inputs()
    handle = swap(layer, inputs)
    layer.forward = later = lambda *args: None
    handle.undo()
    assert layer.forward is later


def test_only_this_instance():
    one, other = CASES["mimnet"].make(), CASES["mimnet"].make()
    swap(one, check=False)
    assert "forward" not in vars(other)
    assert type(one).forward is lookalikes.MIMNetCapsules.forward


def test_report_prints_as_a_table():
    model = nn.ModuleDict({"capsules": CASES["gram"].make(), "odd": unmatchable()["jindongwang"]})
    model.forward = lambda x: model["capsules"](x)
    lines = str(swap(model, CASES["gram"].inputs()).report).splitlines()
    assert lines[0].split() == ["layer", "class", "adapter", "error", "/", "allowed", "outcome"]
    assert re.search(
        r"capsules +CapsuleLayer +gram_capsules +\S+e-\d+ / \S+e-\d+ +dynamic_", lines[1]
    )
    assert "left alone: it averages its logits over the batch" in lines[2]


def test_report_says_where_nothing_is_gained():
    inputs = CASES["mimnet"].inputs()
    with mimnet_fast.use_backend("reference"):
        (row,) = swap(CASES["mimnet"].make(), inputs).report
    assert row.outcome == "dynamic_routing on reference"
    if backends.available(inputs[0].device.type)["native"] is None:
        (row,) = swap(CASES["mimnet"].make(), inputs).report
        assert row.outcome == "dynamic_routing on native"


# One's own adapters


def is_dense(layer):
    return isinstance(layer, lookalikes.DenseCapsule)


def test_own_adapter_comes_first():
    @register_adapter
    def mine(layer):
        return (lambda layer, x: type(layer).forward(layer, x)) if is_dense(layer) else None

    (row,) = swap(CASES["xifengguo"].make(), CASES["xifengguo"].inputs()).report
    assert (row.adapter, row.swapped, row.outcome) == ("mine", True, "no op")


def test_layer_that_takes_dictionaries():
    class Both(nn.Module):
        def forward(self, one, other, *, scale):
            return one["x"] @ other["x"], scale.long()

    calls = []

    @register_adapter
    def both(layer):
        def forward(layer, one, other, *, scale):
            calls.append((one["x"].shape, other["x"].shape))
            return one["x"] @ other["x"], scale.long()

        return forward if isinstance(layer, Both) else None

    layer, tensors = Both(), ({"x": torch.randn(2, 3)}, {"x": torch.randn(3, 4)})
    model = nn.ModuleList([layer])
    model.forward = lambda *inputs: layer(*inputs, scale=torch.ones(()))
    (row,) = swap(model, tensors).report
    assert row.swapped, row
    assert calls == [((2, 3), (3, 4))]


def test_own_adapter_that_fails_is_told():
    @register_adapter
    def mine(layer):
        return (lambda layer, y: y.no_such_attribute) if is_dense(layer) else None

    (row,) = swap(CASES["xifengguo"].make(), CASES["xifengguo"].inputs()).report
    assert not row.swapped
    assert "the check raised AttributeError" in row.outcome


def test_own_adapter_that_keeps_its_layer():
    @register_adapter
    def mine(layer):
        return (lambda _, x: layer(x)) if is_dense(layer) else None

    with pytest.raises(ValueError, match="use the first argument instead"):
        swap(lookalikes.DenseCapsule(), check=False)


def test_own_adapter_that_returns_nonsense():
    register_adapter(lambda layer: 3)
    with pytest.raises(TypeError, match="returned int, need a func"):
        swap(lookalikes.DenseCapsule(), check=False)
    with pytest.raises(TypeError, match="adapter: got int"):
        register_adapter(3)


# Arguments


def test_arguments():
    layer = CASES["mimnet"].make()
    with pytest.raises(TypeError, match=r"model: got type, need a torch.nn.Module instance"):
        swap(nn.Linear)
    with pytest.raises(ValueError, match=r"example_inputs: got None.*pass check=False"):
        swap(layer)
    with pytest.raises(TypeError, match=r"example_inputs: got dict, need a tuple"):
        swap(layer, {"x": 1})
    with pytest.raises(TypeError, match=r"example_inputs: got Tensor, need a tuple"):
        swap(layer, torch.ones(3))

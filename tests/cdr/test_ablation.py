"""MIMNet without a part is MIMNet but for that part."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from torch import Tensor
from typer.testing import CliRunner

from mimnet_fast.cdr import reports
from mimnet_fast.cdr.cli import app
from mimnet_fast.cdr.config import Base, Config
from mimnet_fast.cdr.dataset import Dataset
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.experiment import BIASED_AVERAGING, BaseModels, run
from mimnet_fast.cdr.grids import Plan, Variant, run_grid
from mimnet_fast.cdr.models import (
    ABLATIONS,
    TRAINABLE,
    Ablation,
    FrozenInputs,
    MIMNet,
)
from mimnet_fast.cdr.models.ablation import Part
from mimnet_fast.cdr.profiles import WIDTH

QUIET = Progress(disable=True)
FEATURES, HIDDEN, LENGTH, USERS = 4, 6, 5, 8
SIZES = {"interests": 3, "iterations": 2, "history_length": LENGTH, "backend": "reference"}
ITEMS = torch.arange(USERS) % 7


@pytest.fixture
def inputs() -> FrozenInputs:
    lengths = torch.tensor([5, 0, 1, 3, 2, 5, 4, 1])
    histories = torch.randint(10, (USERS, LENGTH))
    histories[torch.arange(LENGTH) >= lengths[:, None]] = 10
    source_items = torch.randn(11, FEATURES)
    source_items[10] = 0
    return FrozenInputs(
        histories=histories,
        lengths=lengths,
        source_users=torch.randn(USERS, FEATURES),
        source_items=source_items,
        target_users=torch.randn(USERS, FEATURES),
        target_items=torch.randn(7, FEATURES),
        item_prototypes=torch.randn(7, FEATURES),
    )


def make(without: Collection[Part]) -> Ablation:
    return Ablation(FEATURES, HIDDEN, without=without, **SIZES)


def rate(model: torch.nn.Module, inputs: FrozenInputs, seed: int | None = None) -> Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return model(inputs, torch.arange(USERS), ITEMS, generator)


def test_without_nothing_it_is_mimnet(inputs: FrozenInputs) -> None:
    whole, parts = MIMNet(FEATURES, HIDDEN, **SIZES), make([])
    state = {
        name.replace("extract.", "").replace("attend.", "attention."): tensor
        for name, tensor in parts.state_dict().items()
    }
    whole.load_state_dict(state)
    for seed in (None, 3):
        torch.testing.assert_close(rate(parts, inputs, seed), rate(whole, inputs, seed))


def attention(query: Tensor, interests: Tensor, layer: torch.nn.Module) -> Tensor:
    keys = interests @ layer.key_weight.T + layer.key_bias
    values = interests @ layer.value_weight.T + layer.value_bias
    weights = torch.einsum("bd,bkd->bk", query, keys).softmax(-1)
    return torch.einsum("bk,bkd->bd", weights, values)


@pytest.mark.parametrize("without", [["fine"], ["coarse"], ["fusion"], ["fine", "coarse"]])
def test_what_is_left_of_the_attention(inputs: FrozenInputs, without: list[Part]) -> None:
    model = make(without)
    history = inputs.source_items[inputs.histories]
    interests = model.extract(history, inputs.lengths, None)
    transferred = model.bridge(interests, inputs.source_users)
    item, prototype = inputs.target_items[ITEMS], inputs.item_prototypes[ITEMS]
    left = []
    if "fine" not in without:
        left.append(attention(item, transferred, model.attend.fine))
    if "coarse" not in without:
        left.append(attention(prototype, transferred, model.attend.coarse))
    user = sum(left) / len(left) if left else transferred.mean(1)
    torch.testing.assert_close(rate(model, inputs), (user * item).sum(-1))


def test_maps_of_the_mean_in_place_of_capsules(inputs: FrozenInputs) -> None:
    model = make(["capsules"])
    history = inputs.source_items[inputs.histories]
    interests = model.extract(history, inputs.lengths, None)
    assert interests.shape == (USERS, 3, FEATURES)
    for user, length in enumerate(inputs.lengths.tolist()):
        mean = history[user, :length].mean(0) if length else torch.zeros(FEATURES)
        for k in range(3):
            rows = slice(k * FEATURES, (k + 1) * FEATURES)
            expected = model.extract.maps.weight[rows] @ mean + model.extract.maps.bias[rows]
            torch.testing.assert_close(interests[user, k], expected)
    assert rate(model, inputs, 1).equal(rate(model, inputs)), "nothing is random in it"


def test_one_bridge_of_the_mean_interest(inputs: FrozenInputs) -> None:
    model, whole = make(["bridges"]), make([])
    whole.load_state_dict(model.state_dict())
    seen = []
    model.bridge.register_forward_hook(lambda layer, given, out: seen.append(given[0]))
    ratings = rate(model, inputs)
    interests = whole.extract(inputs.source_items[inputs.histories], inputs.lengths, None)
    torch.testing.assert_close(seen[0], interests.mean(1, keepdim=True))
    assert not torch.allclose(ratings, rate(whole, inputs))


def test_every_ablation_trains_all_of_its_parameters(inputs: FrozenInputs) -> None:
    config = Config(features=FEATURES, hidden=HIDDEN, interests=3, backend="reference")
    wide = FrozenInputs(
        **{
            **vars(inputs),
            "histories": torch.nn.functional.pad(inputs.histories, (0, 15), value=10),
        }
    )

    for name, spec in ABLATIONS["mimnet"].items():
        model = spec.build(config)
        rate(model, wide, 0).square().sum().backward()
        missing = [key for key, each in model.named_parameters() if each.grad is None]
        assert not missing, f"{name}: {missing}"
    assert isinstance(TRAINABLE["single-interest"].build(config), MIMNet)
    assert TRAINABLE["single-interest"].build(config).evaluation_logits.shape == (1, 1, 20)


@pytest.mark.parametrize(("model", "base"), [("mimnet", "biased-mf"), ("mimnet-released", "mf")])
def test_ablations_run_in_a_grid(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, base: Base
) -> None:
    monkeypatch.setattr(reports, "PLOTS", False)
    config = Config(base=base, base_epochs=1, epochs=1, prototypes=5, backend="reference")
    names = (model, *ABLATIONS[model])
    variants = tuple(Variant(name, TRAINABLE[name].title, name) for name in names)
    plan = Plan("ablate", variants, (0.25,), (2,), reference=model)
    found = run_grid(dataset, config, plan, tmp_path, QUIET)
    rows = {row["name"]: row for row in found["rows"] if not row["trivial"]}
    assert list(rows) == list(names)
    assert len({row["honest"]["mae"]["mean"] for row in rows.values()}) == len(names)
    assert len(list(tmp_path.glob("**/source.safetensors"))) == 1


def test_what_biased_mf_adds_is_left_out_one_by_one(dataset: Dataset, tmp_path: Path) -> None:
    config = Config(beta=0.25, base="biased-mf", base_epochs=1, prototypes=5)
    stage1 = BaseModels(dataset, config, tmp_path, QUIET)
    profiled = config.features + WIDTH
    for name, width, weighted, averaging in (
        ("mimnet", profiled, True, BIASED_AVERAGING),
        ("no-profiles", config.features, True, BIASED_AVERAGING),
        ("no-user-weights", profiled, False, BIASED_AVERAGING),
        ("no-averaging", profiled, True, 0.0),
    ):
        job = stage1.job(name, "final", torch.Generator())
        inputs = stage1.frozen("final", job.module)
        tables = inputs.source_users, inputs.source_items, inputs.target_items
        assert {table.shape[1] for table in tables} == {width}
        assert (inputs.user_weights is not None) == weighted
        assert job.schedule.averaging == averaging
        job.loss(*(column[:9] for column in job.examples)).backward()
    with pytest.raises(UserError, match="'no-profiles', but base mf has nothing that it leaves ou"):
        run(dataset, replace(config, base="mf"), ["no-profiles"], tmp_path / "mf", QUIET)


def test_the_command_takes_the_ablations_of_the_base(prepared: Path, tmp_path: Path) -> None:
    quick = ["--base-epochs", 1, "--epochs", 1, "--seeds", 1, "--prototypes", 5]
    arguments = ["ablate", prepared, "--out", tmp_path, "--without", "no-profiles", *quick]
    refused, done = (
        CliRunner().invoke(app, [*map(str, arguments), "--base", base])
        for base in ("mf", "biased-mf")
    )
    assert refused.exit_code == 2
    assert "base mf has nothing that it leaves out: need base biased-mf" in refused.stderr
    assert done.exit_code == 0, done.output
    assert "no profiles" in done.stdout
    assert "no fine attention" not in done.stdout

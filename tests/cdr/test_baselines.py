"""The baselines: each against its equations, and on data with planted interests."""

from typing import Any, get_args

import pytest
import torch
from rich.progress import Progress
from torch.testing import assert_close

from mimnet_fast.cdr.cli import ModelName
from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset, Ratings, prepare
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.experiment import run
from mimnet_fast.cdr.models import MODELS, TRIVIAL, FrozenInputs, JointTables, MatrixFactorization
from mimnet_fast.cdr.models.emcdr import EMCDR
from mimnet_fast.cdr.protocol import Phase, split
from mimnet_fast.cdr.synthetic import Synthetic
from mimnet_fast.cdr.training import seeded_generator

BASELINES = ("emcdr", "cmf")
USERS = torch.tensor([4, 1, 8])


@pytest.fixture
def phase() -> Phase:
    """Users 1, 4 and 8 are known in both domains; of the target only, there is user 9."""
    train = Ratings(
        torch.tensor([4, 1, 4, 9, 8]), torch.arange(5), torch.tensor([1.0, 5.0, 2.0, 3.0, 4.0])
    )
    return Phase(train, train.where(train.users < 9), train.where(train.users == 0))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("learned")
    Synthetic(users=400, items=60, topics=4, interests=2, ratings_per_user=24).generate(folder, 1)
    prepare(folder / "source.csv", folder / "target.csv", folder / "dataset")
    config = Config(seed=1, base_epochs=20, base_batch_size=64, epochs=15, batch_size=16)
    found = run(
        Dataset.load(folder / "dataset"), config, BASELINES, folder / "run", Progress(disable=True)
    )
    return found["models"]


@pytest.mark.parametrize("name", BASELINES)
def test_planted_interests_are_learned(learned: dict[str, Any], name: str) -> None:
    best_trivial = min(learned[trivial]["honest"]["mae"] for trivial in TRIVIAL)
    assert learned[name]["honest"]["mae"] < BELOW[name] * best_trivial


BELOW = {"emcdr": 0.6, "cmf": 0.6}
"""Share of the best trivial predictor's error that a model has to stay below."""


def test_command_line_knows_all_models() -> None:
    assert set(get_args(ModelName)) == {*MODELS, "all"}


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_emcdr_is_its_equation(inputs: FrozenInputs, phase: Phase, kind: Any) -> None:
    model = EMCDR(10, kind)
    source, target = inputs.source_users, inputs.target_users
    if kind == "linear":
        (matrix,) = model.parameters()
        mapped = source @ matrix.T
    else:
        w1, b1, w2, b2 = model.parameters()
        assert w1.shape == (20, 10)
        mapped = torch.tanh(source @ w1.T + b1) @ w2.T + b2
    assert_close(
        model(inputs, USERS, USERS + 1),
        torch.stack([mapped[user] @ inputs.target_items[user + 1] for user in USERS]),
    )
    (users,) = model.examples(inputs, phase)
    assert users.tolist() == [1, 4, 8]
    loss = model.loss(inputs, (users,), seeded_generator(1, "x"))
    assert_close(loss, (mapped[users] - target[users]).square().mean())
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_unknown_mapping_is_refused() -> None:
    with pytest.raises(UserError, match="mapping: got 'affine', need one of linear, mlp"):
        Config(mapping="affine")  # type: ignore[arg-type]


def test_cmf_shares_the_users_of_both_domains(dataset: Dataset) -> None:
    tables = JointTables.of(dataset)
    data = split(dataset, 0.25, 7)
    model = MatrixFactorization(tables.users, tables.items, 3)
    users, items, values = tables.examples(data.train_source, data.final)
    source, target = data.train_source, data.final.train_target
    assert values.equal(torch.cat([source.values, target.values]))
    seen: dict[tuple[bool, int], int] = {}
    for row, (user, item) in enumerate(zip(users.tolist(), items.tolist(), strict=True)):
        in_target = row >= len(source)
        part, at = (target, row - len(source)) if in_target else (source, row)
        person, thing = int(part.users[at]), int(part.items[at])
        shared = person < dataset.num_overlap
        assert seen.setdefault((in_target and not shared, person), user) == user
        assert (user >= dataset.num_source_users) == (in_target and not shared)
        assert item == thing + in_target * dataset.num_source_items
    assert len(set(seen.values())) == len(seen)
    test = data.final.evaluation
    expected = [
        model.users.weight[user] @ model.items.weight[dataset.num_source_items + item]
        for user, item in zip(test.users.tolist(), test.items.tolist(), strict=True)
    ]
    assert_close(tables.predict(model)(test.users, test.items), torch.stack(expected))

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean, median

import pytest
import torch

from mimnet_fast.cdr.biases import fit_split
from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset, Ratings
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.evaluation import errors, evaluate
from mimnet_fast.cdr.losses import SquaredError
from mimnet_fast.cdr.models import (
    MODELS,
    TRIVIAL,
    FrozenInputs,
    TransferModel,
    item_prototypes,
    trivial,
)
from mimnet_fast.cdr.models.ptupcdr import PTUPCDR
from mimnet_fast.cdr.protocol import split
from mimnet_fast.cdr.training import (
    adam,
    seeded_generator,
    seeded_module,
    training_step,
)

from .marks import needs_kernels

TRANSFER = [name for name, spec in MODELS.items() if spec.build is not None]


def build(name: str, config: Config) -> TransferModel:
    make = MODELS[name].build
    assert make is not None
    return seeded_module(lambda: make(config), 1, name)


@pytest.mark.parametrize("name", TRANSFER)
def test_predictions_repeat_and_do_not_depend_on_the_batch(inputs: FrozenInputs, name: str) -> None:
    model = build(name, Config())
    users, items = torch.arange(9), torch.arange(9) * 3
    with torch.no_grad():
        together = model(inputs, users, items)
        assert together.isfinite().all()
        assert together.equal(model(inputs, users, items))
        if name == "mimnet-released":
            return  # has logits of its own for every row
        alone = torch.cat([model(inputs, users[i : i + 1], items[i : i + 1]) for i in range(9)])
        torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("name", TRANSFER)
def test_users_with_several_ratings_are_predicted_as_in_a_batch(
    inputs: FrozenInputs, name: str
) -> None:
    model = build(name, Config())
    users, items = torch.tensor([8, 0, 3, 8, 3, 8, 5]), torch.tensor([1, 0, 29, 4, 4, 1, 7])
    with torch.no_grad():
        torch.testing.assert_close(model.predict(inputs, users, items), model(inputs, users, items))


@pytest.mark.parametrize("name", [name for name in TRANSFER if name != "mimnet-released"])
def test_padding_is_never_seen(inputs: FrozenInputs, name: str) -> None:
    model = build(name, Config())
    poisoned = inputs.source_items.clone()
    poisoned[30] = 1e3
    users, items = torch.arange(9), torch.arange(9)
    with torch.no_grad():
        torch.testing.assert_close(
            model(inputs, users, items),
            model(replace(inputs, source_items=poisoned), users, items),
        )


def test_mimnet_draws_logits_in_training_only(inputs: FrozenInputs) -> None:
    model, pair = build("mimnet", Config()), (torch.tensor([7]), torch.tensor([2]))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        first, second = (model(inputs, *pair, generator=generator) for _ in range(2))
        assert not first.equal(second)
        assert first.equal(model(inputs, *pair, generator=torch.Generator().manual_seed(1)))


@needs_kernels
def test_first_losses_of_kernels_and_reference_agree(inputs: FrozenInputs) -> None:
    draw = torch.Generator().manual_seed(2)
    users, items = (
        torch.randint(9, (50, 128), generator=draw),
        torch.randint(30, (50, 128), generator=draw),
    )
    values = torch.randint(1, 6, (50, 128), generator=draw).float()
    losses = {}
    for backend in ("native", "reference"):
        model = build("mimnet", Config(backend=backend))
        optimizer, generator = adam(model, 0.01), seeded_generator(3, "logits")

        def predict(u, i, model=model, generator=generator):
            return model(inputs, u, i, generator=generator)

        losses[backend] = torch.stack(
            [
                training_step(optimizer, SquaredError(predict), *batch)
                for batch in zip(users, items, values, strict=True)
            ]
        )
    assert losses["reference"][-1] < losses["reference"][0]
    torch.testing.assert_close(losses["native"], losses["reference"], rtol=1e-5, atol=0)


def test_ptupcdr_is_its_equation(inputs: FrozenInputs) -> None:
    model = PTUPCDR(10, 16)
    linear, _, h = model.score
    for user in range(9):
        history = inputs.source_items[inputs.histories[user, : inputs.lengths[user]]]
        scores = torch.relu(history @ linear.weight.T + linear.bias) @ h.weight[0]
        pooled = scores.softmax(0) @ history
        bridge = model.bridge
        hidden = torch.relu(bridge.w1 @ pooled + bridge.b1)
        matrix = (bridge.w2 @ hidden + bridge.b2).view(10, 10)
        expected = inputs.source_users[user] @ matrix @ inputs.target_items[4]
        found = model(inputs, torch.tensor([user]), torch.tensor([4]))[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_trivial_predictors_are_what_they_say(dataset: Dataset) -> None:
    data = split(dataset, 0.25, 7)
    train, test = data.final.train_target, data.final.evaluation
    seen = train.values.tolist()
    mean = sum(seen) / len(seen)

    def of_group(
        middle: Callable[[list[float]], float], ratings: Ratings, by: str, wanted: int
    ) -> float:
        values = ratings.values[getattr(ratings, by) == wanted].tolist()
        return middle(values or ratings.values.tolist())

    expected = {
        "constant": [3.0] * len(test),
        "global_mean": [mean] * len(test),
        "item_mean": [of_group(fmean, train, "items", item) for item in test.items.tolist()],
        "item_median": [of_group(median, train, "items", item) for item in test.items.tolist()],
        "user_mean": [
            of_group(fmean, data.train_source, "users", user) for user in test.users.tolist()
        ],
    }
    by_item: dict[int, list[float]] = {}
    for item, value in zip(train.items.tolist(), train.values.tolist(), strict=True):
        by_item.setdefault(item, []).append(value - mean)
    bias = {item: sum(left) / (len(left) + 2) for item, left in by_item.items()}
    expected["item_bias"] = [mean + bias.get(item, 0.0) for item in test.items.tolist()]
    biases = fit_split(dataset, data)
    unrounded = TRIVIAL["item_user_bias_median"][1](data, biases)
    expected["item_user_bias_rounded"] = unrounded.clamp(1, 5).round().tolist()
    assert set(expected) | {"item_user_bias", "item_user_bias_median"} == set(TRIVIAL)
    for name, values in expected.items():
        torch.testing.assert_close(TRIVIAL[name][1](data, biases), torch.tensor(values), msg=name)


def test_item_without_a_training_rating_gets_the_global_mean(dataset: Dataset) -> None:
    data = split(dataset, 0.25, 7)
    new = int(data.final.evaluation.items[0])
    train = data.final.train_target
    final = replace(data.final, train_target=train.where(train.items != new))
    changed = replace(data, final=final)
    assert trivial.item_mean(changed)[0] == trivial.global_mean(changed)[0]


def test_prototype_is_the_normalised_nearest_centroid() -> None:
    draw = torch.Generator().manual_seed(1)
    centers = 10 * torch.randn(4, 6, generator=draw)
    members = torch.arange(200) % 4
    items = centers[members] + 0.01 * torch.randn(200, 6, generator=draw)
    found = item_prototypes(items, 4, seed=0)
    means = torch.stack([items[members == m].mean(0) for m in range(4)])
    torch.testing.assert_close(found, torch.nn.functional.normalize(means, dim=1)[members])
    assert found.equal(item_prototypes(items, 4, seed=0))


@pytest.mark.parametrize("count", [0, 6])
def test_number_of_prototypes_must_fit(count: int) -> None:
    with pytest.raises(UserError, match=f"prototypes: got {count} for 5 target items"):
        item_prototypes(torch.randn(5, 3), count, seed=0)


def test_errors_are_pooled_over_all_batches(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mimnet_fast.cdr.evaluation._BATCH", 7)
    found = evaluate(lambda users, items: users / 10 + items, dataset.target).errors
    predicted = dataset.target.users / 10 + dataset.target.items
    assert found == errors(predicted, dataset.target.values)._asdict()
    assert errors(torch.tensor([9.0, 1.0]), torch.tensor([5.0, 1.0])) == (2.0, math.sqrt(8))

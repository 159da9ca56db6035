"""The baselines: each against its equations, and on data with planted interests."""

from dataclasses import replace
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
from mimnet_fast.cdr.metadata import ItemGroups
from mimnet_fast.cdr.models import (
    MODELS,
    TRIVIAL,
    FrozenInputs,
    JointTables,
    MatrixFactorization,
    item_prototypes,
)
from mimnet_fast.cdr.models.emcdr import EMCDR
from mimnet_fast.cdr.models.lacdr import LACDR
from mimnet_fast.cdr.models.mimnet import MIMNet
from mimnet_fast.cdr.models.mimnet_released import MIMNetReleased
from mimnet_fast.cdr.models.remit import REMIT
from mimnet_fast.cdr.models.sscdr import SSCDR
from mimnet_fast.cdr.protocol import Phase, keep_overlap, split
from mimnet_fast.cdr.synthetic import Synthetic
from mimnet_fast.cdr.training import adam, seeded_generator, seeded_module, training_step

FROM_USERS = {"emcdr": 0.6, "cmf": 0.6, "sscdr": 0.8, "lacdr": 0.95}
FROM_RATINGS = {"mimnet-released": 0.8, "remit": 0.8}
"""Share of the best trivial predictor's error that a model has to stay below on easy data."""
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
    data, quiet = Dataset.load(folder / "dataset"), Progress(disable=True)
    config = Config(seed=1, base_epochs=20, base_batch_size=64, prototypes=8)
    run(data, replace(config, epochs=15, batch_size=16), FROM_USERS, folder / "run", quiet)
    config = replace(config, epochs=5, batch_size=64)
    return run(data, config, FROM_RATINGS, folder / "run", quiet)["models"]


@pytest.mark.parametrize(("name", "share"), [*FROM_USERS.items(), *FROM_RATINGS.items()])
def test_planted_interests_are_learned(learned: dict[str, Any], name: str, share: float) -> None:
    best_trivial = min(learned[trivial]["honest"]["mae"] for trivial in TRIVIAL)
    assert learned[name]["honest"]["mae"] < share * best_trivial


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


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_sscdr_is_its_equation(inputs: FrozenInputs, phase: Phase, kind: Any) -> None:
    model = seeded_module(lambda: SSCDR(10, kind), 1, "sscdr")
    (users,) = model.examples(inputs, phase)
    draw = seeded_generator(1, "x")
    positions = (torch.rand(3, generator=draw) * inputs.lengths[users]).long()
    others = torch.randint(30, (3,), generator=draw)
    total = torch.tensor(0.0)
    for user, liked, other in zip(users, inputs.histories[users, positions], others, strict=True):
        supervised, near, far = (
            (model.mapping(row) - inputs.target_users[user]).square().sum()
            for row in (
                inputs.source_users[user],
                inputs.source_items[liked],
                inputs.source_items[other],
            )
        )
        total = total + supervised + max(torch.tensor(0.0), 1 + near - far)
    loss = model.loss(inputs, (users,), seeded_generator(1, "x"))
    assert_close(loss, total / 3)
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    rating = model.mapping(inputs.source_users[4]) @ inputs.target_items[7]
    assert_close(model(inputs, torch.tensor([4]), torch.tensor([7]))[0], rating)


def test_sscdr_needs_no_history(inputs: FrozenInputs) -> None:
    model, nobody = SSCDR(10, "linear"), torch.tensor([0])
    expected = (model.mapping(inputs.source_users[0]) - inputs.target_users[0]).square().sum()
    assert_close(model.loss(inputs, (nobody,), seeded_generator(1, "x")), expected)


def test_lacdr_is_its_equation(inputs: FrozenInputs, phase: Phase) -> None:
    """Of the source tables' 31 users 9 are shared; 1, 4 and 8 train, 9 is another of the target."""
    model = LACDR(10)
    encode_s, decode_s, encode_t, decode_t = (matrix.T for matrix in model.parameters())
    batch = model.examples(inputs, phase)
    assert [list(pair) for pair in zip(*(b.tolist() for b in batch), strict=True)] == [
        *([user, user if user in (1, 4, 8) else -1] for user in range(31)),
        [-1, 9],
    ]
    source, target = inputs.source_users, inputs.target_users
    total = torch.tensor(0.0)
    for user in range(31):
        total = total + (source[user] @ encode_s @ decode_s - source[user]).norm()
    for user in (1, 4, 8, 9):
        total = total + (target[user] @ encode_t @ decode_t - target[user]).norm()
    for user in (1, 4, 8):
        total = total + 2 * (source[user] @ encode_s - target[user] @ encode_t).norm()
    loss = model.loss(inputs, batch, seeded_generator(1, "x"))
    assert_close(loss, total / 32)
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    rating = source[4] @ encode_s @ decode_t @ inputs.target_items[7]
    assert_close(model(inputs, torch.tensor([4]), torch.tensor([7]))[0], rating)


def test_lacdr_takes_those_apart_who_are_not_known_to_be_one(
    inputs: FrozenInputs, phase: Phase
) -> None:
    meta = phase.train_meta.where(phase.train_meta.users != 4)
    batch = LACDR(10).examples(inputs, replace(phase, train_meta=meta))
    assert [list(pair) for pair in zip(*(b.tolist() for b in batch), strict=True)] == [
        *([user, user if user in (1, 8) else -1] for user in range(31)),
        [-1, 4],
        [-1, 9],
    ]


def test_neighbours_are_who_liked_the_same(inputs: FrozenInputs) -> None:
    histories = [
        inputs.histories[user, :length].tolist() for user, length in enumerate(inputs.lengths)
    ]
    for user in range(9):
        of_items = [
            torch.stack(
                [
                    inputs.source_users[u]
                    for u, liked in enumerate(histories)
                    for i in liked
                    if i == item
                ]
            ).mean(0)
            for item in histories[user]
        ]
        expected = torch.stack(of_items).mean(0) if of_items else torch.zeros(10)
        assert_close(inputs.neighbours[user, 0], expected)


def remit_by_hand(
    model: REMIT, inputs: FrozenInputs, user: int, item: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each view's rating and its weight."""
    history = inputs.source_items[inputs.histories[user, : inputs.lengths[user]]]
    target, bridge, moved = inputs.target_items[item], model.bridge, []
    for view in (inputs.source_users[user], *inputs.neighbours[user]):
        pooled = (history @ view).softmax(0) @ history
        hidden = torch.relu(bridge.w1 @ pooled + bridge.b1)
        moved.append(view @ (bridge.w2 @ hidden + bridge.b2).view(10, 10))
    ratings = torch.stack(moved) @ target
    state = torch.cat([target, *moved, ratings]).detach()
    first, _, last = model.policy
    weights = last.weight @ torch.relu(first.weight @ state + first.bias) + last.bias
    return ratings, weights.softmax(0)


def with_groups(inputs: FrozenInputs) -> FrozenInputs:
    """Categories of all items but 0 to 3, two of every third; brands of even items."""
    items = torch.arange(4, 30)
    two = items[::3]
    categories = ItemGroups(
        "category", torch.cat([items, two]), torch.cat([items % 5, (two + 1) % 5])
    )
    brands = ItemGroups("brand", torch.arange(0, 30, 2), torch.arange(15) // 4)
    return replace(inputs, item_groups=(categories, brands))


def test_neighbours_over_groups_are_paths(inputs: FrozenInputs) -> None:
    """User, item, group, item, user: every step is a mean."""
    grouped = with_groups(inputs)
    histories = [row[:n].tolist() for row, n in zip(inputs.histories, inputs.lengths, strict=True)]
    everybody = {item for history in histories for item in history}
    fans = {
        item: torch.stack(
            [inputs.source_users[u] for u, h in enumerate(histories) for i in h if i == item]
        ).mean(0)
        for item in everybody
    }
    for view, kind in enumerate(grouped.item_groups, 1):
        members: dict[int, list[int]] = {}
        for item, group in zip(kind.items.tolist(), kind.groups.tolist(), strict=True):
            if item in fans:
                members.setdefault(group, []).append(item)
        of_group = {g: torch.stack([fans[i] for i in m]).mean(0) for g, m in members.items()}
        for user, history in enumerate(histories):
            of_items = []
            for item in history:
                own = [vector for g, vector in of_group.items() if item in members[g]]
                of_items += [torch.stack(own).mean(0)] if own else []
            expected = torch.stack(of_items).mean(0) if of_items else torch.zeros(10)
            assert_close(grouped.neighbours[user, view], expected)


@pytest.mark.parametrize("kinds", [0, 2])
def test_remit_is_its_equation(inputs: FrozenInputs, kinds: int) -> None:
    inputs = with_groups(inputs) if kinds else inputs
    model = seeded_module(lambda: REMIT(10, 16, kinds), 1, "remit")
    users, items, values = torch.arange(9), torch.arange(9) * 3, torch.arange(9) / 2
    by_hand = [remit_by_hand(model, inputs, user, 3 * user) for user in range(9)]
    ratings, weights = (torch.stack(column) for column in zip(*by_hand, strict=True))
    found = model(inputs, users, items)
    assert_close(found, (ratings * weights).sum(1), rtol=1e-4, atol=1e-4)

    drawn = weights.multinomial(1, generator=seeded_generator(1, "x"))
    error = (ratings.gather(1, drawn)[:, 0] - values).square()
    reward = ((ratings.mean(1) - values).square() - error).detach()
    policy_loss = -(reward * weights.gather(1, drawn)[:, 0].log()).mean()
    mixed = (ratings * weights.detach()).sum(1)
    expected = (mixed - values).square().mean() + policy_loss
    loss = model.loss(inputs, (users, items, values), seeded_generator(1, "x"))
    assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    parameters = list(model.parameters())
    for got, wanted in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        assert wanted.abs().max() > 0
        assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_policy_of_remit_prefers_the_better_view(inputs: FrozenInputs) -> None:
    model = seeded_module(lambda: REMIT(10, 16), 1, "remit")
    users, items = torch.arange(1, 9), torch.arange(1, 9)
    values = model.views(inputs, users, items)[0][:, 1].detach()
    optimizer, generator = adam(model.policy, 0.01), seeded_generator(1, "x")
    before = model.views(inputs, users, items)[1][:, 1].exp().mean()
    for _ in range(100):
        training_step(optimizer, lambda *b: model.loss(inputs, b, generator), users, items, values)
    after = model.views(inputs, users, items)[1][:, 1].exp().mean()
    assert after > max(0.9, before)


def test_unknown_mapping_is_refused() -> None:
    with pytest.raises(UserError, match="mapping: got 'affine', need one of linear, mlp"):
        Config(mapping="affine")  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", [1.0, 0.4])
def test_cmf_shares_the_users_of_both_domains(dataset: Dataset, overlap: float) -> None:
    data = keep_overlap(split(dataset, 0.25, 7), overlap, 7)
    tables = JointTables.of(dataset, data.final)
    known = set(data.final.train_meta.users.tolist())
    model = MatrixFactorization(tables.users, tables.items, 3)
    users, items, values = tables.examples(data.train_source, data.final)
    source, target = data.train_source, data.final.train_target
    assert values.equal(torch.cat([source.values, target.values]))
    seen: dict[tuple[bool, int], int] = {}
    for row, (user, item) in enumerate(zip(users.tolist(), items.tolist(), strict=True)):
        in_target = row >= len(source)
        part, at = (target, row - len(source)) if in_target else (source, row)
        person, thing = int(part.users[at]), int(part.items[at])
        shared = person in known
        assert seen.setdefault((in_target and not shared, person), user) == user
        assert (user >= dataset.num_source_users) == (in_target and not shared)
        assert item == thing + in_target * dataset.num_source_items
    assert len(set(seen.values())) == len(seen)
    assert tables.users - 1 == max(seen.values())
    test = data.final.evaluation
    expected = [
        model.users.weight[user] @ model.items.weight[dataset.num_source_items + item]
        for user, item in zip(test.users.tolist(), test.items.tolist(), strict=True)
    ]
    assert_close(tables.predict(model)(test.users, test.items), torch.stack(expected))


def released(**options: bool) -> MIMNetReleased:
    sizes: dict[str, Any] = {"interests": 3, "iterations": 3, "history_length": 20}
    return seeded_module(lambda: MIMNetReleased(10, 16, **sizes, **options), 1, "released")


QUIRKS = (
    "first_item_only",
    "leaking_padding",
    "shared_padding_id",
    "fresh_logits",
    "untrained_prototypes",
)


def test_released_mimnet_without_its_quirks_is_mimnet(inputs: FrozenInputs) -> None:
    model = released(**dict.fromkeys(QUIRKS, False))
    corrected = MIMNet(10, 16, interests=3, iterations=3, history_length=20)
    corrected.load_state_dict(model.state_dict(), strict=False)
    users = torch.arange(9)
    assert model(inputs, users, users).equal(corrected(inputs, users, users))
    assert not model.clusters_untrained_rows


@pytest.mark.parametrize("quirk", QUIRKS[:-1])
def test_each_quirk_changes_predictions(inputs: FrozenInputs, quirk: str) -> None:
    users = torch.arange(9)
    everything, without = released(), released(**{quirk: False})
    assert not everything(inputs, users, users).allclose(without(inputs, users, users))


@pytest.mark.parametrize("first_only", [True, False])
def test_released_mimnet_is_the_public_code(inputs: FrozenInputs, first_only: bool) -> None:
    """Step by step as that code goes: padding id 0, logits of -1e9, one random draw per row."""
    inputs.histories[6, 3] = 0
    model = released(first_item_only=first_only)
    draw = torch.Generator().manual_seed(int(model.logits_seed))
    logits = torch.randn(9, 3, 20, generator=draw)
    found = model(inputs, torch.arange(9), torch.arange(9))
    fine, coarse = model.attention.fine, model.attention.coarse
    for user in range(9):
        ids = inputs.histories[user, : inputs.lengths[user]].tolist() or [None]
        seen = 1 if first_only else sum(item != 0 for item in ids)
        rows = [model.no_history if i is None else inputs.source_items[i] for i in ids]
        rows += [inputs.source_items[0]] * (20 - len(ids))
        votes = torch.stack(rows) @ model.routing.weight
        b = logits[user]
        for step in range(3):
            padded = torch.where(torch.arange(20) < seen, b, torch.tensor(-1e9))
            z = padded.softmax(0) @ votes
            square = z.square().sum(-1, keepdim=True)
            e = square / (1 + square) * z / (square + 1e-8).sqrt()
            if step < 2:
                b = b + e @ votes.T
        hidden = torch.relu(e @ model.bridge.w1.T + model.bridge.b1)
        matrices = (hidden @ model.bridge.w2.T + model.bridge.b2).view(3, 10, 10)
        moved = inputs.source_users[user] @ matrices
        item, prototype = inputs.target_items[user], inputs.item_prototypes[user]

        def attend(query: torch.Tensor, layer: Any, moved: torch.Tensor = moved) -> torch.Tensor:
            keys = moved @ layer.key_weight.T + layer.key_bias
            values = moved @ layer.value_weight.T + layer.value_bias
            return (keys @ query).softmax(0) @ values

        both = torch.cat([item, prototype])
        alpha = torch.sigmoid(both @ model.attention.fusion_weight + model.attention.fusion_bias)
        mixed = (1 - alpha) * attend(item, fine) + alpha * attend(prototype, coarse)
        assert_close(found[user], (mixed @ item).squeeze(), rtol=1e-4, atol=1e-4)


def test_untrained_rows_take_part_in_clustering_only() -> None:
    items = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    far = torch.tensor([[3.0, 0.3], [3.0, 0.3]])
    found = item_prototypes(items, 2, 0, far)
    centre = torch.tensor([3.0, 0.2])
    assert_close(found, torch.stack([items[0], centre / centre.norm()]))
    assert_close(item_prototypes(items, 2, 0), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))

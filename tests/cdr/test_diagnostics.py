"""Diagnostics are of what the model computes, and a collapse is seen where there is one."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mimnet_fast import ops
from mimnet_fast.cdr import diagnostics
from mimnet_fast.cdr.dataset import Ratings
from mimnet_fast.cdr.models import FrozenInputs, MIMNet, MIMNetReleased

USERS = torch.arange(9)
K = 3


def make(model: type[MIMNet] = MIMNet, interests: int = K) -> MIMNet:
    torch.manual_seed(4)
    return model(10, 6, interests=interests, iterations=3, history_length=20, backend="reference")


@pytest.mark.parametrize("kind", [MIMNet, MIMNetReleased])
def test_the_parts_make_up_the_ratings(inputs: FrozenInputs, kind: type[MIMNet]) -> None:
    model, items = make(kind), torch.arange(9) % 31
    found = diagnostics.interests(model, inputs, USERS)
    answers = diagnostics.answers(model, inputs, found.transferred, items)
    torch.testing.assert_close(answers.ratings, model(inputs, USERS, items))
    many = diagnostics.answers(model, inputs, found.transferred[:1], torch.arange(31)[None])
    for each, other in zip(many, answers, strict=True):
        torch.testing.assert_close(each[0, items[:1]], other[:1])
    guides = inputs.target_items[items], inputs.item_prototypes[items]
    layers = model.attention.fine, model.attention.coarse
    for weights, guide, layer in zip(answers[:2], guides, layers, strict=True):
        keys = found.transferred @ layer.key_weight.T + layer.key_bias
        torch.testing.assert_close(weights, torch.einsum("bd,bkd->bk", guide, keys).softmax(-1))


def test_coupling_shares_out_every_item(inputs: FrozenInputs) -> None:
    found = diagnostics.interests(make(), inputs, USERS)
    real = torch.arange(20) < inputs.lengths[:, None]
    torch.testing.assert_close(found.coupling.sum(1), real.float())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.flatten() @ b.flatten() / (a.norm() * b.norm()))


def test_cosines_are_those_of_capsules_and_matrices() -> None:
    bridge, capsules = make().bridge, torch.randn(2, K, 10)
    units = torch.eye(10).expand(2 * K, 10, 10)
    repeated = capsules.reshape(2 * K, 1, 10).expand(-1, 10, -1)
    matrices = ops.interest_bridge(repeated, units, bridge.w1, bridge.b1, bridge.w2, bridge.b2)
    matrices = matrices.detach().unflatten(0, (2, K))
    for found, vectors in (
        (diagnostics.capsule_cosines(capsules), capsules),
        (diagnostics.bridge_cosines(bridge, capsules), matrices),
    ):
        expected = [[[cosine(a, b) for b in user] for a in user] for user in vectors]
        torch.testing.assert_close(found, torch.tensor(expected))
        pairs = [[user[i][j] for i in range(K) for j in range(i)] for user in expected]
        means = torch.tensor(pairs).mean(1)
        torch.testing.assert_close(diagnostics.mean_off_diagonal(found), means)


def test_entropy_of_the_coupling() -> None:
    coupling = torch.tensor(
        [[[1.0, 0.5, 0.0], [0.0, 0.5, 0.0]], [[0.9, 0.5, 0.0], [0.1, 0.5, 0.0]]]
    )
    found = diagnostics.coupling_entropies(coupling, torch.tensor([2, 1]))
    second = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2)
    torch.testing.assert_close(found, torch.tensor([0.5, second]))


def ratings_of(users: Tensor) -> Ratings:
    return Ratings(users, torch.arange(len(users)) % 31, torch.zeros(len(users)))


def expected_of(model: MIMNet, inputs: FrozenInputs, ratings: Ratings) -> dict[str, Any]:
    """The same figures rating by rating and user by user."""
    rows = []
    for user, item in zip(ratings.users, ratings.items, strict=True):
        found = diagnostics.interests(model, inputs, user[None])
        rows.append(diagnostics.answers(model, inputs, found.transferred, item[None]))
    several = [int(u) for u in ratings.users.unique() if inputs.lengths[u] > 1]
    cosines, entropies = [], []
    for user in several:
        found = diagnostics.interests(model, inputs, torch.tensor([user]))
        pairs = diagnostics.capsule_cosines(found.capsules)
        cosines.append(diagnostics.mean_off_diagonal(pairs))
        entropies.append(diagnostics.coupling_entropies(found.coupling, found.lengths))
    return {
        "users": len(ratings.users.unique()),
        "users_of_several_items": len(several),
        "ratings": len(ratings),
        "capsule_cosine": float(torch.cat(cosines).mean()),
        "coupling_entropy": float(torch.cat(entropies).mean()),
        "fine": torch.cat([row.fine for row in rows]).mean(0).tolist(),
        "gate": float(torch.cat([row.gate for row in rows]).mean()),
    }


def test_diagnostics_of_ratings(inputs: FrozenInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ratings = make(), ratings_of(torch.tensor([5, 8, 0, 1, 5, 7, 3, 3, 8, 8]))
    whole = diagnostics.diagnose(model, inputs, ratings)
    expected = expected_of(model, inputs, ratings)
    for name, value in expected.items():
        found = whole[name]
        if isinstance(found, dict):
            found = found["weights" if name == "fine" else "mean"]
        assert found == pytest.approx(value, abs=1e-5), name
    monkeypatch.setattr(diagnostics, "_USERS", 2)
    in_parts = diagnostics.diagnose(model, inputs, ratings)
    for name in ("capsule_cosine", "bridge_cosine", "coupling_entropy", "gate"):
        assert in_parts[name] == pytest.approx(whole[name], abs=1e-5)
    assert in_parts["coarse"]["weights"] == pytest.approx(whole["coarse"]["weights"], abs=1e-5)


def test_a_collapse_is_seen(inputs: FrozenInputs) -> None:
    model, ratings = make(), ratings_of(USERS)
    apart = diagnostics.diagnose(model, inputs, ratings)
    assert apart["collapsed"] < 0.5
    assert diagnostics.warning("MIMNet", apart) is None
    model.evaluation_logits.zero_()  # nothing tells the capsules apart
    together = diagnostics.diagnose(model, inputs, ratings)
    assert together["collapsed"] == 1
    for name in ("capsule_cosine", "bridge_cosine", "coupling_entropy"):
        assert together[name]["mean"] == pytest.approx(1, abs=1e-5)
    told = diagnostics.warning("MIMNet", together)
    assert told is not None
    assert told.startswith("MIMNet: the interests of 100% of the users with several liked items")
    assert "100% of the users" in diagnostics.sentence(together)


def test_one_interest_has_nothing_to_differ_from(inputs: FrozenInputs) -> None:
    found = diagnostics.diagnose(make(interests=1), inputs, ratings_of(USERS))
    assert found["collapsed"] is found["capsule_cosine"] is found["fine"]["entropy"] is None
    assert diagnostics.warning("single interest", found) is None
    nobody = diagnostics.diagnose(make(), inputs, ratings_of(torch.tensor([0, 1])))
    assert nobody["users_of_several_items"] == 0
    assert nobody["coupling_entropy"] is None

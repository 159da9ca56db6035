"""Ranking by implicit feedback against slow, literal versions of protocol and metrics."""

import csv
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from rich.progress import Progress
from scipy import stats
from torch import Tensor
from typer.testing import CliRunner

from mimnet_fast import ops
from mimnet_fast.cdr import ranking, reports, results
from mimnet_fast.cdr.cli import app
from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset, Ratings, prepare
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.experiment import run
from mimnet_fast.cdr.grids import Plan, Variant, run_grid
from mimnet_fast.cdr.implicit import (
    OBJECTIVES,
    Objective,
    Protocol,
    RankingPhase,
    positives,
    ranking_split,
)
from mimnet_fast.cdr.models import MODELS, FrozenInputs
from mimnet_fast.cdr.protocol import split
from mimnet_fast.cdr.ranking import Seen, measure, ranks
from mimnet_fast.cdr.ranking_experiment import RANKED, Ranking, RankingModels
from mimnet_fast.cdr.synthetic import Synthetic
from mimnet_fast.cdr.training import seeded_generator, seeded_module, stored_predictions

from .conftest import SIZES
from .killing import KilledError, KillingProgress
from .test_protocol import write_random_ratings
from .test_training import files

QUIET = Progress(disable=True)
QUICK = Config(
    beta=0.25,
    base_epochs=2,
    base_batch_size=64,
    epochs=2,
    batch_size=64,
    prototypes=6,
    learning_rate=0.05,
    backend="reference",
)


def prepared_in(folder: Path) -> Dataset:
    prepare(folder / "source.csv", folder / "target.csv", folder / "d")
    return Dataset.load(folder / "d")


def planted(folder: Path, sizes: Synthetic) -> Dataset:
    """Planted interests, and times without a meaning."""
    sizes.generate(folder, seed=3)
    for name in ("source.csv", "target.csv"):
        table = pl.read_csv(folder / name)
        table.with_columns(timestamp=pl.Series(range(table.height)).shuffle(seed=1)).write_csv(
            folder / name
        )
    return prepared_in(folder)


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return planted(tmp_path_factory.mktemp("timed"), SIZES)


@pytest.fixture(scope="module")
def ties(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    """Random ratings with ten different times, and the folder of their files."""
    folder = tmp_path_factory.mktemp("ties")
    write_random_ratings(folder, numeric=True, seed=4)
    return folder, prepared_in(folder)


def some_ratings(users: int, items: int, share: float, seed: int) -> Ratings:
    chosen = torch.rand(users, items, generator=torch.Generator().manual_seed(seed)) < share
    rows, columns = chosen.nonzero().T
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return Ratings(rows[order], columns[order], torch.ones(len(rows)))


@pytest.mark.parametrize("at_once", [1, 40, 2**20])
def test_metrics_are_the_literal_ones(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(ranking, "_SCORES_AT_ONCE", at_once)
    users, items = 9, 13
    known = some_ratings(users, items, 0.5, 1)
    in_test = torch.arange(len(known)) % 3 == 0
    in_test &= known.users != 4  # who is not measured
    test, seen = known.where(in_test), known.where(~in_test)
    # Few different scores: many ties.
    scores = torch.randint(4, (users, items), generator=torch.Generator().manual_seed(2)).float()
    found = ranks(lambda users: scores[users], test, Seen(seen, users, items))

    hits: dict[int, list[int]] = {}
    for user, item, rank_found in zip(test.users.tolist(), test.items.tolist(), found, strict=True):
        hidden = set(seen.items[seen.users == user].tolist())
        listed = sorted(set(range(items)) - hidden, key=lambda i: (-scores[user, i].item(), i))
        assert listed.index(item) + 1 == rank_found
        hits.setdefault(user, []).append(int(rank_found))
    metrics = measure(found, test.users, [1, 3, 5, 50])
    assert max(map(len, hits.values())) > 3
    assert 4 not in hits
    for k in (1, 3, 5, 50):
        hit, ndcg = 0.0, 0.0
        for user_ranks in hits.values():
            hit += any(r <= k for r in user_ranks)
            gain = sum(1 / math.log2(1 + r) for r in user_ranks if r <= k)
            ndcg += gain / sum(1 / math.log2(1 + r) for r in range(1, min(k, len(user_ranks)) + 1))
        assert metrics[f"hr@{k}"] == pytest.approx(hit / len(hits))
        assert metrics[f"ndcg@{k}"] == pytest.approx(ndcg / len(hits))
    assert metrics["mrr"] == pytest.approx(sum(1 / min(r) for r in hits.values()) / len(hits))


def test_scores_that_are_not_finite_have_no_rank() -> None:
    one = Ratings(torch.tensor([0]), torch.tensor([1]), torch.ones(1))
    nothing = Seen(one.where(torch.tensor([False])), 1, 3)
    with pytest.raises(UserError, match="scores are not finite: lower --learning-rate"):
        ranks(lambda users: torch.tensor([[0.0, torch.nan, 1.0]]), one, nothing)


def test_negatives_are_unseen_and_uniform() -> None:
    known = some_ratings(6, 10, 0.6, 3)
    seen = Seen(known, 7, 10)  # the last user has seen nothing
    drawn = seen.draw_others(torch.arange(7), 6000, torch.Generator().manual_seed(1))
    for user, items in enumerate(drawn):
        counts = items.bincount(minlength=10)
        unseen = torch.ones(10, dtype=torch.bool)
        unseen[known.items[known.users == user]] = False
        assert (counts[~unseen] == 0).all()
        expected = 6000 / unseen.sum()
        assert ((counts[unseen] - expected).abs() < 5 * expected.sqrt()).all()
    everything = some_ratings(2, 3, 1.1, 1)
    with pytest.raises(UserError, match="somebody has rated all 3 items"):
        Seen(everything, 2, 3)


def test_objectives_are_the_literal_ones() -> None:
    scores = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    pairs = [math.log(1 + math.exp(row[j] - row[0])) for row in scores.tolist() for j in (1, 2, 3)]
    assert OBJECTIVES["bpr"](scores).item() == pytest.approx(sum(pairs) / 15)
    rows = [-math.log(math.exp(row[0]) / sum(map(math.exp, row))) for row in scores.tolist()]
    assert OBJECTIVES["softmax"](scores).item() == pytest.approx(sum(rows) / 5)


def test_positives_are_all_where_nobody_liked_anything() -> None:
    values = torch.tensor([1.0, 3.0, 3.5])
    domain = Ratings(torch.zeros(3), torch.zeros(3), values)
    assert positives(domain, domain).tolist() == [False, False, True]
    unrated = domain.where(torch.tensor([True, True, False]))
    assert positives(unrated, unrated).tolist() == [True, True]
    assert positives(unrated, domain).tolist() == [False, False]


def pairs(ratings: Ratings) -> list[tuple[int, int]]:
    return list(zip(ratings.users.tolist(), ratings.items.tolist(), strict=True))


def test_leave_last_out_is_the_literal_one(ties: tuple[Path, Dataset]) -> None:
    folder, dataset = ties
    index = {
        name: {
            raw: row
            for row, raw in enumerate(
                pl.read_parquet(folder / "d" / f"{name}.parquet").to_series().to_list()
            )
        }
        for name in ("source_users", "source_items", "target_users", "target_items")
    }
    rows: dict[str, list[tuple[int, int, float, float]]] = {}
    for name in ("source", "target"):
        with (folder / f"{name}.csv").open(newline="") as file:
            rows[name] = [
                (
                    index[f"{name}_users"][row["user_id"]],
                    index[f"{name}_items"][row["item_id"]],
                    float(row["rating"]),
                    float(row["timestamp"]),
                )
                for row in csv.DictReader(file)
            ]
    liked = {name: [row for row in rows[name] if row[2] > 3] for name in rows}
    found = ranking_split(dataset, Config(history_length=4), "leave-last-out")
    for back, phase in ((2, found.selection), (1, found.final)):
        measured, end = {}, dict.fromkeys(range(99), math.inf)
        hidden = set()
        for user in range(dataset.num_overlap):
            own = sorted((row for row in liked["target"] if row[0] == user), key=lambda row: row[3])
            if len(own) >= 3:
                measured[user], end[user] = own[-back][1], own[-back][3]
                hidden |= {row[:2] for row in own[-back:]}
        train = [row for row in liked["target"] if row[:2] not in hidden]
        assert sorted(pairs(phase.evaluation)) == sorted(measured.items())
        assert pairs(phase.train_target) == [row[:2] for row in train]
        meta = [row for row in train if row[0] < dataset.num_overlap]
        assert pairs(phase.train_meta) == [row[:2] for row in meta]
        seen = [row[:2] for row in rows["target"] if row[3] < end[row[0]] or row in train]
        assert pairs(phase.seen_target) == seen
        assert pairs(phase.seen_source) == [r[:2] for r in rows["source"] if r[3] < end[r[0]]]
        assert pairs(phase.train_source) == [r[:2] for r in liked["source"] if r[3] < end[r[0]]]

        def history(user: int, time: float) -> list[int]:
            own = [row for row in liked["source"] if row[0] == user and row[3] < time]
            return [row[1] for row in sorted(own, key=lambda row: row[3])][-4:]

        assert phase.train_histories is not None
        wanted = [(row[0], min(row[3], end[row[0]])) for row in meta]
        for (ids, lengths), queries in (
            (phase.histories, [(user, end[user]) for user in range(dataset.num_overlap)]),
            (phase.train_histories, wanted),
        ):
            for row, length, query in zip(ids, lengths, queries, strict=True):
                assert row[:length].tolist() == history(*query)
                assert (row[length:] == dataset.num_source_items).all()


def test_cold_start_is_that_of_the_ratings(ties: tuple[Path, Dataset]) -> None:
    _, dataset = ties
    config = Config(beta=0.3, history_order="time")
    expected = split(dataset, 0.3, config.seed, history_order="time")
    found = ranking_split(dataset, config, "cold")
    for name in ("selection", "final"):
        phase, ratings = getattr(found, name), getattr(expected, name)
        for part in ("train_target", "train_meta", "evaluation"):
            every = getattr(ratings, part)
            assert pairs(getattr(phase, part)) == pairs(every.where(every.values > 3))
        assert pairs(phase.seen_target) == pairs(ratings.train_target)
        assert phase.histories[0].equal(expected.histories)
        assert phase.histories[1].equal(expected.lengths)
        assert phase.train_histories is None


def changed_future(dataset: Dataset, phase: RankingPhase) -> Dataset:
    """What measured users did from the time of the measured item on, done to other items."""
    end = torch.full((200,), torch.inf, dtype=torch.float64)
    assert phase.evaluation.timestamps is not None
    end[phase.evaluation.users] = phase.evaluation.timestamps

    def change(ratings: Ratings, free: Tensor, items: int) -> Ratings:
        assert ratings.timestamps is not None
        future = (ratings.timestamps >= end[ratings.users]) & free
        assert future.sum() > 20
        return replace(ratings, items=torch.where(future, items - 1 - ratings.items, ratings.items))

    source, target = dataset.source, dataset.target
    everything = torch.ones_like(source.users, dtype=torch.bool)
    return replace(
        dataset,
        source=change(source, everything, dataset.num_source_items),
        target=change(target, target.values <= 3, dataset.num_target_items),
    )


def test_the_future_changes_nothing(timed: Dataset, tmp_path: Path) -> None:
    phase = ranking_split(timed, QUICK, "leave-last-out").final
    other = changed_future(timed, phase)
    assert not other.source.items.equal(timed.source.items)
    task = Ranking(protocol="leave-last-out")
    for name, dataset in (("a", timed), ("b", other)):
        run(dataset, QUICK, RANKED, tmp_path / name, QUIET, task=task)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_an_example_is_learned_from_the_history_at_its_time(timed: Dataset, tmp_path: Path) -> None:
    stage1 = RankingModels(Ranking(protocol="leave-last-out"), timed, QUICK, tmp_path, QUIET)
    job = stage1.job("ptupcdr", "final", seeded_generator(1, "x"))
    batch = tuple(column[::50] for column in job.examples)
    found = job.loss(*batch)

    data, model = stage1.split.final, job.module
    source, target = stage1.source("final")[0], stage1.target("final")[0].items.weight
    seen = Seen(data.seen_target, timed.num_target_users, timed.num_target_items)
    users, items = data.train_meta.users[::50], data.train_meta.items[::50]
    negatives = seen.draw_others(users, 10, seeded_generator(1, "x"))
    assert data.train_histories is not None
    losses = []
    for row, (ids, length) in enumerate(zip(*data.train_histories, strict=True)):
        if row % 50 == 0:
            history = source.items.weight[ids[:length]]
            characteristics = model.score(history).softmax(0).T @ history  # zeros of no history
            vector = source.users.weight[users[row // 50]]
            transferred = model.bridge(characteristics[None], vector[None])[0, 0]
            candidates = torch.cat([items[row // 50, None], negatives[row // 50]])
            losses.append(OBJECTIVES["bpr"]((target[candidates] @ transferred)[None]))
    torch.testing.assert_close(found, torch.stack(losses).mean())


@pytest.mark.parametrize("name", ["mimnet", "ptupcdr", "emcdr", "lacdr"])
def test_scores_are_those_of_the_forward(inputs: FrozenInputs, name: str) -> None:
    build = MODELS[name].build
    assert build is not None
    model = seeded_module(lambda: build(Config()), 1, name)
    users = torch.tensor([8, 0, 3, 5])
    candidates = torch.tensor([[0, 4, 4], [7, 30, 1], [2, 3, 5], [9, 8, 7]])
    found = model.scores(inputs, users, candidates)
    expected = torch.stack([model(inputs, users, items) for items in candidates.T], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    every = model.scores(inputs, users, None)
    torch.testing.assert_close(every.gather(1, candidates), expected, rtol=1e-4, atol=1e-5)


def test_ranks_are_those_of_the_catalogue_op(inputs: FrozenInputs) -> None:
    build = MODELS["mimnet"].build
    assert build is not None
    model: Any = seeded_module(lambda: build(Config()), 1, "mimnet")
    known = some_ratings(9, 31, 0.3, 5)
    in_test = torch.arange(len(known)) % 4 == 0
    test, seen = known.where(in_test), Seen(known.where(~in_test), 9, 31)
    found = ranks(lambda users: model.scores(inputs, users, None), test, seen)
    users = torch.arange(9)
    interests = ops.interest_bridge(
        ops.dynamic_routing(
            inputs.source_items[inputs.histories],
            model.routing.weight,
            model.evaluation_logits,
            lengths=inputs.lengths,
            padding="zero_after",
        ),
        inputs.source_users[users],
        *(getattr(model.bridge, name) for name in ("w1", "b1", "w2", "b2")),
    )
    _, hidden = seen.positions(users)
    offsets = torch.cat([seen.starts, torch.tensor([len(hidden)])])
    _, top = ops.catalogue_top_k(
        interests.detach(),
        inputs.target_items,
        inputs.item_prototypes,
        *(tuple(w.detach() for w in a) for a in model.attention.weights()[:2]),
        *(weight.detach() for weight in model.attention.weights()[2:]),
        10,
        exclude=(hidden, offsets),
    )
    for user, item, place in zip(test.users, test.items, found, strict=True):
        assert (top[user] == item).nonzero().flatten().tolist() == (
            [place - 1] if place <= 10 else []
        )


def test_negatives_of_cmf_are_of_the_same_domain(timed: Dataset, tmp_path: Path) -> None:
    stage1 = RankingModels(Ranking(), timed, QUICK, tmp_path, QUIET)
    job = stage1.job("cmf", "final", seeded_generator(1, "x"))
    called: list[tuple[Tensor, Tensor]] = []
    job.module.register_forward_pre_hook(lambda module, args: called.append(args))
    job.loss(*job.examples)
    ((users, items),) = called
    in_target = items >= timed.num_source_items
    assert in_target.any()
    assert (in_target == in_target[:, :1]).all()
    data = stage1.split.final
    known = set(pairs(timed.source))
    only_here = timed.num_source_users - timed.num_overlap
    for user, item in pairs(data.seen_target):
        row = user if user < timed.num_overlap else user + only_here
        known.add((row, item + timed.num_source_items))
    for user, row in zip(users[:, 0].tolist(), items[:, 1:].tolist(), strict=True):
        assert not known & {(user, item) for item in row}


@pytest.mark.parametrize("protocol", ["cold", "leave-last-out"])
def test_a_killed_run_goes_on_to_the_same_bits(
    timed: Dataset, tmp_path: Path, protocol: Protocol
) -> None:
    task = Ranking(protocol=protocol, objective="softmax", cutoffs=(5,))
    found = run(timed, QUICK, RANKED, tmp_path / "whole", QUIET, task=task)
    for updates in (0, 13, 33):
        folder = tmp_path / str(updates)
        with pytest.raises(KilledError):
            run(timed, QUICK, RANKED, folder, KillingProgress(updates), task=task)
        again = run(timed, QUICK, RANKED, folder, QUIET, task=task)
        assert again == found
        assert files(folder) == files(tmp_path / "whole")
    folder = tmp_path / "whole"
    with pytest.raises(UserError, match=r"holds results with cutoffs = \[5\] \(now \[7\]\): name"):
        run(timed, QUICK, ["tgt"], folder, QUIET, task=replace(task, cutoffs=(7,)))
    with pytest.raises(UserError, match=r"results with objective = softmax \(now bpr\)"):
        run(timed, QUICK, ["tgt"], folder, QUIET, task=replace(task, objective="bpr"))


@pytest.mark.parametrize("protocol", ["cold", "leave-last-out"])
def test_a_grid_says_what_its_runs_do(
    timed: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: Protocol
) -> None:
    monkeypatch.setattr(reports, "PLOTS", False)
    task, names = Ranking(protocol=protocol, cutoffs=(5,)), ("mimnet", "sscdr")
    beta, place = (0.25, "beta-0.25") if protocol == "cold" else (None, "all-users")
    variants = [Variant(name, MODELS[name].title, name) for name in names]
    variants.append(Variant("interests-2", "two", "mimnet", {"interests": 2}))
    betas = () if beta is None else (beta,)
    plan = Plan("compare", tuple(variants), betas, (2, 3), task=task)
    out = tmp_path / "grid"
    for updates in (12, 40):
        with pytest.raises(KilledError):
            run_grid(timed, QUICK, plan, out, KillingProgress(updates))
    rows = {row["name"]: row for row in run_grid(timed, QUICK, plan, out, QUIET)["rows"]}
    assert list(rows) == ["random", "popularity", "mimnet", "sscdr", "interests-2"]
    assert all(row["beta"] == beta and row["seeds"] == [2, 3] for row in rows.values())

    folder, config = out / place / "seed-3", replace(QUICK, seed=3)
    run(timed, config, names, tmp_path / "alone", QUIET, task=task)
    assert files(tmp_path / "alone").items() <= files(folder).items()
    changed = replace(config, interests=2)
    two = run(timed, changed, ["mimnet"], tmp_path / "two", QUIET, task=task)["models"]["mimnet"]
    for metric in ("hr@5", "ndcg@5", "mrr"):
        assert rows["interests-2"]["honest"][metric]["values"][1] == two["honest"][metric]
        differences: dict[int, float] = {}
        for seed in (2, 3):
            run_folder, of_user = out / place / f"seed-{seed}", []
            users = ranking_split(timed, replace(QUICK, seed=seed), protocol).final.evaluation.users
            for name in ("sscdr", "mimnet"):
                found = results.read(run_folder)["models"][name]["honest"]
                places = stored_predictions(run_folder / "final" / f"{name}.safetensors")
                at_epoch = places[found[f"{metric}_epoch"] - 1]
                of_user.append(
                    [
                        measure(at_epoch[users == user], users[users == user], [5])[metric]
                        for user in users.unique()
                    ]
                )
                assert found[metric] == pytest.approx(statistics.fmean(of_user[-1]))
            for user, ours, theirs in zip(users.unique().tolist(), *of_user, strict=True):
                differences[user] = differences.get(user, 0.0) + ours - theirs
        expected = stats.ttest_1samp(list(differences.values()), 0).pvalue
        assert rows["sscdr"]["honest"][metric]["p"] == pytest.approx(expected)
    page = (out / "compare.md").read_text()
    assert "| model | HR@5 | NDCG@5 | MRR | seeds | seconds | peak MB |" in page
    assert ("## beta 0.25, published" if beta else "## published") in page
    with pytest.raises(UserError, match=r"made with cutoffs = \[5\] \(now \[6\]\)"):
        run_grid(timed, QUICK, replace(plan, task=replace(task, cutoffs=(6,))), out, QUIET)


def test_what_cannot_be_ranked_is_refused_before_training(timed: Dataset, tmp_path: Path) -> None:
    variants = Variant("a", "a", "tgt"), Variant("b", "b", "remit")
    remit = Plan("compare", variants, (), (1,), task=Ranking(protocol="leave-last-out"))
    with pytest.raises(UserError, match=r"betas: got 0\.25, but leave-last-out by bpr tests all"):
        replace(remit, betas=(0.25,))
    with pytest.raises(UserError, match="model: got 'remit', but its policy is rewarded"):
        run_grid(timed, QUICK, remit, tmp_path, QUIET)
    half = replace(remit, variants=(Variant("a", "a", "mimnet", {"overlap": 0.5}),))
    with pytest.raises(UserError, match=r"overlap: got 0\.5, need 1"):
        run_grid(timed, QUICK, half, tmp_path, QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("objective", "protocol"), [("bpr", "cold"), ("softmax", "leave-last-out")]
)
def test_planted_interests_are_found(
    tmp_path: Path, objective: Objective, protocol: Protocol
) -> None:
    dataset = planted(tmp_path, replace(SIZES, users=300))
    config = replace(QUICK, base_epochs=8, epochs=4)
    task = Ranking(objective, protocol, cutoffs=(5,))
    models = run(dataset, config, ["mimnet"], tmp_path / "run", QUIET, task=task)["models"]
    found = models["mimnet"]
    final, selection = (found["curves"][name] for name in ("final", "selection"))
    for metric in ("hr@5", "ndcg@5", "mrr"):
        for name in ("random", "popularity"):
            assert found["honest"][metric] > 1.15 * models[name]["honest"][metric]
        validation = [epoch[metric] for epoch in selection]
        chosen = validation.index(max(validation)) + 1
        assert found["honest"][f"{metric}_epoch"] == chosen
        assert found["honest"][metric] == final[chosen - 1][metric]
        assert found["published"][metric] == max(epoch[metric] for epoch in final)


def test_the_command(prepared: Path, tmp_path: Path) -> None:
    def invoke(*options: object) -> Any:
        quick = ["--base-epochs", "1", "--epochs", "1", "--prototypes", "5", "--beta", "0.25"]
        arguments = [
            "train",
            prepared,
            "--task",
            "ranking",
            "--out",
            tmp_path / "run",
            *quick,
            *options,
        ]
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    for options, message in (
        (["--protocol", "leave-last-out"], "source.csv has no timestamp column"),
        (["--model", "remit"], "got 'remit', but its policy is rewarded for the errors"),
        (["--base", "biased-mf"], "whose biases explain ratings"),
        (["--task", "ratings", "--protocol", "cold"], "add --task ranking"),
        (["--negatives", "0"], "negatives: got 0"),
        (["--k", "0"], "k: got [0]"),
    ):
        refused = invoke(*options)
        assert refused.exit_code == 2
        assert message in refused.stderr
    result = invoke("--model", "ptupcdr", "--k", "3", "12")
    assert result.exit_code == 0, result.output
    assert all(word in result.stdout for word in ("PTUPCDR", "chance", "NDCG@12", "MRR", "honest"))
    result = invoke("--k", "3", "12", "--resume", "--json")
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(found["models"]) == {"random", "popularity", "ptupcdr", "mimnet"}
    page = (tmp_path / "run" / "results.md").read_text()
    assert "HR@3" in page
    assert f"{found['models']['mimnet']['honest']['mrr']:.4f} @1" in page


def test_the_command_of_a_grid(prepared: Path, tmp_path: Path) -> None:
    quick = ["--task", "ranking", "--seeds", 2, "--betas", 0.25, "--k", 3, "--backend", "reference"]
    quick += ["--base-epochs", 1, "--epochs", 1, "--prototypes", 5]
    for command, options, title in (
        ("compare", ["--models", "sscdr", "tgt"], "SSCDR"),
        ("sweep", ["--interests", 2, 7], "interests 2"),
    ):
        arguments = [command, prepared, "--out", tmp_path / command, *options, *quick]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        for told in ("cold by bpr, beta 0.25, honest", "HR@3", "MRR", "popularity", title):
            assert told in result.stdout
        assert (tmp_path / command / f"{command}.csv").exists()

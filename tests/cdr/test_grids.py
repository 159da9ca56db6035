"""Grids of runs: the tables agree with their cells, and what was killed goes on to the same."""

import csv
import json
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.progress import Progress
from scipy import stats

from mimnet_fast.cdr import checkpoints, costs, experiment, reports, training
from mimnet_fast.cdr.biases import fit_split
from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.experiment import run
from mimnet_fast.cdr.grids import Plan, Variant, run_grid
from mimnet_fast.cdr.models import MODELS, TRIVIAL
from mimnet_fast.cdr.protocol import split
from mimnet_fast.cdr.significance import Cell, paired_p, summarize
from mimnet_fast.cdr.studies import sweep_variants

from .killing import KilledError, KillingProgress, check_killed_at_random

QUIET = Progress(disable=True)
CONFIG = Config(
    learning_rate=0.1,
    base_epochs=2,
    base_batch_size=64,
    epochs=3,
    batch_size=64,
    prototypes=6,
    backend="reference",
)
SELECTIONS, METRICS = ("published", "honest"), ("mae", "rmse")
BETAS, SEEDS, NAMES = (0.25, 0.5), (2, 3), ("mimnet", "ptupcdr", "tgt")


def plan(*names: str, betas: tuple[float, ...] = BETAS, seeds: tuple[int, ...] = SEEDS) -> Plan:
    return Plan("compare", tuple(Variant(n, MODELS[n].title, n) for n in names), betas, seeds)


def numbers(folder: Path) -> dict[str, Any]:
    """All files that do not depend on time, and the table without its costs."""
    files: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.glob("beta-*/**/*")
        if path.is_file() and "costs.json" not in path.name
    }
    table = json.loads((folder / "compare.json").read_text())
    del table["base_models"]
    for row in table["rows"]:
        del row["seconds"], row["peak_rss_bytes"]
    return files | {"table": table}


@pytest.fixture(autouse=True, scope="module")
def _no_plots() -> Iterator[None]:
    """They take most of the time of grids as small as these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "PLOTS", False)
        yield


@pytest.fixture(scope="module")
def finished(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grid")
    run_grid(dataset, CONFIG, plan(*NAMES), out, QUIET)
    return out


def cell_errors(
    dataset: Dataset, out: Path, beta: float, seed: int, name: str, selection: str, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """Signed errors of all test ratings at the selected epoch, and their users."""
    folder = out / f"beta-{beta}" / f"seed-{seed}"
    test = split(dataset, beta, seed).final.evaluation
    if name in TRIVIAL:
        data = split(dataset, beta, seed)
        predicted = TRIVIAL[name][1](data, fit_split(dataset, data))
    else:
        epoch = json.loads((folder / "results.json").read_text())["models"][name][selection]
        file = "target" if name == "tgt" else name
        tensors, _ = checkpoints.load(folder / "final" / f"{file}.safetensors")
        predicted = tensors["predictions"][epoch[f"{metric}_epoch"] - 1]
    return (predicted.double() - test.values.double()).numpy(), test.users.numpy()


def test_the_table_agrees_with_its_cells(dataset: Dataset, finished: Path) -> None:
    found = json.loads((finished / "compare.json").read_text())
    assert found["finished_cells"] == found["cells"] == 12
    rows = {(row["beta"], row["name"]): row for row in found["rows"]}
    assert set(rows) == {(beta, name) for beta in BETAS for name in (*TRIVIAL, *NAMES)}
    for (beta, name), row in rows.items():
        assert row["seeds"] == list(SEEDS)
        for selection in SELECTIONS:
            for metric in METRICS:
                values = []
                for seed in SEEDS:
                    folder = finished / f"beta-{beta}" / f"seed-{seed}"
                    cell = json.loads((folder / "results.json").read_text())["models"][name]
                    values.append(cell[selection][metric])
                    e, _ = cell_errors(dataset, finished, beta, seed, name, selection, metric)
                    again = np.abs(e).mean() if metric == "mae" else math.sqrt((e**2).mean())
                    assert values[-1] == pytest.approx(again, rel=1e-12)
                score = row[selection][metric]
                assert score["values"] == values
                assert score["mean"] == pytest.approx(statistics.mean(values))
                assert score["std"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))


def test_significance_agrees_with_the_cells(dataset: Dataset, finished: Path) -> None:
    found = json.loads((finished / "compare.json").read_text())
    for selection in SELECTIONS:
        for metric in METRICS:
            expected = []
            for row in found["rows"]:
                if row["name"] == "mimnet":
                    assert row[selection][metric]["p"] is None
                    continue
                totals: dict[int, float] = {}
                for seed in SEEDS:
                    sides = [
                        cell_errors(dataset, finished, row["beta"], seed, name, selection, metric)
                        for name in (row["name"], "mimnet")
                    ]
                    power = 1 if metric == "mae" else 2
                    for user, e, reference in zip(
                        sides[0][1], sides[0][0], sides[1][0], strict=True
                    ):
                        difference = abs(e) ** power - abs(reference) ** power
                        totals[user] = totals.get(user, 0.0) + difference
                expected.append(stats.ttest_1samp(list(totals.values()), 0).pvalue)
            others = [row for row in found["rows"] if row["name"] != "mimnet"]
            scores = [row[selection][metric] for row in others]
            assert [score["p"] for score in scores] == pytest.approx(expected, rel=1e-6)
            # Benjamini and Yekutieli's step-up, written out.
            count = len(expected)
            factor = count * sum(1 / i for i in range(1, count + 1))
            order = sorted(range(count), key=lambda i: expected[i])
            lowest = 1.0
            for rank in range(count, 0, -1):
                i = order[rank - 1]
                lowest = min(lowest, expected[i] * factor / rank)
                assert scores[i]["p_adjusted"] == pytest.approx(lowest, rel=1e-6)


def test_all_tables_say_the_same(finished: Path) -> None:
    found = json.loads((finished / "compare.json").read_text())
    with (finished / "compare.csv").open() as file:
        lines = {
            (r["beta"], r["name"], r["selection"], r["metric"]): r for r in csv.DictReader(file)
        }
    assert len(lines) == len(found["rows"]) * 4
    markdown = (finished / "compare.md").read_text()
    for row in found["rows"]:
        shown = []
        for selection in SELECTIONS:
            for metric in METRICS:
                score = row[selection][metric]
                line = lines[str(row["beta"]), row["name"], selection, metric]
                for name in ("mean", "std", "p", "p_adjusted"):
                    assert (
                        line[name] == ""
                        if score[name] is None
                        else float(line[name]) == score[name]
                    )
                star = "*" if score["p_adjusted"] is not None and score["p_adjusted"] < 0.05 else ""
                shown.append(f"{score['mean']:.4f} ± {score['std']:.4f}{star}")
        assert f"| {row['title']} | {' | '.join(shown)} | 2 |" in markdown
        trained = row["name"] in MODELS
        assert (row["seconds"] is not None) == trained
        assert not trained or row["seconds"] > 0


def test_plots_are_drawn_where_matplotlib_is(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = json.loads((finished / "compare.json").read_text())
    reports.write(tmp_path, found)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".json", ".md"]
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(reports, "PLOTS", True)
    reports.write(tmp_path, found)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_cell_is_a_run(dataset: Dataset, finished: Path, tmp_path: Path) -> None:
    config = Config(**{**vars(CONFIG), "beta": 0.5, "seed": 3})
    expected = run(dataset, config, NAMES, tmp_path, QUIET)
    cell = finished / "beta-0.5" / "seed-3"
    assert json.loads((cell / "results.json").read_text()) == json.loads(json.dumps(expected))


def no_training(*arguments: Any) -> None:
    raise AssertionError("a finished cell was trained again")


def test_finished_cells_are_not_trained_again(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan("ptupcdr", betas=(0.25,), seeds=(2,))
    alone = run_grid(dataset, CONFIG, first, tmp_path, QUIET)
    assert alone["rows"][0]["honest"]["mae"]["p"] is None, "there is no MIMNet to compare with"
    with monkeypatch.context() as patch:
        patch.setattr(training, "training_step", no_training)
        again = run_grid(dataset, CONFIG, first, tmp_path, QUIET)
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(alone))

    trained = []
    fit = training.fit

    def noting(*args: Any, **kwargs: Any) -> Any:
        before = kwargs["checkpoint"].exists()
        curve = fit(*args, **kwargs)
        if not before:
            trained.append(kwargs["identity"]["name"])
        return curve

    monkeypatch.setattr(experiment, "fit", noting)
    more = plan("mimnet", "ptupcdr", betas=(0.25,), seeds=(2,))
    found = run_grid(dataset, CONFIG, more, tmp_path, QUIET)
    assert trained == ["selection/mimnet", "final/mimnet"]
    row = next(row for row in found["rows"] if row["name"] == "ptupcdr")
    assert row["honest"]["mae"]["p"] is not None


def test_other_settings_are_refused(dataset: Dataset, finished: Path) -> None:
    other = Config(**{**vars(CONFIG), "hidden": 9})
    with pytest.raises(UserError, match=r"was made with hidden = 50 \(now 9\): name another --out"):
        run_grid(dataset, other, plan(*NAMES), finished, QUIET)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"betas": ()}, "betas: got none"),
        ({"betas": (0.2, 0.2)}, "betas: got 0.2 0.2, need at least one and none twice"),
        ({"seeds": ()}, "seeds: got none"),
    ],
)
def test_plans_without_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan("mimnet", **arguments)
    with pytest.raises(UserError, match="models: got tgt tgt"):
        plan("tgt", "tgt")


@pytest.mark.parametrize("updates", [2, 17, 40])
def test_an_interrupted_grid_goes_on_to_the_same_bits(
    dataset: Dataset, finished: Path, tmp_path: Path, updates: int
) -> None:
    with pytest.raises(KilledError):
        run_grid(dataset, CONFIG, plan(*NAMES), tmp_path, KillingProgress(updates))
    run_grid(dataset, CONFIG, plan(*NAMES), tmp_path, QUIET)
    assert numbers(tmp_path) == numbers(finished)


def _small_grid(prepared: Path, out: Path) -> None:
    reports.PLOTS = False
    small = plan("mimnet", "tgt", betas=(0.25,))
    run_grid(Dataset.load(prepared), CONFIG, small, out, QUIET)


@pytest.mark.slow
def test_a_grid_killed_at_random_goes_on_to_the_same_bits(prepared: Path, tmp_path: Path) -> None:
    check_killed_at_random(partial(_small_grid, prepared), numbers, tmp_path)


def cell(seed: int, name: str, totals: list[float], tested: list[bool]) -> Cell:
    scores = {selection: dict.fromkeys(METRICS, sum(totals)) for selection in SELECTIONS}
    by_score = {(s, m): np.array(totals) for s in SELECTIONS for m in METRICS}
    return Cell(0.2, seed, name, name, scores, by_score, np.array(tested))


def test_users_count_once_over_all_seeds() -> None:
    key = ("honest", "mae")
    model = [
        cell(1, "a", [1.0, 2.0, 0.0, 0.0], [True, True, False, False]),
        cell(2, "a", [0.0, 4.0, 6.0, 0.0], [False, True, True, False]),
        cell(9, "a", [7.0, 7.0, 7.0, 7.0], [True] * 4),
    ]
    reference = [
        cell(2, "m", [0.0, 3.0, 4.0, 0.0], [False, True, True, False]),
        cell(1, "m", [1.5, 2.0, 0.0, 0.0], [True, True, False, False]),
    ]
    expected = stats.ttest_1samp([-0.5, 1.0, 2.0], 0).pvalue
    assert paired_p(model, reference, key) == pytest.approx(expected)
    assert paired_p(reference, reference, key) == 1.0
    one_user = [cell(1, "a", [1.0, 0.0], [True, False])]
    assert math.isnan(paired_p(one_user, one_user, key))


def test_a_better_model_is_told_from_noise() -> None:
    generator = np.random.default_rng(0)
    base = generator.random(200)
    models = {
        "m": base,
        "better": base - 0.1 + 0.3 * generator.standard_normal(200),
        "same": base + 0.3 * generator.standard_normal(200),
    }
    cells = [cell(1, name, list(totals), [True] * 200) for name, totals in models.items()]
    _, better, same = (row["honest"]["mae"] for row in summarize(cells, "m"))
    assert better["p_adjusted"] < 0.01 < 0.05 < same["p_adjusted"]
    assert better["p_adjusted"] > better["p"]


def _peak_of(folder: Path, work: Callable[[], Any]) -> int:
    with costs.measured(folder, "work"):
        work()
    peak: int = costs.read(folder)["work"]["peak_rss_bytes"]
    return peak


def test_peak_memory_is_that_of_the_block(tmp_path: Path) -> None:
    if not costs._CLEAR.exists():
        pytest.skip("the system keeps no peak that can be reset")
    before = _peak_of(tmp_path, lambda: None)
    large = _peak_of(tmp_path, lambda: np.ones(25_000_000).sum())
    after = _peak_of(tmp_path, lambda: None)
    assert large - before > 190e6
    assert large - after > 190e6
    assert 0 < costs.read(tmp_path)["work"]["seconds"] < 60


def test_a_sweep_varies_one_setting_at_a_time_or_all() -> None:
    centre = {"interests": 7, "iterations": 3, "prototypes": 6}
    values = {"interests": [1, 7], "iterations": [2, 3]}
    one = sweep_variants(centre, values, full=False)
    assert [dict(v.changes) for v in one] == [{}, {"interests": 1}, {"iterations": 2}]
    assert one[0].title == "MIMNet: interests 7, iterations 3"
    full = sweep_variants(centre, values, full=True)
    assert [v.name for v in full] == [
        "mimnet",
        "interests-1-iterations-2",
        "interests-1",
        "iterations-2",
    ]
    for given, message in (
        ({}, "nothing to sweep"),
        ({"interests": [0, 1]}, "interests: got 0"),
        ({"overlap": [1, 1.5]}, "overlap: got 1.5"),
    ):
        with pytest.raises(UserError, match=message):
            sweep_variants(centre, given, full=False)


def test_swept_cells_are_runs_on_shared_base_models(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    centre = {"interests": 7, "prototypes": 6, "history_length": 20, "overlap": 1.0}
    values = {"interests": [2], "prototypes": [3], "history_length": [4], "overlap": [0.5]}
    variants = sweep_variants(centre, values, full=False)
    monkeypatch.setattr(reports, "PLOTS", find_spec("matplotlib") is not None)
    swept = Plan("sweep", variants, (0.25,), (2,), swept=(*values,))
    found = run_grid(dataset, CONFIG, swept, tmp_path / "sweep", QUIET)
    assert (tmp_path / "sweep" / "sweep.png").exists() == reports.PLOTS
    assert len(list((tmp_path / "sweep").glob("**/source.safetensors"))) == 1
    rows = {row["name"]: row for row in found["rows"]}
    for name, changes in (("mimnet", {}), ("overlap-0.5", {"overlap": 0.5})):
        config = Config(**{**vars(CONFIG), "beta": 0.25, "seed": 2, **changes})
        alone = run(dataset, config, ["mimnet"], tmp_path / name, QUIET)["models"]["mimnet"]
        assert rows[name]["honest"]["mae"]["values"] == [alone["honest"]["mae"]]
        assert rows[name]["settings"] == alone["settings"]
    assert rows["prototypes-3"]["settings"]["prototypes"] == 3
    found_errors = [row["honest"]["mae"]["mean"] for row in rows.values() if not row["trivial"]]
    assert len(set(found_errors)) == len(variants)

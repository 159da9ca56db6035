"""All models on real ratings: `python -m bench.recommender --data FOLDER --work FOLDER`.

FOLDER of the data has a folder for each collection, with `movies`, `books` and `music` as `.csv` or
`.csv.gz`. Every task is prepared and every model trained there at several betas and seeds, on both
base models; a run that was stopped goes on. What was found is kept in `bench/results/recommender`,
a file for each task, and `docs/results.md` is written from all of these files; without folders
nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import Progress

from mimnet_fast.cdr import results
from mimnet_fast.cdr.atomic import atomic_file
from mimnet_fast.cdr.config import Base, Config
from mimnet_fast.cdr.dataset import Dataset, prepare
from mimnet_fast.cdr.grids import Plan, Variant, run_grid
from mimnet_fast.cdr.models import MODELS

from .report import ROOT

RESULTS = ROOT / "bench" / "results" / "recommender"
PAGE = ROOT / "docs" / "results.md"

TASKS = (("movies", "music"), ("books", "movies"), ("books", "music"))
BETAS = (0.2, 0.5, 0.8)
SEEDS = tuple(range(2020, 2025))
METRICS = ("mae", "rmse")
MODEL = "mimnet"
BASE: Base = "biased-mf"
BASES: tuple[Base, ...] = ("mf", BASE)

_INTRODUCTION = """\
# Results

Written by `python -m bench.recommender` from the files in `bench/results/recommender`. Which users
are tested, and what of, is the protocol of MIMNet and its neighbours: `mimnet-fast compare --help`
and `mimnet_fast/cdr/protocol.py` say how. Lower is better everywhere.

- **Epochs are chosen on validation users** who were cold-start users in a training run of their
  own. *published* columns have the best epoch on the test users instead, as the papers report.
- **mf** is the published base model: matrix factorisation without biases. **biased-mf** takes
  biases in closed form and leaves the rest to the models. Predictors without training need none.
- **±** is the standard deviation over the seeds. Every seed tests other users, so it is mostly that
  of the users. Differences are taken seed by seed, and their ± is that of the differences.
"""


class Score(NamedTuple):
    """What one model has at one beta."""

    name: str
    title: str
    base: str
    trivial: bool
    honest: dict[str, list[float]]
    """By metric, one value for each seed."""
    published: dict[str, list[float]]
    seconds: float | None

    @property
    def label(self) -> str:
        """Title and base."""
        return self.title if self.trivial else f"{self.title} ({self.base})"


class Difference(NamedTuple):
    """MIMNet's error less another's."""

    other: Score
    mean: float
    std: float

    @property
    def verdict(self) -> str:
        """Whether MIMNet is better or worse by more than the spread, or level."""
        if abs(self.mean) <= self.std:
            return "level"
        return "better" if self.mean < 0 else "worse"


def difference(ours: Score, other: Score, metric: str) -> Difference:
    """Seed by seed.

    >>> def score(*mae):
    ...     return Score("", "", "mf", False, {"mae": [*mae]}, {}, None)
    >>> found = difference(score(1.0, 1.1), score(1.2, 1.2), "mae")
    >>> f"{found.mean:.2f} {found.std:.2f} {found.verdict}"
    '-0.15 0.07 better'
    """
    pairs = zip(ours.honest[metric], other.honest[metric], strict=True)
    differences = [a - b for a, b in pairs]
    return Difference(other, statistics.fmean(differences), statistics.stdev(differences))


def scores(task: dict[str, Any], beta: float) -> list[Score]:
    """All predictors of a task at one beta; those without training once."""
    found = []
    for base, rows in task["bases"].items():
        for row in rows:
            if row["beta"] == beta and not (row["trivial"] and base != BASE):
                fields = {name: row[name] for name in Score._fields if name != "base"}
                found.append(Score(**fields, base=base))
    return found


def closest(all_scores: list[Score], metric: str, *, trivial: bool) -> Difference:
    """MIMNet against the best of the others: of those without training, or of the models."""
    ours = next(s for s in all_scores if (s.name, s.base) == (MODEL, BASE))
    others = [s for s in all_scores if s.trivial == trivial and s.name != MODEL]
    best = min(others, key=lambda score: statistics.fmean(score.honest[metric]))
    return difference(ours, best, metric)


def page(tasks: dict[str, dict[str, Any]]) -> str:
    """The document."""
    parts = [_INTRODUCTION, *_summary(tasks), *_quirks(tasks)]
    for name, task in tasks.items():
        parts += _section(name, task)
    return "\n".join(parts)


def _cells(tasks: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float, list[Score]]]:
    for name, task in tasks.items():
        for beta in dict.fromkeys(row["beta"] for row in task["bases"][BASE]):
            yield name, beta, scores(task, beta)


def _summary(tasks: dict[str, dict[str, Any]]) -> list[str]:
    verdicts: dict[tuple[str, bool], dict[str, list[str]]] = {}
    rows = []
    for name, beta, found in _cells(tasks):
        row = [name, str(beta)]
        for metric in METRICS:
            ours = next(s for s in found if (s.name, s.base) == (MODEL, BASE))
            row.append(_spread(ours.honest[metric]))
            for trivial in (True, False):
                against = closest(found, metric, trivial=trivial)
                row.append(_against(against))
                by_verdict = verdicts.setdefault((metric, trivial), {})
                by_verdict.setdefault(against.verdict, []).append(f"{name} {beta}")
        rows.append(row)
    header = ["task", "beta"]
    for metric in map(str.upper, METRICS):
        header += [f"{metric} of MIMNet", "less the best without training", "less the best model"]
    lines = [f"## MIMNet on {BASE} against the best of the others", ""]
    lines += results.markdown_table(header, rows)
    lines += ["", "*level*: the difference is within its spread over the seeds.", ""]
    for (metric, trivial), by_verdict in verdicts.items():
        lines.append(f"- {_sentence(metric, trivial, by_verdict, len(rows))}")
    return [*lines, ""]


def _sentence(metric: str, trivial: bool, verdicts: dict[str, list[str]], cells: int) -> str:
    others = "best predictor without training" if trivial else "best other model"
    better = len(verdicts.get("better", []))
    text = f"By {metric.upper()}, MIMNet is better than the {others} in {better} of {cells} cells"
    for verdict in ("level", "worse"):
        if where := verdicts.get(verdict):
            text += f"; {verdict} in {len(where)} ({', '.join(where)})"
    return text + "."


def _quirks(tasks: dict[str, dict[str, Any]]) -> list[str]:
    rows = []
    for name, beta, found in _cells(tasks):
        ours, released = (
            next(s for s in found if (s.name, s.base) == (model, "mf"))
            for model in (MODEL, "mimnet-released")
        )
        row = [name, str(beta)]
        for metric in METRICS:
            against = difference(ours, released, metric)
            row += [_spread(released.honest[metric]), _signed(against)]
        rows.append(row)
    header = ["task", "beta"]
    for metric in map(str.upper, METRICS):
        header += [f"{metric} as released", "MIMNet less that"]
    return [
        "## MIMNet as released and corrected, on mf",
        "",
        *results.markdown_table(header, rows),
        "",
    ]


def _section(name: str, task: dict[str, Any]) -> list[str]:
    data = task["dataset"]
    lines = [
        f"## {name}",
        "",
        f"{data['overlap_users']:,} users of both domains. Seconds are those of a model's second "
        "stage, both phases of one seed, on one thread of a machine with other work.",
        "",
    ]
    for beta in dict.fromkeys(row["beta"] for row in task["bases"][BASE]):
        rows = [
            [
                score.title,
                "" if score.trivial else score.base,
                *(_spread(score.honest[metric]) for metric in METRICS),
                *(_mean(score.published[metric]) for metric in METRICS),
                "" if score.seconds is None else f"{score.seconds:.1f}",
            ]
            for score in sorted(
                scores(task, beta), key=lambda score: statistics.fmean(score.honest["mae"])
            )
        ]
        header = ["model", "base", "MAE", "RMSE", "MAE published", "RMSE published", "seconds"]
        lines += [f"### beta {beta}", "", *results.markdown_table(header, rows), ""]
    settings = {k: v for k, v in task["config"].items() if k != "base"}
    lines += [
        f"Seeds {', '.join(map(str, task['seeds']))}; {results.listed(settings)}; "
        f"{results.listed(task['versions'])}; {task['machine']}; dataset "
        f"{data['fingerprint'][:16]}.",
        "",
    ]
    return lines


def _mean(values: list[float]) -> str:
    return f"{statistics.fmean(values):.4f}"


def _spread(values: list[float]) -> str:
    return f"{_mean(values)} ± {statistics.stdev(values):.4f}"


def _signed(found: Difference) -> str:
    return f"{found.mean:+.4f} ± {found.std:.4f}"


def _against(found: Difference) -> str:
    verdict = "" if found.verdict == "better" else f", **{found.verdict}**"
    return f"{_signed(found)} {found.other.label}{verdict}"


def measure(source: Path, target: Path, work: Path, progress: Progress) -> dict[str, Any]:
    """Prepare a task and train all models on both bases, or go on with it."""
    if not (work / "dataset").exists():
        prepare(source, target, work / "dataset", progress=progress)
    dataset = Dataset.load(work / "dataset")
    variants = tuple(Variant(name, spec.title, name) for name, spec in MODELS.items())
    plan = Plan("compare", variants, BETAS, SEEDS)
    found: dict[str, Any] = {}
    bases = {}
    for base in BASES:
        found = run_grid(dataset, Config(base=base), plan, work / base, progress)
        bases[base] = [_compact(row) for row in found["rows"]]
    kept = ("dataset", "config", "seeds", "versions", "machine")
    return {name: found[name] for name in kept} | {"bases": bases}


def _compact(row: dict[str, Any]) -> dict[str, Any]:
    kept = {name: row[name] for name in ("beta", "name", "title", "trivial", "seconds")}
    return kept | {
        selection: {
            metric: [round(v, 6) for v in row[selection][metric]["values"]] for metric in METRICS
        }
        for selection in results.SELECTIONS
    }


def _write(path: Path, task: dict[str, Any]) -> None:
    """One line for each row, so that a difference can be read."""
    bases = task["bases"]
    text = json.dumps({**task, "bases": {base: [] for base in bases}}, indent=1)
    for base, rows in bases.items():
        listed = ",\n".join("  " + json.dumps(row) for row in rows)
        text = text.replace(f'"{base}": []', f'"{base}": [\n{listed}\n ]')
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n")


def _raw(folder: Path, domain: str) -> Path:
    found = sorted(folder.glob(f"{domain}.csv*"))
    if len(found) != 1:
        raise SystemExit(f"{folder}: got {len(found)} files {domain}.csv or .csv.gz, need one")
    return found[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--collections", nargs="+", help="folders in --data; default: all")
    chosen = parser.parse_args(arguments)
    if (chosen.data is None) != (chosen.work is None):
        parser.error("--data and --work go together")
    if chosen.data is not None:
        with Progress() as progress:
            for folder in sorted(path for path in chosen.data.iterdir() if path.is_dir()):
                if chosen.collections and folder.name not in chosen.collections:
                    continue
                for source, target in TASKS:
                    name = f"{folder.name}-{source}-{target}"
                    files = _raw(folder, source), _raw(folder, target)
                    _write(RESULTS / f"{name}.json", measure(*files, chosen.work / name, progress))
    tasks = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    with atomic_file(PAGE) as temporary:
        temporary.write_text(page(tasks))


if __name__ == "__main__":
    main()

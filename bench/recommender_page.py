"""The document `docs/results.md`, from what `bench.recommender` has found."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from mimnet_fast.cdr import results
from mimnet_fast.cdr.config import Base

METRICS = ("mae", "rmse")
RANKS = ("hr@10", "ndcg@10", "mrr")
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
  *biases* in closed form, the mean, an item bias and a source user bias, and leaves the rest to the
  models. Predictors without training need none.
- **±** is the standard deviation over the seeds. Every seed tests other users, so it is mostly that
  of the users. Differences are taken seed by seed, and their ± is that of the differences. What is
  *better* or *worse* is so by more than that, all else is *level*.
"""

_STUDIES = {
    "quirks": (
        "What each quirk of the released code costs",
        "The released code with one thing corrected, less the released code as it is: below 0, the "
        "quirk costs.",
    ),
    "additions": (
        "What carries MIMNet beyond the biases",
        "Without one of the additions that this base has, less MIMNet: above 0, it helps.",
    ),
    "parts": (
        "MIMNet without one of its parts",
        "Less the whole: above 0, the part helps.",
    ),
    "overlap": (
        "MIMNet where fewer training users are known in both domains",
        "Less MIMNet with all of them: above 0, knowing them helps.",
    ),
    "sizes": (
        "MIMNet with other numbers of interests and routing passes",
        "Less MIMNet with the published numbers: below 0, the other number is better.",
    ),
}


class Score(NamedTuple):
    """What one model has at one beta."""

    name: str
    title: str
    base: str
    honest: dict[str, list[float]]
    """By metric, one value for each seed."""
    trivial: bool = False
    published: dict[str, list[float]] = {}  # noqa: RUF012
    seconds: float | None = None

    @classmethod
    def of(cls, row: dict[str, Any], base: str) -> Score:
        """Of a row of a table on a base."""
        return cls(**{name: row[name] for name in cls._fields if name in row}, base=base)

    @property
    def label(self) -> str:
        """Title and base."""
        return self.title if self.trivial else f"{self.title} ({self.base})"


class Difference(NamedTuple):
    """One error less another."""

    other: Score
    mean: float
    std: float

    @property
    def verdict(self) -> str:
        """Whether the one is better or worse by more than the spread, or level."""
        if abs(self.mean) <= self.std:
            return "level"
        return "better" if self.mean < 0 else "worse"


def difference(ours: Score, other: Score, metric: str) -> Difference:
    """Seed by seed.

    >>> def score(*mae):
    ...     return Score("", "", "mf", {"mae": [*mae]})
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
                found.append(Score.of(row, base))
    return found


def ours(all_scores: list[Score]) -> Score:
    """MIMNet on the base where it is at its best."""
    return _named(all_scores, MODEL, BASE)


def _named(all_scores: list[Score], name: str, base: str) -> Score:
    return next(score for score in all_scores if (score.name, score.base) == (name, base))


def closest(all_scores: list[Score], metric: str, *, trivial: bool) -> Difference:
    """MIMNet less the best of the others: of those without training, or of the models."""
    others = [s for s in all_scores if s.trivial == trivial and s.name != MODEL]
    return difference(ours(all_scores), best(others, metric), metric)


def best(all_scores: list[Score], metric: str) -> Score:
    """The one with the smallest error."""
    return min(all_scores, key=lambda score: statistics.fmean(score.honest[metric]))


def page(tasks: dict[str, dict[str, Any]]) -> str:
    """The document."""
    parts = [
        _INTRODUCTION,
        *_reading(tasks),
        *_summary(tasks),
        *_limits(tasks),
        *_quirks(tasks),
        *_studies(tasks),
        *_rankings(tasks),
    ]
    for name, task in tasks.items():
        parts += _section(name, task)
    return "\n".join(parts)


def _reading(tasks: dict[str, dict[str, Any]]) -> list[str]:
    """Where MIMNet wins and loses, and why."""
    cells = [found for _, _, found in _cells(tasks)]
    against = {
        (metric, trivial): [closest(found, metric, trivial=trivial) for found in cells]
        for metric in METRICS
        for trivial in (False, True)
    }
    counted = {
        key: _counted(Counter(each.verdict for each in all_)) for key, all_ in against.items()
    }
    rivals = Counter(
        each.other.title for each in against["mae", True] if each.verdict == "worse"
    ).most_common()
    lost = f", to {', '.join(f'*{title}* ({n})' for title, n in rivals)}" if rivals else ""
    apart = {
        metric: max(
            abs(difference(score, _named(found, "item_user_bias", BASE), metric).mean)
            for found in cells
            for score in found
            if score.base == BASE and not score.trivial and score.name != MODEL
        )
        for metric in METRICS
    }
    lines = [
        f"Of {len(cells)} cells, each a task at one beta, MIMNet on {BASE} is",
        "",
        f"- **against the best other model** by MAE {counted['mae', False]}; by RMSE "
        f"{counted['rmse', False]};",
        f"- **against the best predictor without training** by MAE {counted['mae', True]}{lost}; "
        f"by RMSE {counted['rmse', True]}.",
        "",
        "**Why it loses by MAE.** The median of ratings that pile up at 5 is above their mean, and "
        "whole ratings are often met exactly. Medians and rounding need no model; all models here "
        "are trained by squared errors, as published.",
        "",
        f"**Why so many are level.** On {BASE} the other models end at the biases: in no cell is "
        f"one more than {apart['mae']:.4f} in MAE or {apart['rmse']:.4f} in RMSE away from them. "
        "Factors of so few ratings hold nothing beyond them, so a map of factors has nothing to "
        "carry over. MIMNet alone is told more, counts and means of ratings "
        "(`mimnet_fast/cdr/profiles.py`).",
    ]
    without = [
        (name, {row["name"]: Score.of(row, BASE) for row in study["rows"]})
        for name, study in _found(tasks, f"additions-{BASE}").items()
    ]
    if without:
        costs = [
            f"{name} {' and '.join(_cost(rows['no-profiles'], rows[MODEL]))}"
            for name, rows in without
        ]
        lines += [
            "",
            f"**What carries the gain.** Without profiles MIMNet has on {'; on '.join(costs)}.",
        ]
    if limits := _limit_counts(tasks):
        of_rmse, of_ours, of_mae = (
            _counted(limits[column]) for column in (TREES_RMSE, OURS_RMSE, OURS_MAE)
        )
        lines += [
            "",
            "**How much there is to win.** By RMSE, boosted trees that are told the same are "
            f"{of_rmse} against the biases, and MIMNet is {of_ours} against the trees. By MAE, "
            f"MIMNet moved and rounded like its hardest rival is {of_mae} against the best "
            "predictor without training.",
        ]
    ranked = []
    for name, task in tasks.items():
        for protocol, found in task.get("rankings", {}).items():
            first, mimnet = _ranked(found["rows"])[0], _named(_ranked(found["rows"]), MODEL, "mf")
            values = (_spread(score.honest["ndcg@10"]) for score in (mimnet, first))
            ranked.append(f"{' against '.join(values)} of {first.title} on {name}, {protocol}")
    if ranked:
        lines += ["", f"**Ranking.** MIMNet and the best by NDCG@10: {'; '.join(ranked)}."]
    return ["## In short", "", *lines, ""]


def _ranked(rows: list[dict[str, Any]]) -> list[Score]:
    """Of a ranking, the best first."""
    scored = [Score.of(row, "mf") for row in rows]
    return sorted(scored, key=lambda score: -statistics.fmean(score.honest["ndcg@10"]))


def _cost(without: Score, whole: Score) -> Iterator[str]:
    for metric in METRICS:
        found = difference(without, whole, metric)
        yield f"{_signed(found)} {metric.upper()} ({found.verdict})"


def _found(tasks: dict[str, dict[str, Any]], study: str) -> dict[str, dict[str, Any]]:
    """A study on the tasks that have it."""
    return {
        name: task["studies"][study]
        for name, task in tasks.items()
        if study in task.get("studies", {})
    }


def _counted(verdicts: Counter[str]) -> str:
    return ", ".join(f"{word} in {verdicts[word]}" for word in ("better", "level", "worse"))


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
            row.append(_spread(ours(found).honest[metric]))
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
    lines.append("")
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
        whole, released = (_named(found, model, "mf") for model in (MODEL, "mimnet-released"))
        row = [name, str(beta)]
        for metric in METRICS:
            against = difference(whole, released, metric)
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


def _studies(tasks: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for study, (title, meaning) in _STUDIES.items():
        for base in BASES:
            if found := _found(tasks, f"{study}-{base}"):
                lines += [f"## {title}, on {base}", "", *_study(meaning, found)]
    return lines


def _study(meaning: str, found: dict[str, dict[str, Any]]) -> list[str]:
    first = next(iter(found.values()))
    reference = first["reference"]
    by_task = {
        task: {row["name"]: Score.of(row, study["base"]) for row in study["rows"]}
        for task, study in found.items()
    }
    seeds = ", ".join(f"{len(study['seeds'])} on {task}" for task, study in found.items())
    rows = []
    verdicts: dict[str, dict[str, dict[str, list[str]]]] = {metric: {} for metric in METRICS}
    for name, score in next(iter(by_task.values())).items():
        row = [score.title]
        for task, scored in by_task.items():
            for metric in METRICS:
                if name == reference:
                    row.append(_spread(scored[name].honest[metric]))
                    continue
                against = difference(scored[name], scored[reference], metric)
                row.append(_signed(against))
                by_verdict = verdicts[metric].setdefault(score.title, {})
                by_verdict.setdefault(against.verdict, []).append(task)
        rows.append(row)
    header = ["", *(f"{metric.upper()}, {task}" for task in found for metric in METRICS)]
    return [
        f"{meaning} Beta {first['beta']}; seeds: {seeds}.",
        "",
        *results.markdown_table(header, rows),
        "",
        *(f"- By {metric.upper()}: {_sorted(verdicts[metric])}." for metric in METRICS),
        "",
    ]


def _sorted(verdicts: dict[str, dict[str, list[str]]]) -> str:
    """What is better, level or worse, on which tasks if not on all of them.

    >>> _sorted({"a": {"worse": ["x", "y"]}, "b": {"level": ["x"], "worse": ["y"]}})
    'worse: a; b (level on x, worse on y)'
    """
    parts = []
    for verdict in ("better", "level", "worse"):
        if titles := [title for title, found in verdicts.items() if [*found] == [verdict]]:
            parts.append(f"{verdict}: {', '.join(titles)}")
    for title, found in verdicts.items():
        if len(found) > 1:
            where = ", ".join(f"{each} on {' and '.join(found[each])}" for each in sorted(found))
            parts.append(f"{title} ({where})")
    return "; ".join(parts)


TREES_RMSE = "RMSE: trees less biases"
OURS_RMSE = "RMSE: MIMNet less trees"
OURS_MAE = "MAE: MIMNet, moved and rounded, less the best without training"


def _limit_differences(
    tasks: dict[str, dict[str, Any]],
) -> Iterator[tuple[str, float, dict[str, Difference]]]:
    for name, beta, found in _cells(tasks):
        measured = {
            row["name"]: Score.of(row, BASE)
            for row in tasks[name].get("limits", {"rows": []})["rows"]
            if row["beta"] == beta
        }
        if not measured:
            continue
        trees, alone = measured["trees"], measured["trees-alone"]
        biases = _named(found, "item_user_bias", BASE)
        hardest = best([score for score in found if score.trivial], "mae")
        yield (
            name,
            beta,
            {
                TREES_RMSE: difference(trees, biases, "rmse"),
                "RMSE: trees told the biases alone less biases": difference(alone, biases, "rmse"),
                OURS_RMSE: difference(ours(found), trees, "rmse"),
                "MAE: trees less the best without training": difference(trees, hardest, "mae"),
                "MAE: trees told the biases alone less the same": difference(alone, hardest, "mae"),
                OURS_MAE: difference(measured["mimnet-rounded"], hardest, "mae"),
            },
        )


def _limit_counts(tasks: dict[str, dict[str, Any]]) -> dict[str, Counter[str]]:
    """How often each difference is better, level or worse, by column."""
    counts: dict[str, Counter[str]] = {}
    for _, _, columns in _limit_differences(tasks):
        for column, each in columns.items():
            counts.setdefault(column, Counter())[each.verdict] += 1
    return counts


def _limits(tasks: dict[str, dict[str, Any]]) -> list[str]:
    rows = [
        [name, str(beta), *map(_signed, columns.values())]
        for name, beta, columns in _limit_differences(tasks)
    ]
    if not rows:
        return []
    counts = _limit_counts(tasks)
    return [
        "## How much there is to win",
        "",
        "Boosted trees find what a few numbers hold, interactions too. They are told what the "
        "biases expect and the profiles that MIMNet is told, weigh errors as MIMNet does, and stop "
        "where validation users are predicted best: after no tree, if none helps. By MAE they are "
        "fitted to absolute errors. MIMNet is *moved and rounded* as the hardest predictor without "
        "training is: by the median of what it leaves of the validation users' ratings, then to "
        "the nearest rating.",
        "",
        *results.markdown_table(["task", "beta", *counts], rows),
        "",
        *(
            f"- {column}: {_counted(count)} of {len(rows)} cells."
            for column, count in counts.items()
        ),
        "",
    ]


def _rankings(tasks: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, task in tasks.items():
        for protocol, found in task.get("rankings", {}).items():
            scored = _ranked(found["rows"])
            place = "" if found["beta"] is None else f", beta {found['beta']}"
            same = ", which test the same users" if found["beta"] is None else ""
            whole = _named(scored, MODEL, "mf")
            readings = []
            for metric in RANKS:
                other = max(
                    (score for score in scored if score.name != MODEL),
                    key=lambda score: statistics.fmean(score.honest[metric]),
                )
                against = difference(other, whole, metric)  # more is better here
                ahead = statistics.fmean(whole.honest[metric]) - statistics.fmean(
                    other.honest[metric]
                )
                readings.append(
                    f"by {metric.upper()} {against.verdict} ({ahead:+.4f} ± {against.std:.4f} "
                    f"against {other.title})"
                )
            rows = [
                [score.title, *(_spread(score.honest[metric]) for metric in RANKS)]
                for score in scored
            ]
            lines += [
                f"## Ranking, {protocol}: {name}{place}",
                "",
                "Positives of the test users are ranked among all items that a user has not seen. "
                f"On mf, over {len(found['seeds'])} seeds{same}; higher is better.",
                "",
                *results.markdown_table(["model", *map(str.upper, RANKS)], rows),
                "",
                f"MIMNet is, against the best of the others, {', '.join(readings)}.",
                "",
            ]
    return lines


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

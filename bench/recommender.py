"""All models on real ratings: `python -m bench.recommender --data FOLDER --work FOLDER`.

FOLDER of the data has a folder for each collection, with `movies`, `books` and `music` as `.csv` or
`.csv.gz`. Every task is prepared and every model trained there at several betas and seeds, on both
base models; then come studies of MIMNet, rankings, and how much there is to win (`bench.limits`).
A run that was stopped goes on, and `--only` takes some of these parts. What was found is kept in
`bench/results/recommender`, a file for each task, and `docs/results.md` is written from all of
these files; without folders nothing is trained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

from rich.progress import Progress

from bench import limits
from bench.recommender_page import BASE, BASES, METRICS, MODEL, RANKS, page
from bench.report import ROOT
from mimnet_fast.cdr import results
from mimnet_fast.cdr.atomic import atomic_file
from mimnet_fast.cdr.config import Base, Config
from mimnet_fast.cdr.dataset import Dataset, prepare
from mimnet_fast.cdr.grids import Plan, Variant, run_grid
from mimnet_fast.cdr.implicit import Protocol
from mimnet_fast.cdr.models import ABLATIONS, MODELS
from mimnet_fast.cdr.ranking_experiment import Ranking
from mimnet_fast.cdr.studies import SWEPT, sweep_variants

RESULTS = ROOT / "bench" / "results" / "recommender"
PAGE = ROOT / "docs" / "results.md"

TASKS = (("movies", "music"), ("books", "movies"), ("books", "music"))
BETAS = (0.2, 0.5, 0.8)
STUDIED_BETA = 0.2
SEEDS = tuple(range(2020, 2025))


class Place(NamedTuple):
    """A task that was prepared, and where it is worked on."""

    dataset: Dataset
    work: Path
    seeds: tuple[int, ...]
    progress: Progress

    def grid(self, plan: Plan, base: Base, folder: str | None = None) -> dict[str, Any]:
        """Run a plan, or go on with it."""
        out = self.work / (folder or base)
        return run_grid(self.dataset, Config(base=base), plan, out, self.progress)


def compare(place: Place) -> dict[str, Any]:
    """All models on both bases."""
    variants = tuple(Variant(name, spec.title, name) for name, spec in MODELS.items())
    plan = Plan("compare", variants, BETAS, place.seeds)
    found: dict[str, Any] = {}
    bases = {}
    for base in BASES:
        found = place.grid(plan, base)
        bases[base] = [_compact(row, METRICS) for row in found["rows"]]
    kept = ("dataset", "config", "seeds", "versions", "machine")
    return {name: found[name] for name in kept} | {"bases": bases}


def _without(model: str, config: Config, only_on: Base | None = None) -> tuple[Variant, ...]:
    """A model, and without each of its parts or quirks, or of those that only one base has."""
    whole = Variant(model, MODELS[model].title, model)
    chosen = {name: spec for name, spec in ABLATIONS[model].items() if spec.only_on == only_on}
    return whole, *(Variant(name, spec.title, name) for name, spec in chosen.items())


def _swept(values: dict[str, Sequence[float]], config: Config) -> tuple[Variant, ...]:
    """MIMNet with the settings of the papers, and with one of them changed."""
    return sweep_variants({name: getattr(config, name) for name in SWEPT}, values, full=False)


_STUDIED: dict[str, tuple[tuple[Base, ...], str, Callable[[Config], tuple[Variant, ...]]]] = {
    "quirks": (("mf",), "mimnet-released", partial(_without, "mimnet-released")),
    "additions": ((BASE,), MODEL, partial(_without, MODEL, only_on=BASE)),
    "parts": (BASES, MODEL, partial(_without, MODEL)),
    "overlap": (BASES, MODEL, partial(_swept, {"overlap": (0.1, 0.25, 0.5, 1.0)})),
    "sizes": (
        BASES,
        MODEL,
        partial(_swept, {"interests": (1, 3, 7, 14), "iterations": (1, 2, 3, 5)}),
    ),
}


def study(name: str, base: Base, place: Place) -> dict[str, Any]:
    """Variants of a model at one beta."""
    _, reference, variants = _STUDIED[name]
    plan = Plan(
        name, variants(Config(base=base)), (STUDIED_BETA,), place.seeds, reference=reference
    )
    rows = [_compact(row, METRICS) for row in place.grid(plan, base)["rows"] if not row["trivial"]]
    about = {"base": base, "beta": STUDIED_BETA, "seeds": place.seeds, "reference": reference}
    return {"studies": {f"{name}-{base}": about | {"rows": rows}}}


def rank(protocol: Protocol, place: Place) -> dict[str, Any]:
    """All models that can rank."""
    task = Ranking(protocol=protocol)
    config = Config()
    names = [name for name in MODELS if task.refusal(name, config) is None]
    plan = Plan(
        "ranking",
        tuple(Variant(name, MODELS[name].title, name) for name in names),
        (STUDIED_BETA,) if task.cold else (),
        place.seeds,
        task=task,
    )
    rows = place.grid(plan, config.base, f"ranking-{protocol}")["rows"]
    about = {"beta": STUDIED_BETA if task.cold else None, "seeds": place.seeds}
    return {"rankings": {protocol: about | {"rows": [_compact(row, RANKS) for row in rows]}}}


def limit(place: Place) -> dict[str, Any]:
    """What `bench.limits` finds."""
    rows = limits.measure(place.dataset, BETAS, place.seeds, place.work / BASE)
    return {"limits": {"rows": rows}}


PARTS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "compare": compare,
    **{
        f"{name}-{base}": partial(study, name, base)
        for name, (bases, _, _) in _STUDIED.items()
        for base in bases
    },
    **{f"ranking-{protocol}": partial(rank, protocol) for protocol in get_args(Protocol)},
    "limits": limit,
}


def _compact(row: dict[str, Any], metrics: Iterable[str]) -> dict[str, Any]:
    kept = {name: row[name] for name in ("beta", "name", "title", "trivial", "seconds")}
    return kept | {
        selection: {
            metric: [round(v, 6) for v in row[selection][metric]["values"]] for metric in metrics
        }
        for selection in results.SELECTIONS
    }


def merged(task: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What is known of a task, with what was found now.

    >>> merged({"studies": {"a": {"rows": [1]}}, "seeds": [1]}, {"studies": {"b": {"rows": [2]}}})
    {'studies': {'a': {'rows': [1]}, 'b': {'rows': [2]}}, 'seeds': [1]}
    """
    kept = {
        name: {**task.get(name, {}), **found[name]}
        for name in ("studies", "rankings")
        if name in found
    }
    return {**task, **found, **kept}


def _write(path: Path, task: dict[str, Any]) -> None:
    """One line for each row, so that a difference can be read."""
    tables: list[list[dict[str, Any]]] = []

    def without_rows(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without_rows(each) for name, each in value.items()}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            tables.append(value)
            return f"table {len(tables)}"
        return value

    text = json.dumps(without_rows(task), indent=1)
    for number, rows in enumerate(tables, 1):
        listed = ",\n".join("  " + json.dumps(row) for row in rows)
        text = text.replace(f'"table {number}"', f"[\n{listed}\n ]")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n")


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _raw(folder: Path, domain: str) -> Path:
    found = sorted(folder.glob(f"{domain}.csv*"))
    if len(found) != 1:
        raise SystemExit(f"{folder}: got {len(found)} files {domain}.csv or .csv.gz, need one")
    return found[0]


def _prepared(source: Path, target: Path, work: Path, progress: Progress) -> Dataset:
    if not (work / "dataset").exists():
        prepare(source, target, work / "dataset", progress=progress)
    return Dataset.load(work / "dataset")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--tasks", nargs="+", help="COLLECTION-SOURCE-TARGET each; default: all")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of the five")
    chosen = parser.parse_args(arguments)
    if (chosen.data is None) != (chosen.work is None):
        parser.error("--data and --work go together")
    if chosen.data is not None:
        with Progress() as progress:
            for folder in sorted(path for path in chosen.data.iterdir() if path.is_dir()):
                for source, target in TASKS:
                    name = f"{folder.name}-{source}-{target}"
                    if chosen.tasks and name not in chosen.tasks:
                        continue
                    work, path = chosen.work / name, RESULTS / f"{name}.json"
                    files = _raw(folder, source), _raw(folder, target)
                    dataset = _prepared(*files, work, progress)
                    place = Place(dataset, work, SEEDS[: chosen.seeds], progress)
                    for part in chosen.only:
                        _write(path, merged(_read(path), PARTS[part](place)))
    tasks = {path.stem: _read(path) for path in sorted(RESULTS.glob("*.json"))}
    with atomic_file(PAGE) as temporary:
        temporary.write_text(page(tasks))


if __name__ == "__main__":
    main()

"""The command `mimnet-fast`.

A mistake of the user ends with one message and exit code 2. Results go to standard output, progress
and messages to standard error.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from typer.core import TyperCommand, TyperGroup

from mimnet_fast import info as installation
from mimnet_fast.backends import BackendUnavailable
from mimnet_fast.cdr import demo as demonstration
from mimnet_fast.cdr import inspection, reports, results
from mimnet_fast.cdr.atomic import atomic_file
from mimnet_fast.cdr.cleaning import Duplicates
from mimnet_fast.cdr.config import Base, Config, Mapping
from mimnet_fast.cdr.dataset import Dataset
from mimnet_fast.cdr.dataset import prepare as prepare_dataset
from mimnet_fast.cdr.diagnostics import warning
from mimnet_fast.cdr.download import AMAZON, CATEGORIES, Files, download_amazon
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.experiment import RATING, BaseModels, train_models
from mimnet_fast.cdr.export import ExportFormat
from mimnet_fast.cdr.export import export as export_program
from mimnet_fast.cdr.grids import Plan, Variant, run_grid
from mimnet_fast.cdr.implicit import Objective, Protocol
from mimnet_fast.cdr.models import ABLATIONS, MODELS, ModelSpec
from mimnet_fast.cdr.packing import MODEL, pack
from mimnet_fast.cdr.protocol import HistoryOrder
from mimnet_fast.cdr.ranking_experiment import Ranking
from mimnet_fast.cdr.readers import Format, OnError
from mimnet_fast.cdr.serving import Kernels, Recommender
from mimnet_fast.cdr.studies import SWEPT, sweep_variants
from mimnet_fast.cdr.synthetic import Synthetic
from mimnet_fast.cdr.tasks import Task

CategoryName = Literal["Movies_and_TV", "CDs_and_Vinyl", "Books", "all"]
Backend = Literal["auto", "native", "triton", "reference"]
TaskName = Literal["ratings", "ranking"]
Ablated = Literal["mimnet", "mimnet-released"]
ModelName = Literal[
    "mimnet", "mimnet-released", "ptupcdr", "remit", "emcdr", "sscdr", "lacdr", "cmf", "tgt", "all"
]

_messages = Console(stderr=True)


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (UserError, BackendUnavailable, OSError) as error:
            if ctx.params["debug"]:
                raise
            _messages.print(
                f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
            )
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Group, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
BackendOption = Annotated[Backend, typer.Option(help="Which kernels compute MIMNet and bridges.")]
Checkpoint = Annotated[Path, typer.Argument(help="Folder of a run of mimnet, or its file.")]
DatasetFolder = Annotated[Path, typer.Argument(help="Folder made by `prepare`.")]
Out = Annotated[Path, typer.Option(help="Folder of all runs and tables.")]
Betas = Annotated[
    list[float], typer.Option(help="Shares of shared users to test on; not with leave-last-out.")
]
Swept = Annotated[list[int], typer.Option(help="Values, or the one for all runs.")]
SweptShares = Annotated[
    list[float], typer.Option(help="The same: shares of the training users of both domains.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with what is in --out, or add something to it.")
]
Seed = Annotated[int, typer.Option(help="Decides the split and everything random.")]

_Options = dict[str, tuple[Any, Any]]
"""By name: how an option is declared, and its default."""

_RUN: _Options = {
    "seed": (Seed, Config.seed),
    "resume": (Resume, False),
    "as_json": (AsJson, False),
}
"""Of a single run."""

_GRID: _Options = {
    "betas": (Betas, [Config.beta]),
    "seeds": (
        Annotated[int, typer.Option(min=1, help="How many seeds: --seed and those after it.")],
        5,
    ),
    **_RUN,
}
"""Of every command that runs a grid."""


def _ranking(default: object, kind: Any, text: str, *names: str) -> tuple[Any, None]:
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    option = typer.Option(*names, help=f"Ranking: {text}.", show_default=shown)
    return Annotated[kind | None, option], None


_RANKING: _Options = {
    "objective": _ranking(Ranking.objective, Objective, "loss of both stages"),
    "protocol": _ranking(
        Ranking.protocol, Protocol, "test on cold-start users, or on the last positive of each user"
    ),
    "negatives": _ranking(Ranking.negatives, int, "unseen items drawn for each positive"),
    "cutoffs": _ranking(Ranking.cutoffs, list[int], "cutoffs of HR@k and NDCG@k", "--k"),
}
"""Fields of `Ranking`; None where they are not given."""

_TASK: _Options = {
    "task": (
        Annotated[
            TaskName, typer.Option(help="Predict ratings, or rank all items by implicit feedback.")
        ],
        "ratings",
    ),
    **_RANKING,
}
"""What models are trained for."""

_SETTINGS: _Options = {
    name: (annotation, getattr(Config, name))
    for name, annotation in {
        "history_order": Annotated[
            HistoryOrder, typer.Option(help="What is recent: file order or timestamps.")
        ],
        "history_length": Annotated[
            int, typer.Option(help="Liked source items per user, the last.")
        ],
        "overlap": Annotated[
            float, typer.Option(help="Share of the training users who are known in both domains.")
        ],
        "base": Annotated[
            Base,
            typer.Option(
                help="Base models. mf: matrix factorization without biases, as published; gmf: "
                "with a weight for each feature; dnn: with a layer for users; biased-mf: of what "
                "biases leave, with counts and means of ratings as further inputs of MIMNet. Every "
                "model takes each, but nothing is ranked on biased-mf, and the ablations "
                "no-profiles, no-user-weights and no-averaging are of it alone.",
            ),
        ],
        "epochs": Annotated[int, typer.Option(help="Epochs of stage 2.")],
        "batch_size": Annotated[int, typer.Option(help="Batch of stage 2.")],
        "base_epochs": Annotated[int, typer.Option(help="Epochs of stage 1.")],
        "base_batch_size": Annotated[int, typer.Option(help="Batch of stage 1.")],
        "learning_rate": Annotated[float, typer.Option(help="Of Adam.")],
        "features": Annotated[int, typer.Option(help="Width of embeddings.")],
        "hidden": Annotated[int, typer.Option(help="Width of meta networks.")],
        "mapping": Annotated[
            Mapping, typer.Option(help="Of users in EMCDR and SSCDR: one matrix, or an MLP.")
        ],
        "interests": Annotated[int, typer.Option(help="Interests per user.")],
        "iterations": Annotated[int, typer.Option(help="Routing passes.")],
        "prototypes": Annotated[int, typer.Option(help="Clusters of target items.")],
        "backend": BackendOption,
    }.items()
}
"""Of every command that trains: fields of `Config` with its defaults."""

_Command = TypeVar("_Command", bound=Callable[..., None])


def _with(*groups: _Options, but: Collection[str] = ()) -> Callable[[_Command], _Command]:
    """Give a command the options of ``groups`` in place of its ``**options``."""

    def add(command: _Command) -> _Command:
        signature = inspect.signature(command, eval_str=True)
        *parameters, _ = signature.parameters.values()
        parameters += [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
            for group in groups
            for name, (annotation, default) in group.items()
            if name not in but
        ]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return add


def _config(options: dict[str, Any], **others: Any) -> Config:
    """The settings among the options, which are gone afterwards, and others."""
    names = {*_SETTINGS, "seed"} & options.keys()
    return Config(**{name: options.pop(name) for name in names}, **others)


def _task(options: dict[str, Any]) -> Task:
    """What the options of `_TASK`, which are gone afterwards, describe."""
    chosen, ranking = options.pop("task"), {name: options.pop(name) for name in _RANKING}
    given = {name: value for name, value in ranking.items() if value not in (None, [])}
    if chosen == "ranking":
        return Ranking(**given)
    for name, value in given.items():
        raise UserError(f"{name}: got {value}, but ratings are predicted: add --task ranking")
    return RATING


def _chosen(
    what: str, names: list[str], known: dict[str, ModelSpec], task: Task, config: Config
) -> tuple[Variant, ...]:
    """The models by these names; by ``all`` those that can take part."""
    if names == ["all"]:
        names = [name for name in known if task.refusal(name, config) is None]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{what}: got {unknown[0]!r}, need some of {', '.join(known)}, or all")
    return tuple(Variant(name, known[name].title, name) for name in names)


class _ListOptions(TyperCommand):
    """A command whose options of several values take them in a row: ``--betas 0.2 0.5 0.8``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each further value, as the parser wants it."""
        lists = {
            name for each in self.params if getattr(each, "multiple", False) for name in each.opts
        }
        repeated: list[str] = []
        option = None
        for arg in args:
            if arg.startswith("-"):
                option = arg if arg in lists else None
            elif option is not None and repeated[-1] != option:
                repeated.append(option)
            repeated.append(arg)
        return super().parse_args(ctx, repeated)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Cross-domain recommendation for cold-start users, on kernels made for it."""


@app.command()
def prepare(
    source: Annotated[Path, typer.Option(help="Ratings of the domain whose users are known.")],
    target: Annotated[Path, typer.Option(help="Ratings of the domain to predict.")],
    out: Annotated[Path, typer.Option(help="New folder for the dataset.")],
    source_metadata: Annotated[
        Path | None, typer.Option(help="Categories and brands of the source items, for REMIT.")
    ] = None,
    format: Annotated[
        Format, typer.Option(help="Of both files of ratings; auto looks at them.")
    ] = "auto",
    on_error: Annotated[
        OnError, typer.Option(help="What to do at a malformed row: stop, or leave out and list.")
    ] = "raise",
    duplicates: Annotated[
        Duplicates, typer.Option(help="What counts of several ratings of one item by one user.")
    ] = "last",
    min_user_ratings: Annotated[
        int, typer.Option(min=1, help="Drop users with fewer ratings in a domain.")
    ] = 1,
    min_item_ratings: Annotated[
        int, typer.Option(min=1, help="Drop items with fewer ratings.")
    ] = 1,
    k_core: Annotated[
        int, typer.Option(min=1, help="Both minima at once: the k-core of each domain.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Turn two rating files into a dataset.

    A file is a table with the columns user_id, item_id, rating and, optionally, timestamp (.csv,
    .tsv or .parquet), Amazon reviews (JSON lines) or ratings (.csv without a header), or a RecBole
    atomic file (.inter); text also as .gz. User ids are shared by both files, item ids are not.
    Metadata is a table with the columns item_id and category, brand or both, or Amazon's (an object
    in each line).
    """
    with _progress(DownloadColumn()) as progress:
        summary = prepare_dataset(
            source,
            target,
            out,
            source_metadata=source_metadata,
            format=format,
            on_error=on_error,
            duplicates=duplicates,
            min_user_ratings=max(min_user_ratings, k_core),
            min_item_ratings=max(min_item_ratings, k_core),
            progress=progress,
        )
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    for domain in ("source", "target"):
        found = summary[domain]
        print(
            f"{domain} {found['file']} ({found['kind']}): {found['ratings']:,} ratings, "
            f"{found['users']:,} users, {found['items']:,} items, mean {found['mean_rating']:.3f}"
        )
        removed = ", ".join(f"{count:,} {why}" for why, count in found["removed"].items() if count)
        print(f"  of {found['rows']:,} rows; removed: {removed or 'none'}")
        if found["unused_columns"]:
            print(f"  columns not used: {', '.join(found['unused_columns'])}")
    if metadata := summary["source"].get("metadata"):
        kinds = ", ".join(
            f"{count:,} values of {kind}" for kind, count in metadata["values"].items()
        )
        print(f"metadata {metadata['file']}: of {metadata['items']:,} source items, {kinds}")
    print(f"{summary['overlap_users']:,} users of both domains; dataset in {out}")
    if (out / "skipped.csv").exists():
        print(f"malformed rows are listed in {out / 'skipped.csv'}")


downloads = typer.Typer(help="Fetch public rating files.", no_args_is_help=True)
app.add_typer(downloads, name="download")


@downloads.command()
def amazon(
    category: Annotated[CategoryName, typer.Option(help="Which files.")] = "all",
    files: Annotated[
        Files, typer.Option(help="5-core reviews (JSON lines), or all ratings (CSV).")
    ] = "reviews",
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("data/amazon"),
    base: Annotated[str, typer.Option("--from", help="Address of the folder with the files.")] = (
        AMAZON
    ),
    as_json: AsJson = False,
) -> None:
    """Fetch Amazon's reviews or ratings of 2014, those of the published experiments.

    Run the same command again to go on where it was stopped. Checksums are compared with known ones
    where there are any, else with those of the first download, kept in NAME.sha256.
    """
    with _progress(DownloadColumn(), TransferSpeedColumn()) as progress:
        categories = CATEGORIES if category == "all" else [category]
        found = download_amazon(categories, files, out, base=base, progress=progress)
    if as_json:
        print(json.dumps([{**asdict(each), "path": str(each.path)} for each in found], indent=2))
        return
    for each in found:
        state = "fetched" if each.fetched else "there already"
        print(f"{each.path}: {state}, SHA-256 {each.sha256} ({each.check})")


@app.command(cls=_ListOptions)
@_with(_RUN, _TASK, _SETTINGS)
def train(
    dataset: DatasetFolder,
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    model: Annotated[
        ModelName, typer.Option(help="Predictors without training always join in.")
    ] = "mimnet",
    beta: Annotated[
        float, typer.Option(help="Share of shared users to test on; not with leave-last-out.")
    ] = Config.beta,
    **options: Any,
) -> None:
    """Train models on a dataset and measure them.

    They predict ratings by cold-start users, or, with --task ranking, rank all items by implicit
    feedback: ratings above 3 are positives, or all ratings of a domain that has none above 3.
    """
    task, config = _task(options), _config(options, beta=beta)
    _check_new(out, options["resume"])
    variants = _chosen("model", [model], MODELS, task, config)
    names = [each.name for each in variants]
    task.check(names, config)
    data = Dataset.load(dataset)
    with _progress() as progress:
        stage1 = task.stage1(data, config, out, progress)
        found = train_models(stage1, names, out)
    recommender = None
    if isinstance(stage1, BaseModels) and MODEL in found["models"]:
        recommender = pack(dataset, out, stage1)
    for each in found["models"].values():
        if "diagnostics" in each and (told := warning(each["title"], each["diagnostics"])):
            _messages.print(f"warning: {told}", style="yellow", markup=False, soft_wrap=True)
    if options["as_json"]:
        print(json.dumps(found, indent=2))
        return
    for table in results.tables(found):
        Console().print(table)
    print(f"results in {out / 'results.md'} and {out / 'results.json'}")
    if recommender:
        print(f"for mimnet-fast recommend: {recommender}")


@app.command(cls=_ListOptions)
def recommend(
    checkpoint: Checkpoint,
    user: Annotated[
        list[str], typer.Option(help="Ids of users of the source domain.", show_default=False)
    ] = [],  # noqa: B006
    history: Annotated[
        list[str], typer.Option(help="Instead: source items that a new user likes, oldest first.")
    ] = [],  # noqa: B006
    top_k: Annotated[int, typer.Option(help="Items per user.")] = 20,
    seen: Annotated[bool, typer.Option("--seen", help="Also items that the user rated.")] = False,
    kernels: Annotated[Kernels, typer.Option(help="Which kernels score the items.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Recommend target items to users of the source domain, by the model that `train` left."""
    recommender = Recommender.load(checkpoint, kernels=kernels)
    found = recommender.recommend(
        user or None,
        histories=[history] if history else None,
        top_k=top_k,
        exclude_seen=not seen,
    )
    if as_json:
        listed = [
            {"user": name or None, "items": [each._asdict() for each in items]}
            for name, items in zip(user or [""], found, strict=True)
        ]
        print(json.dumps(listed, indent=2))
        return
    for name, items in zip(user or ["a new user"], found, strict=True):
        rows = [(escape(each.item), f"{each.score:.3f}") for each in items]
        title = f"For {escape(name)}"
        Console().print(results.screen_table(("item", "score"), rows, title=title, caption=""))


@app.command()
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="The program's file, by custom .pt2.")],
    format: Annotated[
        ExportFormat, typer.Option(help="Of torch.export, or compiled by AOTInductor.")
    ] = "export",
) -> None:
    """Write the scoring model that `train` left as a program that needs none of its code.

    Inputs are the rows of a history [B, L], lengths [B], source vectors [B, D] and rows of items
    [B]; the output is ratings [B].
    """
    export_program(checkpoint, out, format)


@app.command("inspect", cls=_ListOptions)
def inspect_user(
    checkpoint: Checkpoint,
    user: Annotated[str, typer.Option(help="Id of a user of the source domain.")],
    out: Annotated[Path, typer.Option(help="The page, an HTML file.")],
    items: Annotated[
        list[str],
        typer.Option(help="Ids of target items.", show_default="those with the highest scores"),
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Show in a page why MIMNet recommends what it does to a user.

    Which liked items feed which interest, which interest answers which item, how much of an answer
    the item's kind gives rather than the item, and how alike interests and their bridges are.
    """
    found = inspection.inspect(checkpoint, user, items or None)
    with atomic_file(out) as path:
        path.write_text(inspection.page(found), encoding="utf-8")
    print(json.dumps(found, indent=2) if as_json else f"page in {out}: open it in a browser")


@app.command(cls=_ListOptions)
@_with(_GRID, _TASK, _SETTINGS, but=["betas"])
def compare(
    dataset: DatasetFolder,
    out: Out,
    models: Annotated[
        list[str],
        typer.Option(help=f"Of {', '.join(MODELS)}; all that the task takes.", show_default="all"),
    ] = ["all"],  # noqa: B006
    betas: Betas = [0.2, 0.5, 0.8],  # noqa: B006
    **options: Any,
) -> None:
    """Train models at several betas and seeds and compare them.

    compare.{md,csv,json} and a plot in --out are brought up to date after every trained model.
    """
    task, config = _task(options), _config(options)
    variants = _chosen("models", models, MODELS, task, config)
    _run_grid("compare", variants, dataset, out, task, config, betas=betas, **options)


@app.command(cls=_ListOptions)
@_with(_GRID, _TASK, _SETTINGS, but=SWEPT)
def sweep(
    dataset: DatasetFolder,
    out: Out,
    interests: Swept = [Config.interests],  # noqa: B006
    iterations: Swept = [Config.iterations],  # noqa: B006
    prototypes: Swept = [Config.prototypes],  # noqa: B006
    history_length: Swept = [Config.history_length],  # noqa: B006
    overlap: SweptShares = [Config.overlap],  # noqa: B006
    full: Annotated[
        bool, typer.Option("--full", help="All combinations, not one setting at a time.")
    ] = False,
    **options: Any,
) -> None:
    """Train MIMNet at other sizes: interests, routing passes, prototypes, history, overlap.

    An option with one value sets it, one with several is swept while the others stay at their value
    (the published one, where they are swept too). sweep.{md,csv,json} and a plot in --out are
    brought up to date after every trained model.
    """
    given_values: tuple[Any, ...] = (interests, iterations, prototypes, history_length, overlap)
    given = dict(zip(SWEPT, given_values, strict=True))
    centre: dict[str, Any] = {
        k: v[0] if len(v) == 1 else getattr(Config, k) for k, v in given.items()
    }
    values = {name: listed for name, listed in given.items() if len(listed) > 1}
    variants = sweep_variants(centre, values, full=full)
    task, config = _task(options), _config(options, **centre)
    _run_grid("sweep", variants, dataset, out, task, config, swept=(*values,), **options)


@app.command(cls=_ListOptions)
@_with(_GRID, _SETTINGS)
def ablate(
    dataset: DatasetFolder,
    out: Out,
    model: Annotated[Ablated, typer.Option(help="Whose parts; the public code's are quirks.")] = (
        "mimnet"
    ),
    without: Annotated[
        list[str],
        typer.Option(
            help="Ablations: of "
            + ", or of ".join(", ".join(names) for names in ABLATIONS.values())
            + "; all that --base has.",
            show_default="all",
        ),
    ] = ["all"],  # noqa: B006
    **options: Any,
) -> None:
    """Train MIMNet and MIMNet without each of its parts, or its public code without its quirks.

    ablate.{md,csv,json} and a plot in --out are brought up to date after every trained model.
    """
    config = _config(options)
    whole = Variant(model, MODELS[model].title, model)
    variants = whole, *_chosen("without", without, ABLATIONS[model], RATING, config)
    _run_grid("ablate", variants, dataset, out, RATING, config, reference=model, **options)


@app.command()
def demo(
    seed: Seed = Config.seed, backend: BackendOption = "auto", as_json: AsJson = False
) -> None:
    """Train and compare on synthetic data with planted interests, in under a minute."""
    config = Config(
        seed=seed,
        backend=backend,
        base_epochs=demonstration.BASE_EPOCHS,
        epochs=demonstration.EPOCHS,
    )
    with _progress() as progress:
        found = demonstration.demo(config, progress, Synthetic())
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for table in demonstration.tables(found):
        Console().print(table)


@app.command(
    # Its parser serves machines without typer too, and is the one that knows the options.
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def bench(context: typer.Context) -> None:
    """Measure every op on this machine against PyTorch: a table, plots and JSON."""
    # By name: where `bench/` lies beside the package, type checkers do not find it inside.
    command = importlib.import_module("mimnet_fast.bench.compare")
    out = Path("bench-results")
    raise typer.Exit(command.main(context.args, "mimnet-fast bench", out))


@app.command()
def info(as_json: AsJson = False) -> None:
    """Tell what is installed and which kernels run."""
    raise typer.Exit(installation.main(["--json"] if as_json else []))


def _check_new(out: Path, resume: bool) -> None:
    if not resume and out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: go on with --resume, or name a new folder")


def _run_grid(
    table: str,
    variants: tuple[Variant, ...],
    dataset: Path,
    out: Path,
    task: Task,
    config: Config,
    *,
    betas: list[float],
    seeds: int,
    resume: bool,
    as_json: bool,
    **others: Any,
) -> None:
    shares = tuple(betas) if task.cold else ()
    first = config.seed
    plan = Plan(table, variants, shares, tuple(range(first, first + seeds)), task=task, **others)
    _check_new(out, resume)
    if not reports.PLOTS:
        _messages.print("no plots: pip install 'mimnet-fast[plots]'", markup=False)
    data = Dataset.load(dataset)
    with _progress() as progress:
        found = run_grid(data, config, plan, out, progress)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for shown in reports.tables(found):
        Console().print(shown)
    print("\n".join(reports.legend(found)))
    print(f"tables in {out / table}.md, .csv and .json")


def _progress(*amount: ProgressColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *(amount or [MofNCompleteColumn()]),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=_messages,
    )


def main() -> None:
    """Run the command line."""
    app(prog_name="mimnet-fast")

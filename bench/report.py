"""Tables and plots of result files: `python -m bench.report` updates the documents.

From the files in `bench/results` it writes `docs/benchmarks.md`, its plots and, between the two
markers in `README.md` where it has them, the rows of the whole model.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .baselines import OURS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
PICTURES = PAGE.with_name("images")
README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

BASELINES = ("textbook", "reassociated", "compile(textbook)", "compile(reassociated)")
_NONE = "–"
_FIELDS = {"contenders", "flops", "bytes", "floor_ms"}

_ON_A_GPU = """\
Times are those of many calls in a row, on inputs that change from call to call. **replay** is the
time of one call replayed as a CUDA graph, without the starting of its kernels. **launches** is what
one call starts on the GPU: ours / textbook / the fewest of all baselines."""

_INTRODUCTION = """\
# Benchmarks

`mimnet-fast bench` measures your own machine and writes a page like this one. The one in the
repository is written by `python -m bench.report` from the files in `bench/results`.

In a checkout, `pytest bench --benchmark-only --benchmark-compare` times the same, one after the
other, and compares with the last run saved in `bench/results/pytest-benchmark`: there,
`--benchmark-save NAME` adds another. With a Python that has no folder there, name a run:
`--benchmark-compare='*/0001'`.

How to read the tables:

- **ms** is the median time of one call of `mimnet_fast` with `backend="auto"`, with its quartiles.
  Forward runs without autograd. Forward+backward also computes the gradients: for the whole model
  those of its parameters (the embeddings are frozen), for a part those of all its inputs but the
  routing logits.
- **vs** a baseline is the baseline's median over ours: 2.00 is twice as fast, below 1 we are
  **slower**. *textbook* is the equation as papers write it, in eager PyTorch; *reassociated* is the
  same result by the algebra that our kernels use, in eager PyTorch; *compile* is `torch.compile` of
  either, with static shapes. *best* is the fastest of them. All are measured in one run, in turns,
  after their results were compared with the reference.
- **of floor** is the time that the arithmetic or the memory traffic needs at the least, over our
  time. The arithmetic is that of the reassociated algorithm at this machine's measured rate of a
  2048x2048x2048 matrix product, the traffic is every input and output once at its measured copy
  rate; the longer one counts. More than 100 % is a kernel that multiplies faster than that product
  does, or data that never leaves the cache.
- **peak MB** is what forward+backward needs beyond its inputs at its peak: ours / textbook / the
  least of all baselines.

The plots show the same, and the roofline: floating-point operations a second over those for each
byte of inputs and results. The line is what the machine can do at the measured rates; a hollow mark
is the best baseline, in operations of the reassociated algorithm.

The sizes B (users), L (history), K (interests), D (width) and H (hidden units of the bridge);
`comirec_dr` and `capsnet` have a routing weight per position, for which there is no reassociated
form (under that name stands one product, batched over the positions, and then the votes). Of a
catalogue L is the number of items, of which the best 20 are found, with 100 prototypes; baselines
run for ten users, and their times, not their memory, are scaled to all:
"""


def errors(row: dict[str, Any]) -> dict[str, str]:
    """What was not timed in a row, with the reason, by contender."""
    if "error" in row:
        return {OURS: row["error"]}
    return {name: c["error"] for name, c in row["contenders"].items() if "error" in c}


def load(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        SystemExit: it is of an earlier version that recorded less.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    lacking = {
        field for row in result["results"] if "error" not in row for field in _FIELDS - row.keys()
    }
    if lacking:
        raise SystemExit(
            f"{path} is of an earlier version, without {', '.join(sorted(lacking))}: measure again"
        )
    return result


def median(row: dict[str, Any], baseline: str) -> float | None:
    """Of a baseline, in the best of its compile modes."""
    prefix = baseline.removesuffix(")") + ","
    found = [
        c["median_ms"]
        for name, c in row["contenders"].items()
        if (name == baseline or name.startswith(prefix)) and "median_ms" in c
    ]
    return min(found, default=None)


def best_of_baselines(row: dict[str, Any]) -> float | None:
    """The median of the fastest, in milliseconds."""
    medians = (median(row, baseline) for baseline in BASELINES)
    return min((ms for ms in medians if ms is not None), default=None)


def _ratio(baseline_ms: float | None, ours_ms: float) -> str:
    """How many times as fast as a baseline we are.

    >>> _ratio(3.0, 1.5), _ratio(1.2, 1.5), _ratio(None, 1.5)
    ('2.00', '**0.80 slower**', '–')
    """
    if baseline_ms is None:
        return _NONE
    ratio = round(baseline_ms / ours_ms, 2)
    return f"**{ratio:.2f} slower**" if ratio < 1 else f"{ratio:.2f}"


def _milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _time(ours: dict[str, Any]) -> str:
    median, low, high = (_milliseconds(ours[key]) for key in ("median_ms", "q1_ms", "q3_ms"))
    return f"{median} ({low}–{high})"


def _replay(ours: dict[str, Any]) -> str:
    return _milliseconds(ours["replay_ms"]) if "replay_ms" in ours else _NONE


def _launches(row: dict[str, Any], name: str) -> str:
    counts = {name: c["launches"] for name, c in row["contenders"].items() if "launches" in c}
    fewest = min((n for other, n in counts.items() if not is_ours(other)), default=_NONE)
    return f"{counts.get(name, _NONE)} / {counts.get('textbook', _NONE)} / {fewest}"


def _memory(row: dict[str, Any], name: str) -> str:
    peaks = {
        name: c["peak_bytes"] / 1e6
        for name, c in row["contenders"].items()
        if c.get("peak_bytes") is not None
    }
    if name not in peaks or "textbook" not in peaks:
        return _NONE
    ours = peaks[name]
    least = min(peak for other, peak in peaks.items() if not is_ours(other))
    mine = f"**{ours:.1f} more**" if round(ours, 1) > round(least, 1) else f"{ours:.1f}"
    return f"{mine} / {peaks['textbook']:.1f} / {least:.1f}"


def is_ours(contender: str) -> bool:
    """Whether a contender's name is that of our op on some backend."""
    return contender.startswith(OURS)


def _cells(row: dict[str, Any], name: str = OURS, on_gpu: bool = False) -> list[str]:
    head = [row["case"], row["direction"]]
    failed = errors(row)
    if on_gpu:
        head.append(name.removeprefix(OURS).strip("()") or row.get("backend", _NONE))
    if "error" in row or name in failed:
        columns = len(_GPU_HEADER if on_gpu else _HEADER) - len(head) - 1
        return [*head, "**wrong, not timed**", *[_NONE] * columns]
    ours = row["contenders"][name]
    baselines = {name: median(row, name) for name in BASELINES}
    ratios = [
        "failed" if name in failed and ms is None else _ratio(ms, ours["median_ms"])
        for name, ms in baselines.items()
    ]
    return [
        *head,
        _time(ours),
        *([_replay(ours), _launches(row, name)] if on_gpu else []),
        *ratios,
        _ratio(best_of_baselines(row), ours["median_ms"]),
        f"{100 * row['floor_ms'] / ours['median_ms']:.0f} %",
        _memory(row, name),
    ]


def _rows(row: dict[str, Any], on_gpu: bool) -> list[list[str]]:
    """One line per backend."""
    names = [name for name in row.get("contenders", ()) if is_ours(name)] or [OURS]
    return [_cells(row, name, on_gpu) for name in names]


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


_HEADER = (
    "case",
    "direction",
    "ms",
    *(f"vs {name}" for name in BASELINES),
    "vs best",
    "of floor",
    "peak MB",
)
_GPU_HEADER = ("case", "direction", "backend", "ms", "replay", "launches", *_HEADER[3:])


def title(result: dict[str, Any]) -> str:
    """What was measured on: the GPU, else the processor."""
    machine = result["machine"]
    return machine.get("gpu", machine["cpu"])


def machine_line(result: dict[str, Any]) -> str:
    """The machine, the versions and the day, in one sentence."""
    m = result["machine"]
    versions = m["versions"]
    kinds = {f"{r['dtype']}, backend {r['backend']}" for r in result["results"] if "backend" in r}
    gpu = f"{m['gpu']}; " if "gpu" in m else ""
    return (
        f"{gpu}{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['isa']} kernels; "
        f"{m['gflop_per_s']:.0f} GFLOP/s, {m['gb_per_s']:.0f} GB/s; {'; '.join(sorted(kinds))}; "
        f"mimnet_fast {versions['mimnet_fast']} ({m['commit']}), torch {versions['torch']}, "
        f"Python {versions['python']}; {m['date']}."
    )


def section(result: dict[str, Any], picture: str = "") -> str:
    """One machine: its line, its plots, and one table per op."""
    on_gpu = "gpu" in result["machine"]
    parts = [f"## {title(result)}", machine_line(result)]
    alt = "times against the best baseline and the floor, and the roofline"
    parts += [f"![{title(result)}: {alt}]({picture})"] if picture else []
    parts += [_ON_A_GPU] if on_gpu else []
    for op in dict.fromkeys(row["op"] for row in result["results"]):
        rows = [row for row in result["results"] if row["op"] == op]
        lines = [line for row in rows for line in _rows(row, on_gpu)]
        parts += [f"### {op}", _table(_GPU_HEADER if on_gpu else _HEADER, lines)]
        parts += [
            f"Not timed: {name} ({row['case']}, {row['direction']}): {error}"
            for row in rows
            for name, error in errors(row).items()
        ]
    return "\n\n".join(parts) + "\n"


def _sizes(results: Sequence[dict[str, Any]]) -> str:
    shapes = {row["case"]: row["shape"] for result in results for row in result["results"]}
    header = ("case", "B", "L", "K", "D", "H")
    rows = []
    for name, shape in shapes.items():
        width = f"{shape['d_in']} to {shape['width']}" if shape.get("d_in") else shape["width"]
        sizes = shape["batch"], shape["length"], shape["capsules"], width, shape["hidden"]
        rows.append([name, *(str(size or _NONE) for size in sizes)])
    return _table(header, rows)


def page(results: Sequence[dict[str, Any]], pictures: Iterable[str]) -> str:
    """The text of `docs/benchmarks.md`."""
    return "\n".join([_INTRODUCTION, _sizes(results), "", *map(section, results, pictures)])


def readme_block(results: Sequence[dict[str, Any]], picture: str) -> str:
    """The whole model on every machine, for the README."""
    parts = [f"![The whole model against every baseline]({picture})"]
    for result in results:
        on_gpu = "gpu" in result["machine"]
        header = _GPU_HEADER if on_gpu else _HEADER
        columns = [i for i, name in enumerate(header) if name != "vs compile(textbook)"]
        rows = [
            line
            for row in result["results"]
            if row["op"] == "mimnet_forward"
            for line in _rows(row, on_gpu)
        ]
        if rows:
            cells = [[row[i] for i in columns] for row in (header, *rows)]
            parts += [_table(cells[0], cells[1:]), machine_line(result)]
    return "\n\n".join(parts)


def with_block(text: str, block: str) -> str:
    """``text`` with ``block`` between the markers; unchanged where it has none."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    return f"{head}{begin}\n{block}\n{end}{tail}" if begin and end else text


def write(path: Path, text: str) -> None:
    """``text`` in ``path``, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def render(files: Sequence[Path], to: Path, pictures: Path) -> list[dict[str, Any]]:
    """Write a page of result files, and a picture of each in a folder where there is matplotlib."""
    results = [load(file) for file in files]
    links = [""] * len(files)
    if find_spec("matplotlib") is None:
        print("no plots: pip install 'mimnet-fast[plots]'", file=sys.stderr)
    else:
        from . import plots

        for number, (file, result) in enumerate(zip(files, results, strict=True)):
            picture = pictures / f"{file.stem}.svg"
            plots.draw(result, picture)
            links[number] = os.path.relpath(picture, to.parent)
    write(to, page(results, links))
    return results


def update() -> None:
    """Write the documents from all results there are.

    Raises:
        SystemExit: there are none.
    """
    from . import plots

    files = sorted(RESULTS.glob("*.json"))
    if not files:
        raise SystemExit(f"{RESULTS} holds no results: run `python -m bench.compare` first")
    results = render(files, PAGE, PICTURES)
    picture = PICTURES / "whole-model.svg"
    plots.whole_model(results, picture)
    if README.exists():
        block = readme_block(results, os.path.relpath(picture, README.parent))
        write(README, with_block(README.read_text(encoding="utf-8"), block))


if __name__ == "__main__":
    update()

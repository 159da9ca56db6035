"""Measure every op against every baseline in one interleaved run.

`mimnet-fast bench` does it anywhere and leaves the result in a folder. `python -m bench.compare`
is for a checkout: the whole list writes `bench/results/<machine>.json`; with `--ops` or `--cases`
nothing is written unless `--out` says where. `--render` also brings the tables and plots in
`docs/benchmarks.md` and `README.md` up to date (`python -m bench.report` does that alone).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from mimnet_fast import info

from . import baselines, cases, clock, memory, report
from .cases import Case
from .floor import machine_rates

SCHEMA = 1

_DESCRIPTION = """\
Measure every op of mimnet_fast on this machine against PyTorch, eager and compiled: forward,
forward and backward, and peak memory, in turns, each after its result was compared with the
reference. All of it takes some minutes on two cores.

The exit code is 1 when something was wrong or failed and therefore was not timed, and 2 for a wrong
command line.
"""

_BLOCK = 0.02  # seconds that a contender runs before the next has its turn
_LONG = 0.5  # seconds of a call that need no warming up
_MIN_ROUNDS, _MAX_ROUNDS = 7, 51


def interleave(
    steps: Mapping[str, Callable[[], Any]], budget: float, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds per call of each step, one value per round.

    In every round each step runs for one block, in an order that changes from round to round, so
    that whatever disturbs the machine disturbs all of them. There are as many rounds as fit into
    ``budget`` seconds, but at least a handful.
    """
    calls, once, warmed = {}, 0.0, set()
    for name, step in steps.items():
        duration = clock.seconds(step, device=device)
        if duration < _LONG:
            warmed.add(name)
            duration = min(duration, *(clock.seconds(step, device=device) for _ in range(2)))
        calls[name] = max(1, round(_BLOCK / duration))
        once += (1 + calls[name]) * duration
    rounds = min(_MAX_ROUNDS, max(_MIN_ROUNDS, int(budget / once))) if steps else 0
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                step = steps[name]
                if name in warmed:
                    step()  # finds the caches as its predecessor left them
                samples[name].append(clock.seconds(step, calls[name], device))
    finally:
        gc.enable()
    return samples


def _summary(samples: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {
        "median_ms": median * 1e3,
        "q1_ms": low * 1e3,
        "q3_ms": high * 1e3,
        "rounds": len(samples),
    }


def _git(*arguments: str) -> str:
    if not (report.ROOT / ".git").exists():  # an installed package may lie in another's repository
        return ""
    process = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=report.ROOT)
    return process.stdout.strip() if process.returncode == 0 else ""


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on."""
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    installed = info.collect()
    commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    measured = ("mimnet_fast", "csrc", "kernels")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *measured)
    return {
        **gpu,
        "cpu": installed["machine"]["cpu"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": installed["machine"]["kernel variant"],
        "system": platform.platform(),
        "versions": installed["versions"],
        "commit": f"{commit} with changes" if changed else commit,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return textwrap.shorten(text, 500)


def _common(op: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    shape = {name: value for name, value in vars(case).items() if name != "name"}
    return {"op": op, "case": case.name, "shape": shape, "dtype": options.dtype}


def contest(op: str, case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both directions of one op at one size; a contender that fails has an error and no times."""
    modes, backends = tuple(options.modes), tuple(options.backends)
    names = baselines.names(op, modes, backends)
    dtype = cases.DTYPES[options.dtype]
    arena = baselines.Contest(op, case, dtype, modes, options.device, backends)
    rows = []
    work = zip(
        cases.directions(op),
        accumulate(cases.flops(op, case)),
        accumulate(cases.traffic(arena.call)),
        strict=False,  # not every op has a backward
    )
    for direction, flops, moved in work:
        steps: dict[str, Callable[[], Any]] = {}
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            try:
                steps[name] = arena.in_rotation(name, arena.step(name, direction))
            except Exception as error:  # a compiler has many ways to fail
                found[name] = {"error": _one_line(error)}
        for name, samples in interleave(steps, options.seconds, options.device).items():
            found[name] = _summary([sample / arena.share(name) for sample in samples])
        if options.device == "cuda":
            for name, step in steps.items():
                try:
                    found[name] |= _seen_by_gpu(name, step)
                except Exception as error:  # what cannot be captured in a graph
                    print(f"{op} {case.name} {direction} {name}: {error}", file=sys.stderr)
        row = {
            **_common(op, case, options),
            "direction": direction,
            "backend": arena.backend,
            "flops": flops,
            "bytes": moved,
            "contenders": {name: found[name] for name in names},
        }
        rows.append(row)
    return rows


def _seen_by_gpu(name: str, step: Callable[[], Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "peak_bytes": memory.peak_bytes_of_gpu(step),
        "launches": clock.launches(step),
    }
    if "compile" not in name:  # some modes are graphs already
        facts["replay_ms"] = 1e3 * clock.replay(step)
    return facts


def _slug(machine: dict[str, Any], dtype: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", machine.get("gpu", machine["cpu"]).lower()).strip("-")
    threads = "" if "gpu" in machine else f"-{machine['threads']}-threads"
    return name + threads + ("" if dtype == "float32" else f"-{dtype}")


def _parse(
    arguments: Sequence[str] | None,
    prog: str = "python -m bench.compare",
    folder: Path | None = None,
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases.add_arguments(parser)
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        help="time for all contenders of one op, case and direction (default: 2)",
    )
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="start no contest after so many seconds"
    )
    default = folder or "bench/results/<machine>.json, if all is measured"
    parser.add_argument(
        "--out",
        type=Path,
        default=folder,
        help=f"result file (.json), or a folder for it, its tables and plots (default: {default})",
    )
    parser.add_argument("--json", action="store_true", help="print the result instead of tables")
    parser.set_defaults(render=False)
    if folder is None:
        parser.add_argument("--render", action="store_true", help="update the documents")
    options = parser.parse_args(arguments)
    if not cases.selected(options):
        parser.error(f"--cases: no op of {options.ops} has a case of {options.cases}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but torch finds no GPU here: leave it out for the CPU")
    return options


def _destination(options: argparse.Namespace, machine: dict[str, Any]) -> Path | None:
    """The result file."""
    if options.out is not None and options.out.suffix == ".json":
        return options.out
    everything = options.limit == float("inf") and len(cases.selected(options)) == sum(
        len(cases.of_device(op, options.device)) for op in cases.CASES
    )
    name = _slug(machine, options.dtype)
    if options.out is None:
        return report.RESULTS / f"{name}.json" if everything else None
    return options.out / f"{name}{'' if everything else '-part'}.json"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The result of a whole run, as it is written."""
    torch.set_num_threads(options.threads)
    dtype = cases.DTYPES[options.dtype]
    start = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - start:4.0f} s] {what}", file=sys.stderr)

    result: dict[str, Any] = {"schema": SCHEMA, "machine": describe_machine(options.device)}
    result["results"] = rows = []
    out = None if options.out is None else _destination(options, result["machine"])
    rates: list[tuple[float, float]] = []
    chosen = cases.selected(options)
    for number, (op, case) in enumerate(chosen, 1):
        if rates and time.perf_counter() - start > options.limit:
            say(f"no time left for {', '.join(f'{op} {c.name}' for op, c in chosen[number - 1 :])}")
            break
        say(f"{number}/{len(chosen)} {op} {case.name}")
        rates.append(machine_rates(dtype, options.device))
        try:
            rows += contest(op, case, options)
        except Exception as error:  # one broken op must not cost the results of the others
            rows += [
                {**_common(op, case, options), "direction": direction, "error": _one_line(error)}
                for direction in cases.directions(op)
            ]
        _add_floors(result, rates)
        if out is not None:  # the run may be stopped before its end
            save(out, result)
    if options.device == "cpu":
        say("peak memory")
        peaks = memory.measure(options)
        for row in rows:
            if "error" not in row and row["direction"] == cases.directions(row["op"])[-1]:
                for name, contender in row["contenders"].items():
                    contender["peak_bytes"] = peaks.get((row["op"], row["case"], name))
    return result


def _add_floors(result: dict[str, Any], rates: Sequence[tuple[float, float]]) -> None:
    # The best of many tries, because a floor must not rise with the noise of the machine.
    flops_per_s, bytes_per_s = map(max, zip(*rates, strict=True))
    result["machine"] |= {"gflop_per_s": flops_per_s / 1e9, "gb_per_s": bytes_per_s / 1e9}
    for row in result["results"]:
        if "error" not in row:
            row["floor_ms"] = 1e3 * max(row["flops"] / flops_per_s, row["bytes"] / bytes_per_s)


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, complete or not at all."""
    report.write(path, json.dumps(result, indent=1) + "\n")


def main(
    arguments: Sequence[str] | None = None,
    prog: str = "python -m bench.compare",
    folder: Path | None = None,
) -> int:
    """Measure, print, write; the exit code says whether everything was right.

    Without ``--out`` the result goes to ``folder``, or else to `bench/results`.
    """
    options = _parse(arguments, prog, folder)
    result = run(options)
    out = _destination(options, result["machine"])
    if out is not None:
        save(out, result)
        if out.parent == options.out:
            report.render([out], out.with_suffix(".md"), out.parent)
        print(f"result in {out}", file=sys.stderr)
    print(json.dumps(result, indent=1) if options.json else report.section(result))
    if options.render:
        report.update()
    wrong = [
        f"{row['op']} {row['case']} {row['direction']} {name}: {error}"
        for row in result["results"]
        for name, error in report.errors(row).items()
    ]
    for line in wrong:
        print(f"not timed: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Options and checks of the pytest-benchmark suite.

Runs are saved to and compared with `bench/results/pytest-benchmark`, which is committed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import baselines, cases, compare, report

_CASES = {case.name: case for op_cases in cases.CASES.values() for case in op_cases}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--threads", type=int, default=2, help="threads of torch while benchmarking (default: 2)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_disable_gc = True
    if config.option.benchmark_storage == "file://./.benchmarks":  # the plugin's default
        config.option.benchmark_storage = f"file://{report.RESULTS / 'pytest-benchmark'}"


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """What times depend on, and no more: the name of the machine is nobody's business."""
    facts = compare.describe_machine() | {"threads": config.getoption("threads")}
    machine_info.clear()
    machine_info.update(
        {name: facts[name] for name in ("cpu", "cores", "threads", "isa", "versions")}
    )


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    kept = {name: commit_info.get(name) for name in ("id", "time", "dirty")}
    commit_info.clear()
    commit_info.update(kept, project=baselines.OURS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each `bench_<op>.py` runs its op in all cases, directions and contenders."""
    op = metafunc.module.__name__.rpartition("bench_")[2]
    if op not in cases.CASES:  # bench_swap.py is about layers, not an op
        return
    grid = [
        pytest.param(case.name, direction, name, id=f"{case.name}-{direction}-{name}")
        for case in cases.CASES[op]
        for direction in cases.directions(op)
        for name in baselines.names(op)
    ]
    metafunc.parametrize(("case", "direction", "contender"), grid)


@functools.lru_cache(maxsize=1)  # a contest ends where the next begins: see baselines.contenders
def _contest(op: str, case: str) -> baselines.Contest:
    return baselines.Contest(op, _CASES[case])


@pytest.fixture
def timed(
    benchmark: BenchmarkFixture,
    case: str,
    direction: str,
    contender: str,
    pytestconfig: pytest.Config,
) -> Callable[[str], None]:
    """Check one contender of an op, then time it."""

    def run(op: str) -> None:
        torch.set_num_threads(pytestconfig.getoption("threads"))
        contest = _contest(op, case)
        step, share = contest.step(contender, direction), contest.share(contender)
        benchmark.group = f"{op} {case} {direction}"
        benchmark.name = contender if share == 1 else f"{contender}, {share:.0%} of the users"
        benchmark(step)

    return run

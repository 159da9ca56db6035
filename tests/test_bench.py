"""The benchmarks time the right thing, refuse what is wrong, and show losses."""

import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from bench import baselines, cases, compare, conftest, memory, plots, report
from mimnet_fast import ops

ROOT = Path(__file__).resolve().parents[1]

TINY = cases.Case("tiny", batch=6, length=30, capsules=2, width=5, hidden=7)
EAGER = {op: [name for name in baselines.names(op) if "compile" not in name] for op in cases.CASES}


@pytest.fixture
def tiny(monkeypatch):
    """Every op at a tiny size, with eager functions in the place of compiled ones."""
    monkeypatch.setattr(cases, "CASES", dict.fromkeys(cases.CASES, (TINY,)))
    monkeypatch.setattr(cases, "_NAMES", ("tiny",))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(compare, "machine_rates", functools.partial(compare.machine_rates, size=64))
    monkeypatch.setattr(memory, "measure", lambda options: {("squash", "tiny", "textbook"): 5})


def run(*arguments):
    return compare.main(["--threads", "1", "--seconds", "0.001", "--cases", "tiny", *arguments])


# What is measured


@pytest.mark.parametrize("op", cases.CASES)
@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
def test_contenders_compute_the_same(op, dtype):
    contest = baselines.Contest(op, TINY, dtype)
    for name in EAGER[op]:
        for direction in cases.directions(op):
            results = contest.step(name, direction)()
            assert len(results) == (1 if direction == "forward" else len(contest.call.leaves))


def test_inputs_are_the_same_in_every_run_and_differ_between_ops():
    (first, *_), (again, *_), (other, *_) = (
        cases.make_call(op, TINY).args
        for op in ("dynamic_routing", "dynamic_routing", "mimnet_forward")
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("op", ops.DIFFERENTIABLE)
def test_whole_model_alone_has_frozen_inputs(op):
    call = cases.make_call(op, TINY)
    assert call.args[0].requires_grad == (op != "mimnet_forward")
    assert all(leaf.requires_grad for leaf in call.leaves)


def test_baselines_of_a_catalogue_rate_a_few_users_only(monkeypatch):
    monkeypatch.setattr(baselines, "_FEW_USERS", 2)
    contest = baselines.Contest("catalogue_top_k", TINY)
    (ours,), (theirs,) = (contest.step(name, "forward")() for name in ("mimnet_fast", "textbook"))
    assert ours.shape == (6, cases.TOP)
    torch.testing.assert_close(theirs, ours[:2])
    assert (contest.share("mimnet_fast"), contest.share("textbook")) == (1, 1 / 3)
    assert baselines.Contest("squash", TINY).share("textbook") == 1


def test_times_of_a_few_users_are_scaled_to_all(tiny, monkeypatch):
    monkeypatch.setattr(baselines, "_FEW_USERS", 2)
    monkeypatch.setattr(compare, "interleave", lambda steps, *_: dict.fromkeys(steps, [1.0] * 7))
    (row,) = compare.contest("catalogue_top_k", TINY, compare._parse(["--modes"]))
    medians = [contender["median_ms"] for contender in row["contenders"].values()]
    assert medians == pytest.approx([1000, 3000, 3000])
    assert row["flops"] == cases.flops("catalogue_top_k", TINY)[0]


def test_wrong_catalogue_is_not_timed(monkeypatch):
    right = ops.catalogue_top_k

    def wrong(*args, backend=None, **kwargs):
        scores, items = right(*args, backend=backend, **kwargs)
        return (scores if backend == "reference" else scores.roll(1, 1)), items

    monkeypatch.setattr(ops, "catalogue_top_k", wrong)
    with pytest.raises(baselines.WrongResultError, match="differs from the reference"):
        baselines.Contest("catalogue_top_k", TINY).step("mimnet_fast", "forward")


# The floor


@pytest.mark.parametrize("op", [op for op in cases.CASES if op != "squash"])
def test_flops_are_those_of_the_reassociated_form(op):
    """As torch counts them, but for what it does not count: the rating's elementwise product."""
    call = cases.make_call(op, TINY)
    step = baselines.Step(baselines.FORMS[op]["reassociated"], call, cases.directions(op)[-1])
    with FlopCounterMode(display=False) as counter:
        step()
    rating = (2 + 2) * TINY.batch * TINY.width if op == "mimnet_forward" else 0
    assert sum(cases.flops(op, TINY)) - rating == counter.get_total_flops()


def test_routing_may_project_the_inputs_instead():
    few = cases.Case("few", 6, length=3, capsules=2, width=5, hidden=7)
    passes = (2 * cases.ITERATIONS - 1) * 2 * 6 * 2 * 3 * 5
    assert cases.flops("dynamic_routing", few)[0] == passes + 2 * 6 * 3 * 5 * 5


@pytest.mark.parametrize("d_in", [0, 3])
def test_routing_with_a_weight_per_position(d_in):
    case = cases.Case("positions", 6, 7, 2, 5, 0, d_in=d_in, per_position=True)
    contest = baselines.Contest("dynamic_routing", case)
    assert contest.call.args[1].shape == (7, 2, d_in or 5, 5)
    for name in EAGER["dynamic_routing"]:
        for direction in cases.DIRECTIONS:
            contest.step(name, direction)()
    step = baselines.Step(baselines.routing_reassociated, contest.call, "forward+backward")
    with FlopCounterMode(display=False) as counter:
        step()
    assert sum(cases.flops("dynamic_routing", case)) == counter.get_total_flops()


@pytest.mark.parametrize("op", cases.CASES)
def test_flops_and_traffic_are_positive(op):
    for case in cases.CASES[op]:
        assert min(cases.flops(op, case)[: len(cases.directions(op))]) > 0
    assert min(cases.traffic(cases.make_call(op, TINY))) > 0


def test_traffic_of_squash():
    size = 4 * TINY.batch * TINY.capsules * TINY.width
    assert cases.traffic(cases.make_call("squash", TINY)) == (2 * size, 3 * size)


# A run


def test_interleave_gives_every_step_every_round():
    calls = {"a": 0, "b": 0}

    def step(name):
        calls[name] += 1

    samples = compare.interleave({name: functools.partial(step, name) for name in calls}, 0)
    assert {len(values) for values in samples.values()} == {compare._MIN_ROUNDS}
    assert min(calls.values()) > compare._MIN_ROUNDS
    assert min(samples["a"] + samples["b"]) > 0


def test_result_file(tiny, tmp_path, capsys):
    out = tmp_path / "new" / "result.json"
    assert run("--ops", "squash", "mimnet_forward", "--out", str(out)) == 0
    result = json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == ["result.json"]
    assert result["schema"] == compare.SCHEMA
    assert result["machine"]["threads"] == 1
    assert {"cpu", "isa", "commit", "date", "versions", "gflop_per_s"} <= result["machine"].keys()
    assert [(row["op"], row["direction"]) for row in result["results"]] == [
        (op, direction) for op in ("squash", "mimnet_forward") for direction in cases.DIRECTIONS
    ]
    for row in result["results"]:
        assert list(row["contenders"]) == baselines.names(row["op"])
        assert row["floor_ms"] > 0
        for times in row["contenders"].values():
            assert 0 < times["q1_ms"] <= times["median_ms"] <= times["q3_ms"]
    assert result["results"][1]["contenders"]["textbook"]["peak_bytes"] == 5
    assert capsys.readouterr().out.startswith(f"## {result['machine']['cpu']}")


def test_command_leaves_everything_in_a_folder(tiny, tmp_path, monkeypatch):
    """For those who have the package only."""
    cli = pytest.importorskip("mimnet_fast.cdr.cli")
    monkeypatch.setitem(sys.modules, "mimnet_fast.bench.compare", compare)
    monkeypatch.chdir(tmp_path)
    arguments = ["--threads", "1", "--seconds", "0.001", "--cases", "tiny", "--ops", "squash"]
    done = CliRunner().invoke(cli.app, ["bench", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    result, table, picture = sorted(Path("bench-results").iterdir())
    assert json.loads(done.stdout) == json.loads(result.read_text())
    assert result.stem.endswith("-1-threads-part")
    assert f"]({picture.name})" in table.read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", f"{report.RESULTS}/new-2-threads.json"),
        ("--dtype bfloat16", f"{report.RESULTS}/new-2-threads-bfloat16.json"),
        ("--ops squash", "None"),
        ("--limit 9", "None"),
        ("--out a.json --ops squash", "a.json"),
        ("--out a", "a/new-2-threads.json"),
        ("--out a --ops squash", "a/new-2-threads-part.json"),
    ],
)
def test_where_the_result_goes(arguments, expected):
    """Part of the list does not replace all of it."""
    options = compare._parse(arguments.split())
    assert str(compare._destination(options, {"cpu": "New", "threads": 2})) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "nothing"], "mimnet-fast bench: error: argument --ops: invalid choice"),
        (["--device", "cuda"], "--device: got cuda, but torch finds no GPU here"),
        (["--render"], "unrecognized arguments: --render"),
    ],
)
def test_command_refuses(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        compare.main(arguments, "mimnet-fast bench", Path("folder"))
    assert message in capsys.readouterr().err


def test_commit_is_that_of_a_checkout_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "ROOT", ROOT / "bench")  # inside a repository, as site-packages
    assert compare.describe_machine()["commit"] == "unknown"


def test_wrong_op_is_not_timed(tiny, monkeypatch, capsys):
    right = ops.squash

    @functools.wraps(right)
    def wrong(x, *, backend=None):
        return right(x, backend=backend) * (1.0 if backend == "reference" else 1.0001)

    monkeypatch.setattr(ops, "squash", wrong)
    assert run("--ops", "squash") == 1
    out, err = capsys.readouterr()
    assert out.count("**wrong, not timed**") == len(cases.DIRECTIONS)
    assert "not timed: squash tiny forward mimnet_fast" in err


def test_wrong_baseline_alone_is_not_timed(tiny, monkeypatch, tmp_path):
    def unrouted(inputs, weight, logits, **options):
        return logits @ inputs @ weight

    forms = {**baselines.FORMS["dynamic_routing"], "textbook": unrouted}
    monkeypatch.setitem(baselines.FORMS, "dynamic_routing", forms)
    out = tmp_path / "result.json"
    assert run("--ops", "dynamic_routing", "--out", str(out)) == 1
    for row in json.loads(out.read_text())["results"]:
        assert set(report.errors(row)) == {"textbook", "compile(textbook)"}
        assert "median_ms" in row["contenders"]["mimnet_fast"]


def test_unknown_combination_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.main(["--ops", "squash", "--cases", "mind"])
    assert exit_.value.code == 2
    assert "--cases: no op of ['squash'] has a case of ['mind']" in capsys.readouterr().err


def test_peak_memory_counts_what_is_allocated():
    code = (
        "import torch\nfrom bench.memory import peak_bytes\n"
        "print(peak_bytes(lambda: torch.ones(2**22)), peak_bytes(lambda: None))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, **memory.ALLOCATOR},
    )
    full, empty = map(int, process.stdout.split())
    assert full == pytest.approx(2**24, abs=2**19)
    assert empty < 2**19


def test_pytest_benchmark_collects_every_contest():
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", "--benchmark-only"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        # A worker of pytest-xdist would switch benchmarks off in its child too.
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
    )
    ids = [line for line in process.stdout.splitlines() if "::test_" in line]
    ids = [line for line in ids if not line.startswith("bench/bench_swap.py")]
    assert len(ids) == sum(
        len(in_op) * len(cases.directions(op)) * len(baselines.names(op))
        for op, in_op in cases.CASES.items()
    )
    assert "bench/bench_squash.py::test_squash[paper-forward-mimnet_fast]" in ids


def test_pytest_benchmark_compares_with_what_was_saved(tmp_path):
    name = "bench/bench_squash.py::test_squash[paper-forward-mimnet_fast]"
    fields = "min max mean stddev median iqr q1 q3 ld15iqr hd15iqr ops total rounds iterations"
    stats = {**dict.fromkeys(fields.split(), 1), "outliers": "0;0"}
    saved = {"group": "squash paper forward", "name": "mimnet_fast", "fullname": name}
    earlier = {"machine_info": {}, "benchmarks": [{**saved, "stats": stats}]}
    (tmp_path / "0001_earlier.json").write_text(json.dumps(earlier))
    quick = ("--benchmark-max-time=0.01", "--benchmark-min-rounds=1", "--benchmark-warmup=off")
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            ROOT / name,
            "--benchmark-only",
            "--benchmark-compare",
            "--benchmark-storage=.",
            "--benchmark-save=later",
            "--threads=1",
            *quick,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
    )
    assert "mimnet_fast (0001_earlier)" in process.stdout, process.stdout + process.stderr
    (later,) = tmp_path.glob("*/*_later.json")
    found = json.loads(later.read_text())
    assert set(found["machine_info"]) == {"cpu", "cores", "threads", "isa", "versions"}
    assert found["machine_info"]["threads"] == 1
    assert set(found["commit_info"]) == {"id", "time", "dirty", "project"}
    assert [each["fullname"] for each in found["benchmarks"]] == [name]


@pytest.mark.parametrize("storage", ["file://./.benchmarks", "file://elsewhere"])
def test_runs_are_saved_beside_the_results(storage):
    options = SimpleNamespace(benchmark_storage=storage)
    conftest.pytest_configure(SimpleNamespace(option=options))
    expected = (
        storage if "elsewhere" in storage else f"file://{ROOT}/bench/results/pytest-benchmark"
    )
    assert options.benchmark_storage == expected


# Rendering


def made_up(**milliseconds):
    """A result of the whole model in which the named contenders took these times."""
    names = {
        "ours": "mimnet_fast",
        "compiled": "compile(textbook)",
        "tuned": "compile(textbook, max-autotune)",
        "compiled_reassociated": "compile(reassociated)",
    }
    contenders = {
        names.get(name, name): {
            "median_ms": value,
            "q1_ms": 0.9 * value,
            "q3_ms": 1.1 * value,
            "rounds": 9,
            "peak_bytes": int(value * 1e6),
        }
        if isinstance(value, float)
        else {"error": value}
        for name, value in milliseconds.items()
    }
    machine = {
        "cpu": "Processor 9",
        "cores": 2,
        "threads": 2,
        "isa": "avx2",
        "commit": "abc",
        "date": "2026-01-01 00:00 UTC",
        "versions": {"mimnet_fast": "0", "torch": "2", "python": "3"},
        "gflop_per_s": 100.0,
        "gb_per_s": 10.0,
    }
    row = {
        "op": "mimnet_forward",
        "case": "paper",
        "direction": "forward+backward",
        "shape": {"batch": 128, "length": 20, "capsules": 7, "width": 10, "hidden": 50},
        "dtype": "float32",
        "backend": "native",
        "flops": 10_000_000,
        "bytes": 2_000_000,
        "floor_ms": 0.5,
        "contenders": contenders,
    }
    return {"schema": compare.SCHEMA, "machine": machine, "results": [row]}


def cells(result):
    (line,) = [x for x in report.section(result).splitlines() if x.startswith("| paper")]
    return line.strip("| ").split(" | ")


def test_losses_are_shown():
    row = cells(
        made_up(ours=2.0, textbook=4.0, reassociated=1.5, compiled=8.0, compiled_reassociated=1.0)
    )
    assert row == [
        "paper",
        "forward+backward",
        "2 (1.8–2.2)",
        "2.00",
        "**0.75 slower**",
        "4.00",
        "**0.50 slower**",
        "**0.50 slower**",
        "25 %",
        "**2.0 more** / 4.0 / 1.0",
    ]


def test_best_mode_of_the_compiler_counts():
    row = cells(made_up(ours=1.0, textbook=4.0, compiled=8.0, tuned=3.0))
    assert row[3:8] == ["4.00", "–", "3.00", "–", "3.00"]


def test_failed_baseline_is_named_with_its_reason():
    result = made_up(ours=1.0, textbook=4.0, compiled="no compiler")
    assert cells(result)[5] == "failed"
    text = report.section(result)
    assert "Not timed: compile(textbook) (paper, forward+backward): no compiler" in text


def test_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "PAGE", tmp_path / "docs" / "benchmarks.md")
    monkeypatch.setattr(report, "PICTURES", tmp_path / "docs" / "images")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    with pytest.raises(SystemExit, match="holds no results"):
        report.update()
    result = made_up(ours=1.0, textbook=4.0)
    report.write(report.RESULTS / "a.json", json.dumps(result))
    report.README.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):  # the second time finds its own table
        report.update()
        page, readme = report.PAGE.read_text(), report.README.read_text()
        assert "| paper | 128 | 20 | 7 | 10 | 50 |" in page
        assert "Processor 9, 2 cores, 2 threads, avx2 kernels" in page
        assert readme.startswith(f"before\n{report.BEGIN}\n![")
        for document in (report.PAGE, report.README):
            (picture,) = re.findall(r"!\[.*\]\((.*)\)", document.read_text())
            assert (document.parent / picture).read_text().startswith("<?xml")
        assert readme.endswith(f"UTC.\n{report.END}\nafter\n")
        assert "old" not in readme
        assert readme.count("| paper |") == 1


def test_file_of_an_earlier_version_is_named(tmp_path):
    result = made_up(ours=1.0, textbook=4.0)
    del result["results"][0]["flops"]
    report.write(tmp_path / "a.json", json.dumps(result))
    with pytest.raises(SystemExit, match=r"a\.json .* without flops: measure again"):
        report.load(tmp_path / "a.json")


def test_plotted_numbers():
    result = made_up(ours=2.0, textbook=8.0, compiled=4.0, reassociated="no memory")
    alone = {**result["results"][0], "direction": "forward", "contenders": {}}
    alone["contenders"]["mimnet_fast"] = result["results"][0]["contenders"]["mimnet_fast"]
    broken = {"op": "squash", "case": "paper", "direction": "forward", "error": "wrong"}
    first, second = plots.points({**result, "results": [*result["results"], broken, alone]})
    assert first[:4] == ("mimnet_forward", "paper", "forward+backward", "mimnet_fast")
    # twice as fast, a quarter of the floor, 5 FLOP/byte, 10 MFLOP in 2 and in 4 ms
    assert first[4:] == pytest.approx((2, 25, 5, 5, 2.5))
    assert math.isnan(second.against_best)
    assert second.of_floor == 25


def test_plots_are_the_same_every_time(tmp_path):
    result = made_up(ours=2.0, textbook=8.0, compiled="no compiler")
    paths = [tmp_path / name for name in ("a.svg", "b.svg", "c.svg", "d.svg")]
    for path, draw in zip(paths, 2 * (plots.draw, plots.whole_model), strict=True):
        draw(result if draw is plots.draw else [result], path)
    one, whole, *again = (path.read_text() for path in paths)
    assert [one, whole] == again
    assert "<dc:date>" not in one
    for text in ("mimnet_forward paper", "100 GFLOP/s, 10 GB/s", "FLOP/byte", "% of the floor"):
        assert f">{text}<" in one or text in one
    assert ">Processor 9: paper forward+backward<" in whole


def test_nothing_timed_can_be_drawn(tmp_path):
    plots.draw(made_up(ours="wrong"), tmp_path / "a.svg")
    plots.whole_model([made_up(ours="wrong")], tmp_path / "b.svg")


def test_readme_without_markers_stays_as_it_is():
    assert report.with_block("nothing here", "table") == "nothing here"
    assert report.with_block(f"only {report.BEGIN}", "table") == f"only {report.BEGIN}"

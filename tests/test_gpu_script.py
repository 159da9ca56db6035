"""The command of a GPU machine, as far as it goes without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import baselines, cases, clock, compare, gpu, report

ROOT = Path(__file__).resolve().parents[1]


def script(*arguments):
    return subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )


@pytest.mark.slow
def test_dry_run_finds_every_piece(tmp_path):
    process = script(tmp_path / "out", "--dry-run")
    assert process.returncode == 0, process.stdout + process.stderr
    stages = [
        line.split()[2].strip(",")
        for line in process.stdout.splitlines()
        if line.startswith("would run")
    ]
    assert stages == [
        *("build", "info", "native", "triton", "float32", "bfloat16", "render"),
        *(
            f"sanitize-{tool}-{backend}"
            for tool in ("memcheck", "racecheck", "initcheck")
            for backend in ("native", "triton")
        ),
    ]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("--dry-run",), ("OUT", "no-such-stage")])
def test_wrong_command_line(tmp_path, arguments):
    process = script(*(tmp_path if argument == "OUT" else argument for argument in arguments))
    assert process.returncode == 2
    assert "usage: bash bench/gpu.sh OUT" in process.stderr


# What a GPU adds to a measurement


def test_big_sizes_are_for_gpus():
    for op in cases.CASES:
        assert cases.of_device(op, "cpu") == cases.CASES[op]
        big = () if op == "catalogue_top_k" else cases.BIG
        assert cases.of_device(op, "cuda") == (*cases.CASES[op], *big)


def test_every_backend_is_a_contender():
    names = baselines.names("squash", backends=("native", "triton"))
    assert names[:2] == ["mimnet_fast(native)", "mimnet_fast(triton)"]
    assert list(baselines.contenders("squash", (), ("native", "triton"))) == [
        *names[:2],
        "textbook",
    ]


def test_backend_that_cannot_serve_costs_only_its_own_times(monkeypatch):
    """The other backend and the baselines are measured."""
    monkeypatch.setattr(clock, "seconds", lambda *_, **__: 1e-2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = cases.Case("tiny", 3, 5, 2, 3, 7)
    arguments = ["--ops", "squash", "--modes", "--backends", "native", "triton"]
    rows = compare.contest("squash", case, compare._parse([*arguments, "--seconds", "0"]))
    for row in rows:
        assert list(report.errors(row)) == ["mimnet_fast(triton)"]
        assert "median_ms" in row["contenders"]["mimnet_fast(native)"]
        assert "median_ms" in row["contenders"]["textbook"]


def test_inputs_rotate_on_a_gpu():
    arena = baselines.Contest("squash", cases.Case("tiny", 3, 5, 2, 3, 7), modes=())
    other = cases.make_call("squash", cases.Case("tiny", 3, 5, 2, 3, 7), copy=1)
    step = arena.step("textbook", "forward")
    assert arena.in_rotation("textbook", step) is step
    arena._calls.append(other)
    rotating = arena.in_rotation("textbook", step)
    first, second, third = (rotating()[0] for _ in range(3))
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


def test_limit_ends_a_run_and_keeps_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "machine_rates", lambda *_: (1e9, 1e9))
    monkeypatch.setattr(compare.memory, "measure", lambda _: {})
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(cases, "CASES", dict.fromkeys(cases.CASES, gpu._EXERCISES[0][:1]))
    out = tmp_path / "result.json"
    arguments = ["--modes", "--seconds", "0", "--limit", "0"]
    assert compare.main([*arguments, "--out", str(out)]) == 0
    assert {row["op"] for row in json.loads(out.read_text())["results"]} == {"squash"}
    assert "no time left for dynamic_routing tiny, interest_bridge tiny" in capsys.readouterr().err
    assert compare.main(arguments) == 0
    assert not (tmp_path / "results").exists()


@pytest.fixture
def result():
    """Made up, of a GPU."""

    def contender(ms, launches, **more):
        quartiles = {"median_ms": ms, "q1_ms": ms, "q3_ms": ms, "rounds": 9}
        return {**quartiles, "launches": launches, "peak_bytes": int(ms * 1e6), **more}

    contenders = {
        "mimnet_fast(native)": contender(1.0, 1, replay_ms=0.5),
        "mimnet_fast(triton)": contender(2.0, 2),
        "textbook": contender(8.0, 90, replay_ms=7.0),
        "compile(textbook)": {"error": "no compiler"},
        "compile(textbook, reduce-overhead)": contender(4.0, 7),
    }
    row = {
        "op": "squash",
        "case": "big64",
        "direction": "forward+backward",
        "shape": {"batch": 8192, "length": 50, "capsules": 8, "width": 64, "hidden": 64},
        "dtype": "bfloat16",
        "backend": "native, triton",
        "flops": 10**9,
        "bytes": 10**8,
        "floor_ms": 0.5,
        "contenders": contenders,
    }
    machine = {
        "gpu": "GPU 9",
        "cpu": "Processor 9",
        "cores": 2,
        "threads": 2,
        "isa": "avx2",
        "commit": "abc",
        "date": "2026-01-01 00:00 UTC",
        "gflop_per_s": 1e5,
        "gb_per_s": 1e3,
        "versions": {"mimnet_fast": "0", "torch": "2", "python": "3"},
    }
    broken = {k: row[k] for k in ("op", "shape", "dtype")}
    broken |= {"case": "paper", "direction": "forward", "error": "wrong result"}
    return {"schema": compare.SCHEMA, "machine": machine, "results": [broken, row]}


def test_table_has_a_line_per_backend(result):
    text = report.section(result)
    assert text.startswith("## GPU 9\n\nGPU 9; Processor 9, ")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert {len(line) for line in lines} == {len(report._GPU_HEADER)}
    head = ["big64", "forward+backward"]
    rest = ["8.00", "–", "4.00", "–", "4.00", "50 %", "1.0 / 8.0 / 4.0"]
    native = [*head, "native", "1 (1–1)", "0.5", "1 / 90 / 7", *rest]
    rest = ["4.00", "–", "2.00", "–", "2.00", "25 %", "2.0 / 8.0 / 4.0"]
    triton = [*head, "triton", "2 (2–2)", "–", "2 / 90 / 7", *rest]
    assert lines[2][:4] == ["paper", "forward", "–", "**wrong, not timed**"]
    assert lines[3:] == [native, triton]


def test_rendering(result, tmp_path):
    (tmp_path / "results-bfloat16.json").write_text(json.dumps(result))
    gpu.render(tmp_path)
    assert "## GPU 9" in (tmp_path / "table.md").read_text()
    assert "](results-bfloat16.svg)" in (tmp_path / "table.md").read_text()
    assert "(native) forward+backward" in (tmp_path / "results-bfloat16.svg").read_text()

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mimnet_fast import backends
from mimnet_fast.cdr import cli, demo, diagnostics
from mimnet_fast.cdr.cli import app
from mimnet_fast.cdr.models import MODELS, TRIVIAL
from mimnet_fast.cdr.synthetic import Synthetic

from .marks import needs_kernels

QUICK = ["--beta", "0.25", "--base-epochs", "1", "--epochs", "2", "--prototypes", "5"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_prepare_then_train_then_add_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Synthetic(users=80, items=20, topics=4, interests=2, ratings_per_user=8).generate(tmp_path, 1)
    data, out = tmp_path / "data", tmp_path / "run"
    files = ["--source", tmp_path / "source.csv", "--target", tmp_path / "target.csv"]

    result = invoke("prepare", *files, "--out", data)
    assert result.exit_code == 0, result.output
    assert "source source.csv (table): 576 ratings, 72 users" in result.stdout
    assert "of 576 rows; removed: none" in result.stdout
    assert "64 users of both domains" in result.stdout

    result = invoke("train", data, "--model", "ptupcdr", "--out", out, *QUICK)
    assert result.exit_code == 0, result.output
    assert "PTUPCDR" in result.stdout

    refused = invoke("train", data, "--model", "mimnet", "--out", out, *QUICK)
    assert refused.exit_code == 2
    assert "is not empty: go on with --resume" in refused.stderr

    monkeypatch.setattr(diagnostics, "WARNED", -1)
    result = invoke("train", data, "--model", "all", "--out", out, *QUICK, "--resume", "--json")
    assert result.exit_code == 0, result.output
    assert "warning: MIMNet: the interests of" in result.stderr
    found = json.loads(result.stdout)
    assert found == json.loads((out / "results.json").read_text())
    assert set(found["models"]) == {*TRIVIAL, *MODELS}
    diagnosed = {name for name, model in found["models"].items() if "diagnostics" in model}
    assert diagnosed == {"mimnet", "mimnet-released"}
    assert found["models"]["mimnet"]["diagnostics"]["ratings"] == found["dataset"]["test_ratings"]
    assert "- MIMNet: cosine of capsules" in (out / "results.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beta", "1.5"], "beta: got 1.5"),
        (["--epochs", "0"], "epochs: got 0, need a number above 0"),
        (["--seed", "-1"], "seed: got -1"),
        (["--prototypes", "41", "--base-epochs", "1"], "prototypes: got 41 for 40 target items"),
        (
            ["--backend", "triton", "--base-epochs", "1", "--prototypes", "5"],
            "'triton' cannot serve",
        ),
        (["--history-order", "time"], "has no timestamp column"),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    prepared: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As where nothing interprets Triton's kernels.
    monkeypatch.setitem(backends._PROBLEMS, "triton", lambda device: f"no kernels for {device}")
    result = invoke("train", prepared, "--out", tmp_path / "run", *arguments)
    assert result.exit_code == 2
    assert result.stderr.count("error: ") == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_compare_takes_lists_in_a_row(prepared: Path, tmp_path: Path) -> None:
    quick = ["--base-epochs", "1", "--epochs", "1", "--prototypes", "5", "--backend", "reference"]
    arguments = ["compare", prepared, "--out", tmp_path, "--models", "tgt", "mimnet", *quick]
    arguments += ["--betas", "0.25", "0.5", "--seeds", "2"]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert all(f"beta {beta}" in result.stdout for beta in (0.25, 0.5))
    assert "*: differs from MIMNet" in result.stdout
    assert f"tables in {tmp_path / 'compare'}.md" in result.stdout
    cells = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("beta-*/seed-*")}
    assert cells == {f"beta-{beta}/seed-{seed}" for beta in (0.25, 0.5) for seed in (2020, 2021)}

    refused = invoke(*arguments)
    assert refused.exit_code == 2
    assert "is not empty: go on with --resume" in refused.stderr
    again = invoke(*arguments, "--betas", "0.25", "--resume", "--json")
    assert again.exit_code == 2
    assert "betas: got 0.25 0.5 0.25" in again.stderr
    again = invoke(*arguments, "--resume", "--json")
    assert json.loads(again.stdout) == json.loads((tmp_path / "compare.json").read_text())


def test_sweep_of_one_setting(prepared: Path, tmp_path: Path) -> None:
    arguments = ["sweep", prepared, "--out", tmp_path, "--seeds", "1", "--base-epochs", "1"]
    arguments += ["--epochs", "1", "--backend", "reference", "--prototypes", "5"]
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    assert "nothing to sweep: give two values or more to one of --interests" in refused.stderr
    result = invoke(*arguments, "--interests", "2", "7")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "sweep.json").read_text())
    swept = {row["name"]: row["settings"] for row in found["rows"] if not row["trivial"]}
    assert {name: each["interests"] for name, each in swept.items()} == {
        "mimnet": 7,
        "interests-2": 2,
    }
    assert all(each["prototypes"] == 5 for each in swept.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "tgt", "mimnut"], "models: got 'mimnut', need some of mimnet"),
        (["--models", "all", "tgt"], "models: got 'all'"),
        (["--models", "tgt", "--betas", "0.2", "1"], "beta: got 1.0"),
    ],
)
def test_mistakes_in_a_comparison(
    prepared: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    quick = ["--base-epochs", "1", "--backend", "reference"]
    result = invoke("compare", prepared, "--out", tmp_path, *arguments, *quick)
    assert result.exit_code == 2
    assert message in result.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = invoke("--debug", "train", tmp_path, "--out", tmp_path / "run")
    assert type(result.exception).__name__ == "UserError"


def test_malformed_rows_are_told_or_listed(tmp_path: Path) -> None:
    source, target = tmp_path / "s.csv", tmp_path / "t.csv"
    source.write_text("user_id,item_id,rating\n1,a,4\n1,b\n")
    target.write_text("user_id,item_id,rating\n1,a,4\n")
    arguments = ["prepare", "--source", source, "--target", target, "--out", tmp_path / "d"]
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert f"error: {source}, line 3: 2 columns, need 3" in result.stderr
    assert not (tmp_path / "d").exists()
    result = invoke(*arguments, "--on-error", "skip")
    assert result.exit_code == 0
    assert "of 2 rows; removed: 1 malformed\n" in result.stdout
    assert f"malformed rows are listed in {tmp_path / 'd' / 'skipped.csv'}" in result.stdout
    assert json.loads(
        invoke(*arguments[:-1], tmp_path / "e", "--on-error", "skip", "--json").stdout
    )


def test_prepare_takes_any_format_and_tells_what_it_removed(tmp_path: Path) -> None:
    source, target = tmp_path / "s.inter", tmp_path / "t.csv"
    header = "user_id:token\titem_id:token\trating:float\tnote:token\n"
    source.write_text(header + "1\ta\t4\tx\n1\tb\t4\tx\n2\ta\t1\tx\n2\tb\t2\tx\n3\ta\t2\tx\n")
    target.write_text("1,a,4.0,10\n1,b,4.0,11\n2,a,4.0,10\n2,b,4.0,10\n2,b,2.0,9\n")
    arguments = ["prepare", "--source", source, "--target", target, "--out", tmp_path / "d"]
    result = invoke(*arguments, "--k-core", "2", "--duplicates", "mean")
    assert result.exit_code == 0, result.output
    assert "s.inter (RecBole atomic file): 4 ratings, 2 users, 2 items" in result.stdout
    assert "of 5 rows; removed: 1 user below minimum\n  columns not used: note" in result.stdout
    assert "t.csv (Amazon ratings, users first): 4 ratings, 2 users" in result.stdout
    assert "mean 3.750\n  of 5 rows; removed: 1 duplicate\n" in result.stdout
    refused = invoke(*arguments[:-1], tmp_path / "e", "--format", "recbole")
    assert refused.exit_code == 2
    assert "t.csv, line 1: need the column user_id:token" in refused.stderr
    refused = invoke(*arguments[:-1], tmp_path / "e", "--k-core", "0")
    assert refused.exit_code == 2
    assert "--k-core" in refused.stderr
    assert not (tmp_path / "e").exists()


def test_info_is_the_installation_report() -> None:
    assert "versions" in json.loads(invoke("info", "--json").stdout)
    assert "versions:" in invoke("info").stdout


def test_as_a_program(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "from mimnet_fast.cdr.cli import main; main()"]
    helped = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True)
    assert all(command in helped.stdout for command in ("prepare", "train", "demo", "info"))
    failed = subprocess.run(
        [*program, "train", tmp_path, "--out", tmp_path / "run"], capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.startswith(f"error: {tmp_path} is no prepared dataset")


@needs_kernels
def test_training_by_kernels_needs_no_compiler_of_torch(prepared: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from mimnet_fast.cdr.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    arguments = ["train", prepared, "--base", "mf", "--out", tmp_path / "run", *QUICK]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)


@pytest.mark.slow
def test_demo_learns_the_planted_interests(monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("demo", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    mae = {name: model["honest"]["mae"] for name, model in found["results"]["models"].items()}
    assert mae["oracle"] < mae["mimnet"] < mae["ptupcdr"] < mae["tgt"]
    assert all(mae["ptupcdr"] < mae[name] for name in TRIVIAL)
    assert set(found["steps"]) >= {"reference", "torch.compile(reference)"}


def test_demo_without_kernels_or_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C++ compiler found\nlong explanation")

    monkeypatch.setattr(demo.torch, "compile", no_compiler)
    monkeypatch.setattr(
        demo.backends, "available", lambda device: {"native": "not built", "reference": None}
    )
    monkeypatch.setattr(demo, "BASE_EPOCHS", 1)
    monkeypatch.setattr(demo, "EPOCHS", 1)
    small = Synthetic(users=150, items=110, topics=4, interests=2, ratings_per_user=10)
    monkeypatch.setattr(cli, "Synthetic", lambda: small)
    result = invoke("demo")
    assert result.exit_code == 0, result.output
    assert "not available: no C++ compiler found" in result.stdout
    assert "no compiled kernels here" in result.stdout
    assert "oracle" in result.stdout

"""`python -m mimnet_fast.info` describes any installation, a broken one included."""

import json
import os
import subprocess
import sys

import pytest

from mimnet_fast import backends, info

PROBES = [name for name in vars(info) if name.startswith("_") and callable(getattr(info, name))]
PROBES = sorted({*PROBES} - {"_guarded"})


def fail(*_):
    raise RuntimeError("probe broke")


def test_json_of_the_command():
    environment = {**os.environ, "MIMNET_FAST_ISA": "baseline"}
    process = subprocess.run(
        [sys.executable, "-m", "mimnet_fast.info", "--json"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    report = json.loads(process.stdout)
    assert process.stderr == ""
    assert report["versions"]["python"] == sys.version.split()[0]
    assert report["environment"]["MIMNET_FAST_ISA"]["value"] == "baseline"
    if report["build"]["libraries"]["_host"] == "built":
        assert report["machine"]["kernel variant"] == "baseline"


def test_text_names_every_library_and_backend(capsys):
    assert info.main([]) == 0
    text = capsys.readouterr().out
    for name in backends.load_status():
        assert f"\n  {name}: " in text
    for name in backends.available():
        assert f"\n    {name}: " in text


def test_libraries_give_the_reason(monkeypatch):
    monkeypatch.setattr(backends, "load_status", lambda: {"_C": None, "_C_cuda": "no driver"})
    assert info.collect()["libraries"] == {"_C": "loaded", "_C_cuda": "no driver"}


@pytest.mark.parametrize("probe", PROBES)
def test_failed_probe_becomes_a_value(probe, monkeypatch, capsys):
    whole = info.collect()
    monkeypatch.setattr(info, probe, fail)
    assert info.main(["--json"]) == 0
    broken = capsys.readouterr().out
    assert "unknown (RuntimeError: probe broke)" in broken
    assert json.loads(broken).keys() == whole.keys()


def test_misspelt_variable_is_pointed_out(monkeypatch):
    monkeypatch.setenv("MIMNET_FAST_BAKEND", "native")
    row = info.collect()["environment"]["MIMNET_FAST_BAKEND"]
    assert row["value"] == "native"
    assert "check its spelling" in row["effect"]


def test_missing_and_damaged_build_report(tmp_path, monkeypatch):
    monkeypatch.setattr(info, "_PACKAGE", tmp_path)
    assert "was not installed" in info.collect()["build"]
    (tmp_path / "_build_info.json").write_text('{"version":')
    assert "JSONDecodeError" in info.collect()["build"]


def test_source_tree_that_hides_the_installed_package(tmp_path, monkeypatch):
    metadata = tmp_path / "mimnet_fast-9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: mimnet-fast\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert str(tmp_path) not in str(info.collect()["package"]["warning"])  # an editable install

    (tmp_path / "mimnet_fast").mkdir()
    warning = info.collect()["package"]["warning"]
    assert str(tmp_path / "mimnet_fast") in warning
    assert "pip install -e ." in warning

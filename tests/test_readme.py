"""What the README and the guides show runs as it stands there."""

import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    exec("\n".join(blocks), {"__name__": path})


def test_examples_run(capsys):
    run("README.md")
    assert "dynamic_routing: error" in capsys.readouterr().out


def test_examples_of_the_swap_guide_run(capsys, monkeypatch):
    pytest.importorskip("torch_rechub")
    monkeypatch.setattr(sys.modules["mimnet_fast.swap"], "_registered", [])
    run("docs/swap.md")
    table, other = re.findall(r"^layer .*\n(.*)", capsys.readouterr().out, flags=re.MULTILINE)
    assert re.match(r"capsule  CapsuleNetwork  comirec  .*dynamic_routing on", table)
    assert re.match(r"\(the model\)  UserBridge  user_bridge  .*interest_bridge on", other)


def test_examples_of_the_serving_guide_run(capsys, monkeypatch, tmp_path):
    pytest.importorskip("mimnet_fast._host", reason="_host is not built")
    cli = pytest.importorskip("mimnet_fast.cdr.cli")
    from mimnet_fast.cdr.synthetic import Synthetic

    sizes = Synthetic(users=120, items=110, topics=4, interests=2, ratings_per_user=10)
    sizes.generate(tmp_path, seed=1)
    for ours, theirs in (("source", "movies"), ("target", "music")):
        (tmp_path / f"{ours}.csv").rename(tmp_path / f"{theirs}.csv")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(
        r"^mimnet-fast (.*)", (ROOT / "docs/serving.md").read_text(), flags=re.MULTILINE
    )
    assert len(commands) >= 5
    for command in commands:
        cli.app(shlex.split(command), standalone_mode=False)
    assert '"item": "t' in capsys.readouterr().out
    run("docs/serving.md")
    *recommended, new, same, shape = capsys.readouterr().out.splitlines()
    assert len(recommended) == 2
    assert new.startswith("Recommendation(item='t")
    assert same == "True"
    assert shape == "torch.Size([3])"

"""What the README and the guides show runs as it stands there."""

import re
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

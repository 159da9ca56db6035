import re
from pathlib import Path

import pytest

from bench import epoch
from mimnet_fast.cdr.dataset import prepare
from mimnet_fast.cdr.synthetic import Synthetic

from .marks import needs_kernels


@needs_kernels
def test_parts_of_an_epoch_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Synthetic(users=300, items=150).generate(tmp_path, seed=1)
    prepare(tmp_path / "source.csv", tmp_path / "target.csv", tmp_path / "dataset")
    monkeypatch.setattr(epoch, "_ROUNDS", 1)
    epoch.main([str(tmp_path / "dataset")])
    lines = capsys.readouterr().out.splitlines()
    parts = {
        match[1].strip(): float(match[2])
        for match in (re.match(r"(.{33}) +(-?[\d.]+) ms", line) for line in lines)
        if match
    }
    # All but these two, of which noise may make anything in so short a run, were measured.
    measured = {name: ms for name, ms in parts.items() if name not in ("backward", "optimizer")}
    assert len(measured) == 7
    assert min(measured.values()) > 0, "and shuffling is what others left of the rest"
    assert parts["drawing routing logits"] + parts["rest"] < parts["all"]

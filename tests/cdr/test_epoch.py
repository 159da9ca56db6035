import re
from pathlib import Path

import pytest

from bench import epoch
from mimnet_fast import backends
from mimnet_fast.cdr.dataset import prepare
from mimnet_fast.cdr.synthetic import Synthetic


@pytest.mark.skipif(
    backends.available("cpu")["native"] is not None,
    reason=f"no compiled kernels: {backends.available('cpu')['native']}",
)
def test_parts_of_an_epoch_are_the_whole(
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
    whole, rest = parts.pop("all"), parts["rest"]
    of_rest = [
        parts.pop(name) for name in list(parts) if name.startswith(("of which", "check", "shuf"))
    ]
    assert sum(parts.values()) == pytest.approx(whole, abs=0.5)
    assert sum(of_rest) == pytest.approx(rest, abs=0.3)
    assert 0 < rest < whole

"""A recommender's file is all that serving takes, torch no more than the rest."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.experiment import BaseModels
from mimnet_fast.cdr.serving import Recommender

from .test_serving import names

WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = None  # as where it is not installed
from mimnet_fast.cdr.serving import Recommender
path, arguments = json.loads(sys.argv[1])
recommender = Recommender.load(path)
found = [recommender.recommend(**each) for each in arguments]
loaded = [name for name, module in sys.modules.items() if module and name.startswith("torch")]
print(json.dumps([found, loaded]))
"""


def test_the_same_without_torch(
    trained: tuple[Path, BaseModels], recommender: Recommender, prepared: Path
) -> None:
    pytest.importorskip("mimnet_fast._host", reason="_host is not built")
    people = names(prepared, "source_users")
    arguments: list[dict[str, Any]] = [
        {"users": people, "top_k": 5},
        {"histories": [["s1", "s2"], ["s3"]], "exclude_seen": False},
        {"users": []},
    ]
    program = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps([str(trained[0]), arguments])],
        capture_output=True,
        text=True,
    )
    assert program.returncode == 0, program.stderr
    found, loaded = json.loads(program.stdout)
    assert loaded == []
    for each, options in zip(found, arguments, strict=True):
        expected = recommender.recommend(**options)
        assert [[item for item, _ in row] for row in each] == [
            [item for item, _ in row] for row in expected
        ]
        scores = [[[score for _, score in row] for row in rows] for rows in (each, expected)]
        np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-6)


def test_host_kernels_that_are_not_built(
    trained: tuple[Path, BaseModels], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mimnet_fast._host", None)
    monkeypatch.delattr("mimnet_fast._host", raising=False)
    with pytest.raises(UserError, match=r"kernels: host is not installed .* or torch"):
        Recommender.load(trained[0], kernels="host")


def test_kernels_by_another_name(trained: tuple[Path, BaseModels]) -> None:
    with pytest.raises(UserError, match="kernels: got 'cuda', need one of auto, torch, host"):
        Recommender.load(trained[0], kernels="cuda")  # type: ignore[arg-type]

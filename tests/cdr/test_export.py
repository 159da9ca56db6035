"""A model that was exported predicts what it did."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mimnet_fast import backends
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.experiment import BaseModels
from mimnet_fast.cdr.export import export
from mimnet_fast.cdr.models import MIMNet

from .test_cli import invoke
from .test_serving import ratings, user_bias


def scoring_inputs(stage1: BaseModels) -> tuple[Tensor, ...]:
    """What a program takes for the test ratings of a run."""
    data, test = stage1.raw, stage1.raw.final.evaluation
    source = stage1.frozen("final", MIMNet).source_users
    return data.histories[test.users], data.lengths[test.users], source[test.users], test.items


def predictions(trained: tuple[Path, BaseModels]) -> Tensor:
    test = trained[1].raw.final.evaluation
    users, row = test.users.unique(return_inverse=True)
    found = ratings(trained, users)[row, test.items]
    return found - user_bias(trained[1])[test.users]


def test_the_exported_program_predicts_the_same(
    trained: tuple[Path, BaseModels], tmp_path: Path
) -> None:
    export(trained[0], tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    if backends.available()["native"] is None:
        assert calls.count("mimnet_fast.mimnet_forward.default") == 1
    inputs, expected = scoring_inputs(trained[1]), predictions(trained)
    for rows in (len(expected), 1, 0):
        found = program.module()(*(each[:rows] for each in inputs))
        torch.testing.assert_close(found, expected[:rows])


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["biased-mf"], indirect=True)
def test_the_compiled_program_predicts_the_same(
    trained: tuple[Path, BaseModels], tmp_path: Path
) -> None:
    result = invoke("export", trained[0], "--out", tmp_path / "model.pt2", "--format", "aoti")
    assert result.exit_code == 0, result.output
    program = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    inputs, expected = scoring_inputs(trained[1]), predictions(trained)
    for rows in (len(expected), 1, 0):
        found = program(*(each[:rows] for each in inputs))
        torch.testing.assert_close(found, expected[:rows])


def test_a_format_by_another_name(trained: tuple[Path, BaseModels], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format: got 'onnx', need one of export, aoti"):
        export(trained[0], tmp_path / "model", "onnx")  # type: ignore[arg-type]

"""Other base models than matrix factorization: what is carried over is rated by their equation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from rich.progress import Progress
from torch.nn.functional import linear

from mimnet_fast.cdr import checkpoints
from mimnet_fast.cdr.config import Base, Config
from mimnet_fast.cdr.dataset import Dataset
from mimnet_fast.cdr.evaluation import errors
from mimnet_fast.cdr.experiment import BaseModels, final_predictions, run
from mimnet_fast.cdr.inspection import inspect
from mimnet_fast.cdr.models import MODELS
from mimnet_fast.cdr.models.mapping import MappingModel
from mimnet_fast.cdr.models.matrix_factorization import BASES
from mimnet_fast.cdr.packing import pack
from mimnet_fast.cdr.training import seeded_module

QUIET = Progress(disable=True)
CONFIG = Config(beta=0.25, base_epochs=2, epochs=1, prototypes=5, learning_rate=0.05)
USERS, ITEMS = torch.tensor([3, 0, 5]), torch.tensor([1, 7, 7])


@pytest.mark.parametrize("base", BASES)
def test_vectors_make_up_the_ratings(base: Base) -> None:
    model = seeded_module(lambda: BASES[base](6, 8, 4), 1, base)
    u, v = model.users.weight[USERS], model.items.weight[ITEMS]
    state = model.state_dict()
    expected = {
        "gmf": lambda: linear(u * v, state["linear.weight"])[:, 0],
        "dnn": lambda: (linear(u, state["linear.weight"], state["linear.bias"]) * v).sum(-1),
    }.get(base, lambda: (u * v).sum(-1))()
    found = model(USERS, ITEMS)
    torch.testing.assert_close(found, expected)
    vectors = model.user_vectors()[USERS] * model.item_vectors()[ITEMS]
    torch.testing.assert_close(vectors.sum(-1), expected)
    found.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("base", ["gmf", "dnn"])
def test_models_stand_on_them(dataset: Dataset, prepared: Path, tmp_path: Path, base: Base) -> None:
    config = replace(CONFIG, base=base)
    found = run(dataset, config, ["emcdr", "mimnet", "cmf", "tgt"], tmp_path, QUIET)["models"]
    stage1 = BaseModels(dataset, config, tmp_path, QUIET)
    for model, curve in (stage1.source(), stage1.target("final")):
        assert type(model) is BASES[base]
        assert curve[1]["loss"] < curve[0]["loss"]
    source, target = stage1.source()[0], stage1.target("final")[0]

    build = MODELS["emcdr"].build
    assert build is not None
    emcdr: Any = build(config)
    assert isinstance(emcdr, MappingModel)
    with torch.no_grad():
        emcdr.load_state_dict(checkpoints.load(tmp_path / "emcdr.safetensors")[0])
        test = stage1.split.final.evaluation
        users, items = source.users.weight[test.users], target.items.weight[test.items]
        if base == "gmf":
            ratings = target.linear(emcdr.transfer(users) * items).squeeze(-1)
        else:
            ratings = (emcdr.transfer(source.linear(users)) * items).sum(-1)
    torch.testing.assert_close(final_predictions(tmp_path, "emcdr")[0], ratings)
    assert found["emcdr"]["honest"]["mae"] == pytest.approx(errors(ratings, test.values).mae)

    pack(prepared, tmp_path)
    user, item = (
        pl.read_parquet(prepared / f"target_{name}s.parquet").to_series()[int(rows[0])]
        for name, rows in (("user", test.users), ("item", test.items))
    )
    (score,) = inspect(tmp_path, user, [item])["scores"]
    assert score == pytest.approx(final_predictions(tmp_path, "mimnet")[0, 0].item(), abs=1e-5)

"""A trained MIMNet with all that recommending takes, as the one file that `serving` reads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.progress import Progress
from torch import Tensor

from mimnet_fast.cdr import checkpoints, results
from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset, Ratings
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.experiment import BaseModels
from mimnet_fast.cdr.models import MIMNet
from mimnet_fast.cdr.protocol import histories
from mimnet_fast.cdr.serving import FORMAT, FORMAT_VERSION, NAME, history_means

MODEL = "mimnet"


def pack(prepared: Path, folder: Path, stage1: BaseModels | None = None) -> Path:
    """Write the recommender of a finished run of ``mimnet`` into the run's folder.

    It holds the weights of the honestly chosen epoch. Its users are all of the source domain: those
    without target ratings, whom nothing was trained or measured on, are what it is for. Seen items
    are all target ratings of the dataset, those of test users too.

    Args:
        prepared: Folder of the dataset.
        folder: The run's folder.
        stage1: Base models of the run, made again where they are not given or of other settings.

    Returns:
        The file.

    Raises:
        UserError: the folder holds no such run.
    """
    found = results.read(folder)
    if MODEL not in found.get("models", {}):
        raise UserError(f"{folder}: no finished run of {MODEL}: train one with mimnet-fast train")
    model = found["models"][MODEL]
    config = Config(**{**found["config"], **model["settings"]})
    if stage1 is None or stage1.config != config:
        stage1 = BaseModels(Dataset.load(prepared), config, folder, Progress(disable=True))
    dataset = stage1.dataset
    inputs = stage1.frozen("final", MIMNet)
    assert inputs.item_prototypes is not None
    prototypes, prototype_ids = torch.unique(inputs.item_prototypes, dim=0, return_inverse=True)
    ids, lengths = histories(
        dataset, dataset.num_source_users, config.history_order, config.history_length
    )
    weights, _ = checkpoints.load(folder / f"{MODEL}.safetensors")
    tensors = {
        **{f"model.{name}": tensor for name, tensor in weights.items()},
        **_biases(stage1),
        "source_users": inputs.source_users,
        "source_items": inputs.source_items,
        "target_items": inputs.target_items,
        "prototypes": prototypes,
        "prototype_ids": prototype_ids,
        "histories": ids.int(),
        "lengths": lengths,
        "fold_in": _fold_in(inputs.source_users, inputs.source_items, ids, lengths),
        **_seen(dataset.target, dataset.num_source_users, dataset.num_overlap),
    }
    for name in ("source_users", "source_items", "target_items"):
        column = pl.read_parquet(prepared / f"{name}.parquet").to_series()
        tensors |= _text(f"{name}.ids", column.to_list())
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "iterations": config.iterations,
        "dataset": found["dataset"],
        "config": asdict(config),
        "honest": model["honest"],
    }
    checkpoints.save(folder / NAME, tensors, record)
    return folder / NAME


def _biases(stage1: BaseModels) -> dict[str, Tensor]:
    """What is added to the model's ratings, by item and by user."""
    if not stage1.biased:
        return {}
    biases = stage1.biases.final
    target = biases.target
    return {
        "item_biases": target.mean + target.items,
        "user_biases": biases.slope * biases.source.users,
    }


def _fold_in(users: Tensor, items: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """The linear map ``[D + 1, D]`` from means of histories to user vectors; last the constant."""
    known = (lengths > 0).numpy()
    table, found = items.numpy(), (ids.numpy()[known], lengths.numpy()[known])
    means = history_means(table, *found)
    solution, *_ = np.linalg.lstsq(
        np.column_stack([means, np.ones_like(means[:, 0])]), users.numpy()[known], rcond=None
    )
    return torch.from_numpy(solution)


def _seen(target: Ratings, users: int, overlap: int) -> dict[str, Tensor]:
    """The target items that each source user rated, one after another."""
    known = target.where(target.users < overlap)
    owners, order = known.users.sort(stable=True)
    return {
        "seen.items": known.items[order],
        "seen.offsets": torch.searchsorted(owners, torch.arange(users + 1)),
    }


def _text(name: str, values: list[str]) -> dict[str, Tensor]:
    """Strings as the bytes of their UTF-8, and where each one starts."""
    pieces = [value.encode() for value in values]
    offsets = np.cumsum([0, *map(len, pieces)])
    joined: Any = np.frombuffer(b"".join(pieces), np.uint8).copy()
    return {
        f"{name}.bytes": torch.from_numpy(joined),
        f"{name}.offsets": torch.from_numpy(offsets),
    }

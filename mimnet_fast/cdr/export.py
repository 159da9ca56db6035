"""The scoring model of a recommender as a program of torch.export or AOTInductor."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.nn import Module

from mimnet_fast.cdr.atomic import atomic_file
from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.models import MODELS, FrozenInputs
from mimnet_fast.cdr.packing import MODEL
from mimnet_fast.cdr.serving import read

ExportFormat = Literal["export", "aoti"]


class ScoringModel(Module):
    """How users with a history rate target items: MIMNet, its frozen tables, the items' biases.

    Args:
        checkpoint: A recommender's file, or the run's folder that holds it.

    Raises:
        UserError: there is none.
    """

    source_items: Tensor
    target_items: Tensor
    item_prototypes: Tensor
    item_biases: Tensor

    def __init__(self, checkpoint: str | Path) -> None:
        super().__init__()
        arrays, record = read(checkpoint)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        build = MODELS[MODEL].build
        assert build is not None
        self.model = build(Config(**record["config"]))
        self.model.load_state_dict(
            {
                name.removeprefix("model."): tensor
                for name, tensor in tensors.items()
                if name.startswith("model.")
            }
        )
        self.model.requires_grad_(False)
        items = tensors["target_items"]
        self.register_buffer("source_items", tensors["source_items"])
        self.register_buffer("target_items", items)
        self.register_buffer("item_prototypes", tensors["prototypes"][tensors["prototype_ids"]])
        self.register_buffer("item_biases", tensors.get("item_biases", torch.zeros(len(items))))
        self.history_length = tensors["histories"].shape[1]

    def forward(self, history: Tensor, lengths: Tensor, source: Tensor, items: Tensor) -> Tensor:
        """Ratings ``[B]``, without a bias of the user.

        Args:
            history: Rows of the source items, int64 ``[B, L]``; behind the end of a history the
                last row of their table.
            lengths: int64 ``[B]``.
            source: The users' vectors ``[B, D]`` of the source domain.
            items: Rows of the target items, int64 ``[B]``.
        """
        inputs = FrozenInputs(
            histories=history,
            lengths=lengths,
            source_users=source,
            source_items=self.source_items,
            target_users=source[:0],
            target_items=self.target_items,
            item_prototypes=self.item_prototypes,
        )
        rows = torch.arange(items.shape[0], device=items.device)
        ratings: Tensor = self.model(inputs, rows, items)
        return ratings + self.item_biases[items]

    def program(self) -> ExportedProgram:
        """The model as `torch.export` traces it, for any batch."""
        # Four tensors: one that is passed twice would be one input.
        example = (
            torch.zeros(2, self.history_length, dtype=torch.int64),
            torch.ones(2, dtype=torch.int64),
            torch.zeros(2, self.source_items.shape[1]),
            torch.zeros(2, dtype=torch.int64),
        )
        return torch.export.export(self, example, dynamic_shapes=({0: Dim("batch")},) * 4)


def export(checkpoint: str | Path, out: Path, format: ExportFormat = "export") -> None:
    """Write the `ScoringModel` of a recommender as a program that needs no code of the model.

    ``"export"`` is read by ``torch.export.load``, ``"aoti"``, compiled for this machine, by
    ``torch._inductor.aoti_load_package``. The kernels stay ops of ``mimnet_fast``, which is to be
    imported first.

    Args:
        checkpoint: The recommender's file, or the run's folder that holds it.
        out: The new file, by custom ``.pt2``.
        format: Which kind.

    Raises:
        UserError: no recommender, or another format.
    """
    if format not in get_args(ExportFormat):
        raise UserError(f"format: got {format!r}, need one of {', '.join(get_args(ExportFormat))}")
    program = ScoringModel(checkpoint).program()
    written = io.BytesIO()
    if format == "export":
        torch.export.save(program, written)
    else:
        torch._inductor.aoti_compile_and_package(program, package_path=written)
    with atomic_file(out) as temporary:
        temporary.write_bytes(written.getvalue())

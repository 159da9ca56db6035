"""Why MIMNet recommends what it does to one user: the numbers, and a page that shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch

from mimnet_fast.cdr import diagnostics
from mimnet_fast.cdr.models import FrozenInputs, MIMNet
from mimnet_fast.cdr.serving import Ids, Recommender, read

SHOWN = 8
"""Items that are shown where none are named: the best ones."""


def inspect(path: str | Path, user: str, items: Sequence[str] | None = None) -> dict[str, Any]:
    """What a trained MIMNet computes for one user and some items.

    L liked items of the user, K interests, C items.

    Args:
        path: A recommender's file, or the run's folder with it.
        user: Id of a user of the source domain.
        items: Ids of target items; None takes those with the highest scores.

    Returns:
        ``user``, ``source`` and ``target`` (names of files), ``history`` (L ids, oldest first),
        ``coupling`` (``[L][K]``), ``capsule_cosine`` and ``bridge_cosine`` (``[K][K]``), ``items``
        (C ids), ``scores`` and ``gate`` (C numbers), ``fine`` and ``coarse`` (``[C][K]``) and
        ``fused`` (``[C][K]``, both attentions in the shares of the gate).

    Raises:
        UserError: unknown ids, or the file is no recommender.
    """
    arrays, record = read(path)
    if items is None:
        (best,) = Recommender.load(path).recommend([user], top_k=SHOWN, exclude_seen=False)
        items = [each.item for each in best]
    (row,) = Ids(arrays, "source_users").rows([user], "source user")
    columns = Ids(arrays, "target_items").rows(items, "target item")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    model, inputs = _model(tensors, record["iterations"]), _inputs(tensors)
    found = diagnostics.interests(model, inputs, torch.tensor([row]))
    candidates = torch.from_numpy(columns)[None]
    answers = diagnostics.answers(model, inputs, found.transferred, candidates)
    length, gate = int(found.lengths[0]), answers.gate[0]
    scores = answers.ratings[0].numpy()
    if "item_biases" in arrays:
        scores = scores + arrays["item_biases"][columns] + arrays["user_biases"][row]
    names = Ids(arrays, "source_items").names
    shares = gate[:, None]
    return {
        "user": user,
        "source": record["dataset"]["source"],
        "target": record["dataset"]["target"],
        "history": [names[item] for item in arrays["histories"][row, :length]],
        "coupling": found.coupling[0, :, :length].mT.tolist(),
        "capsule_cosine": diagnostics.capsule_cosines(found.capsules)[0].tolist(),
        "bridge_cosine": diagnostics.bridge_cosines(model.bridge, found.capsules)[0].tolist(),
        "items": list(items),
        "scores": scores.tolist(),
        "fine": answers.fine[0].tolist(),
        "coarse": answers.coarse[0].tolist(),
        "gate": gate.tolist(),
        "fused": ((1 - shares) * answers.fine[0] + shares * answers.coarse[0]).tolist(),
    }


def _model(tensors: dict[str, torch.Tensor], iterations: int) -> MIMNet:
    state = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }
    hidden, features = state["bridge.w1"].shape
    _, interests, length = state["evaluation_logits"].shape
    with torch.device("meta"):  # nothing is drawn for values that are replaced
        model = MIMNet(
            features, hidden, interests=interests, iterations=iterations, history_length=length
        )
    model.load_state_dict(state, assign=True)
    return model


def _inputs(tensors: dict[str, torch.Tensor]) -> FrozenInputs:
    return FrozenInputs(
        histories=tensors["histories"].long(),
        lengths=tensors["lengths"],
        source_users=tensors["source_users"],
        source_items=tensors["source_items"],
        target_users=tensors["source_users"][:0],  # MIMNet does not look at them
        target_items=tensors["target_items"],
        item_prototypes=tensors["prototypes"][tensors["prototype_ids"]],
    )


def page(found: dict[str, Any]) -> str:
    """What `inspect` found as an HTML page that needs nothing but a browser."""
    count = len(found["capsule_cosine"])
    interests = [f"interest {k + 1}" for k in range(count)]
    history, items = found["history"], found["items"]
    user, source, target = (escape(found[name]) for name in ("user", "source", "target"))

    def cosines(caption: str, name: str) -> str:
        rows = zip(interests, found[name], strict=True)
        return _table(caption, "", interests, rows, _cosine)

    def weights(caption: str, corner: str, names: Sequence[str], values: Any) -> str:
        return _table(caption, corner, interests, zip(names, values, strict=True), _share)

    alike = ""
    if history and count > 1:
        mean = (np.sum(found["capsule_cosine"]) - count) / (count * (count - 1))
        verdict = (
            "they have collapsed into one"
            if mean > diagnostics.COLLAPSED
            else f"above {diagnostics.COLLAPSED} they would count as one"
        )
        alike = f"The mean cosine of this user's capsules is {mean:.2f}: {verdict}."
    rows = zip(items, zip(found["scores"], found["gate"], strict=True), strict=True)
    return _PAGE.substitute(
        user=user,
        source=source,
        target=target,
        count=count,
        liked=len(history),
        coupling=weights("Coupling", f"liked in {found['source']}", history, found["coupling"])
        if history
        else "<p>This user liked nothing there, so all interests are empty and alike.</p>",
        alike=alike,
        capsules=cosines("Cosine of the capsules", "capsule_cosine") if history else "",
        bridges=cosines("Cosine of the bridges", "bridge_cosine") if history else "",
        fused=weights("Attention, fused", f"item of {found['target']}", items, found["fused"]),
        fine=weights("Fine attention", f"item of {found['target']}", items, found["fine"]),
        coarse=weights("Coarse attention", f"item of {found['target']}", items, found["coarse"]),
        gate=_table(
            "Score and gate",
            f"item of {found['target']}",
            ["score", "share of the coarse attention"],
            rows,
            _plain,
            _share,
        ),
    )


_Cell = Callable[[float], str]


def _table(
    caption: str,
    corner: str,
    columns: Sequence[str],
    rows: Iterable[tuple[str, Sequence[float]]],
    *cells: _Cell,
) -> str:
    """A table whose columns are shown by ``cells``, the last of which serves all that follow."""
    kinds = [cells[min(i, len(cells) - 1)] for i in range(len(columns))]
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(cell(value) for cell, value in zip(kinds, values, strict=True))
        + "</tr>\n"
        for name, values in rows
    )
    return (
        f"<table><caption>{escape(caption)}</caption>\n"
        f"<thead><tr><th>{escape(corner)}</th>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    )


def _share(value: float) -> str:
    return _shaded(value, value, f"{100 * value:.0f} %")


def _cosine(value: float) -> str:
    return _shaded(value, abs(value), f"{value:.2f}")


def _plain(value: float) -> str:
    return f"<td>{value:.3f}</td>"


def _shaded(value: float, strength: float, text: str) -> str:
    """A cell of one colour, or another below 0, the stronger the darker."""
    colour = "180 83 9" if value < 0 else "29 78 216"
    ink = ";color:#fff" if strength > 0.55 else ""
    style = f"background:rgb({colour} / {strength:.2f}){ink}"
    return f'<td title="{value:.4f}" style="{style}">{text}</td>'


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>MIMNet: interests of $user</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #111; background: #fff }
section { overflow-x: auto }
table { border-collapse: collapse; margin: 1rem 0 }
caption { text-align: left; font-weight: 600 }
th, td { padding: .25rem .6rem; border: 1px solid #ddd }
td { text-align: right; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 400; background: #f6f6f6 }
</style>
</head>
<body>
<h1>Interests of user $user</h1>
<p>MIMNet knows this user from <b>$source</b> and recommends items of <b>$target</b>. It sorts the
$liked items that the user liked (the history) into $count interests, carries the user over by a
matrix of its own for each interest (a bridge), and lets every item ask which of the results count
for it. Darker cells are larger numbers; point at a cell to see more digits.</p>

<section>
<h2>Which liked items feed which interest</h2>
<p>How to read it: a row is a liked item, oldest first, and says how it divides itself among the
interests; a row adds up to 100&nbsp;%, and a column with dark cells in several rows is an interest
that these items share.</p>
$coupling
</section>

<section>
<h2>How alike the interests are</h2>
<p>How to read it: 1 means that two interests (capsules) point the same way, 0 that they have
nothing to do with each other, below 0 (orange) that they oppose each other. $alike</p>
$capsules
<p>How to read it: the same for the bridges made of them; where all cells are near 1, the interests
are carried over alike, and one bridge would do.</p>
$bridges
</section>

<section>
<h2>Which interest answers which item</h2>
<p>How to read it: a row is an item that might be recommended, and a dark cell is an interest that
it listens to; a row adds up to 100&nbsp;%. It is the mean of the next two tables, in the shares of
the last one.</p>
$fused
<p>How to read it: as above, when the item itself asks.</p>
$fine
<p>How to read it: as above, when the prototype of the item asks, the centre of the items that are
like it; rows of items with one prototype are equal.</p>
$coarse
</section>

<section>
<h2>The item itself, or its kind?</h2>
<p>How to read it: the score is the rating that MIMNet expects; the share says how much of the
answer comes from the coarse attention (the item's prototype) rather than the fine one (the
item).</p>
$gate
</section>
</body>
</html>
""")

"""Recommendations of a trained MIMNet, with or without torch.

A `Recommender` is one file, which `mimnet-fast train` leaves in the run's folder. Reading and
serving it takes NumPy, safetensors and the kernels: those of `mimnet_fast.ops` where torch is
installed, else the same compiled code through `mimnet_fast._host`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
from numpy import ndarray

from mimnet_fast.cdr import checkpoints
from mimnet_fast.cdr.errors import UserError

NAME = "recommender.safetensors"
FORMAT = "mimnet_fast.recommender"
FORMAT_VERSION = 1

_Catalogue = tuple[Any, Any, Any, Any, Any, Any]
Kernels = Literal["auto", "torch", "host"]
PADDING = "zero_after"


class Recommendation(NamedTuple):
    """A target item and the rating that the user would give it."""

    item: str
    score: float


class Recommender:
    """The best items of the target domain for users known from the source domain.

    Scores are the model's ratings of a whole catalogue (`mimnet_fast.ops.catalogue_top_k`), plus
    the biases of item and user where the base model has them.

    A user given by a history instead of an id was not there when the source model was trained. The
    vector that the model wants of the source domain is then folded in: a linear map of the mean of
    the history's item vectors, fitted by least squares to all source users with a history.
    """

    def __init__(
        self, arrays: dict[str, ndarray], record: dict[str, Any], kernels: _Kernels
    ) -> None:
        self.record = record
        """What was trained on what: dataset, settings, errors at the chosen epoch."""
        self._arrays, self._kernels = arrays, kernels

    @staticmethod
    def load(path: str | Path, *, kernels: Kernels = "auto", device: str = "cpu") -> Recommender:
        """Read the file, or the one in a run's folder.

        Args:
            path: The file or folder.
            kernels: ``"torch"``, ``"host"`` (which knows no torch), or what is installed.
            device: Of torch.

        Raises:
            UserError: the file is no recommender, or these kernels are not installed.
        """
        arrays, record = read(path)
        if kernels not in get_args(Kernels):
            raise UserError(f"kernels: got {kernels!r}, need one of {', '.join(get_args(Kernels))}")
        if kernels == "auto":
            kernels = "host" if find_spec("torch") is None else "torch"
        weights, iterations = Weights.of(arrays), record["iterations"]
        if kernels == "host":
            return Recommender(arrays, record, _Host(weights, iterations))
        return Recommender(arrays, record, _Torch(weights, iterations, device))

    def recommend(
        self,
        users: Sequence[str] | None = None,
        *,
        histories: Sequence[Sequence[str]] | None = None,
        top_k: int = 20,
        exclude_seen: bool = True,
    ) -> list[list[Recommendation]]:
        """The items with the highest scores for each user, best first.

        Args:
            users: Ids of the source domain; or
            histories: of users who are new, the ids of source items that they like, oldest first;
                the last ones count, as many as in training.
            top_k: Items per user; fewer where no more are left.
            exclude_seen: Leave out target items that the user has rated in the dataset.

        Raises:
            UserError: unknown ids, an empty history, or numbers that make no sense.
        """
        if (users is None) == (histories is None):
            raise UserError("recommend: got both or none of users and histories, need one of them")
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise UserError(f"top_k: got {top_k!r}, need an integer of at least 1")
        arrays = self._arrays
        exclude = None
        if users is not None:
            rows = self._source_users.rows(_listed("users", users), "source user")
            ids, lengths = arrays["histories"][rows], arrays["lengths"][rows]
            source = arrays["source_users"][rows]
            if exclude_seen:
                exclude = self._seen(rows)
        else:
            assert histories is not None
            ids, lengths = self._history_rows(histories)
            source = self._folded_in(ids, lengths)
        k = min(top_k, len(arrays["target_items"]))
        interests = self._kernels.interests(ids, lengths, source)
        if "item_biases" in arrays:
            interests = np.pad(interests, ((0, 0), (0, 0), (0, 1)))
        scores, items = self._kernels.top_k(interests, k, exclude)
        if users is not None and "user_biases" in arrays:
            scores = scores + arrays["user_biases"][rows][:, None]
        names = self._target_items.names
        return [
            [
                Recommendation(names[item], score)
                for item, score in zip(*of_user, strict=True)
                if item >= 0
            ]
            for of_user in zip(items.tolist(), scores.tolist(), strict=True)
        ]

    @cached_property
    def _source_users(self) -> Ids:
        return Ids(self._arrays, "source_users")

    @cached_property
    def _source_items(self) -> Ids:
        return Ids(self._arrays, "source_items")

    @cached_property
    def _target_items(self) -> Ids:
        return Ids(self._arrays, "target_items")

    def _seen(self, users: ndarray) -> tuple[ndarray, ndarray]:
        """What each user has rated, as `catalogue_top_k` takes it: indices and offsets."""
        items, offsets = self._arrays["seen.items"], self._arrays["seen.offsets"]
        parts = [items[offsets[user] : offsets[user + 1]] for user in users]
        ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return np.concatenate([items[:0], *parts]), ends

    def _history_rows(self, histories: Sequence[Sequence[str]]) -> tuple[ndarray, ndarray]:
        """Padded rows of the source table, and lengths."""
        padding, positions = len(self._source_items.names), self._arrays["histories"].shape[1]
        ids = np.full((len(histories), positions), padding, np.int32)
        lengths = np.zeros(len(histories), np.int64)
        for user, history in enumerate(histories):
            name = f"histories[{user}]"
            if not _listed(name, history):
                raise UserError(f"{name}: got no item, need at least one source item")
            recent = self._source_items.rows(history, "source item")[-positions:]
            ids[user, : len(recent)], lengths[user] = recent, len(recent)
        return ids, lengths

    def _folded_in(self, ids: ndarray, lengths: ndarray) -> ndarray:
        mean = history_means(self._arrays["source_items"], ids, lengths)
        fold_in = self._arrays["fold_in"]
        folded: ndarray = mean @ fold_in[:-1] + fold_in[-1]
        return folded


def read(path: str | Path) -> tuple[dict[str, ndarray], dict[str, Any]]:
    """What a recommender's file holds, or the one in a run's folder.

    Raises:
        UserError: the file is no recommender.
    """
    path = Path(path)
    if path.is_dir():
        path = path / NAME
    if not path.is_file():
        raise UserError(f"{path} does not exist: mimnet-fast train --model mimnet writes it")
    arrays, record = checkpoints.load_arrays(path)
    if (record.get("format"), record.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise UserError(
            f"{path}: got format {record.get('format')} version {record.get('format_version')}, "
            f"need {FORMAT} version {FORMAT_VERSION}: train it again with this version"
        )
    return arrays, record


def history_means(table: ndarray, ids: ndarray, lengths: ndarray) -> ndarray:
    """Mean item vector of each history ``[B, D]``; the table's last row is the padding, zeros."""
    mean: ndarray = table[ids].sum(1) / np.maximum(lengths, 1)[:, None].astype(table.dtype)
    return mean


def _listed(name: str, values: Sequence[str]) -> Sequence[str]:
    if isinstance(values, str):
        raise UserError(f"{name}: got the string {values!r}, need a list of ids")
    return values


class Ids:
    """Raw ids by row, and rows by raw id."""

    def __init__(self, arrays: dict[str, ndarray], name: str) -> None:
        text = arrays[f"{name}.ids.bytes"].tobytes()
        bounds = arrays[f"{name}.ids.offsets"].tolist()
        self.names = [text[start:end].decode() for start, end in pairwise(bounds)]
        self._rows = {each: row for row, each in enumerate(self.names)}

    def rows(self, ids: Sequence[str], kind: str) -> ndarray:
        """Rows of raw ids; ``kind`` is what they are called in the error for an unknown one."""
        unknown = [each for each in ids if each not in self._rows]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise UserError(
                f"{kind}: got {unknown[0]!r}{more}, which this recommender was not trained on; it "
                f"knows {len(self.names):,}, such as {self.names[0]!r}"
            )
        return np.array([self._rows[each] for each in ids], np.int64)


class Weights(NamedTuple):
    """What the kernels are called with, as arrays or tensors."""

    source_items: Any
    logits: Any
    parameters: tuple[Any, ...]
    """As in `MIMNetParameters`."""
    catalogue: _Catalogue
    """Items, prototypes and attention as `catalogue_top_k` takes them."""
    prototype_ids: Any

    @staticmethod
    def of(arrays: dict[str, ndarray]) -> Weights:
        """The weights in a recommender's file."""

        def attention(name: str) -> tuple[ndarray, ...]:
            names = ("key_weight", "key_bias", "value_weight", "value_bias")
            return tuple(arrays[f"model.attention.{name}.{each}"] for each in names)

        bridge = [arrays[f"model.bridge.{name}"] for name in ("w1", "b1", "w2", "b2")]
        fusion = [arrays[f"model.attention.fusion_{name}"] for name in ("weight", "bias")]
        attentions: Any = (attention("fine"), attention("coarse"), *fusion)
        return Weights(
            arrays["source_items"],
            arrays["model.evaluation_logits"],
            (arrays["model.routing.weight"], *bridge, *attentions),
            _with_biases(arrays, *attentions),
            arrays["prototype_ids"],
        )

    def map(self, convert: Callable[[ndarray], Any]) -> Weights:
        """The same weights, each array converted."""

        def each(value: Any) -> Any:
            return tuple(map(each, value)) if isinstance(value, tuple) else convert(value)

        return Weights(*map(each, self))


def _with_biases(
    arrays: dict[str, ndarray],
    fine: tuple[ndarray, ...],
    coarse: tuple[ndarray, ...],
    fusion_weight: ndarray,
    fusion_bias: ndarray,
) -> _Catalogue:
    """Arguments of `catalogue_top_k` that add its bias to the score of every item.

    The bias is one more coordinate of the item, where both attentions put a 1 into every user
    vector. Keys and gate are 0 there, so nothing else changes, and the ranking stays exact.
    """
    items, prototypes = arrays["target_items"], arrays["prototypes"]
    if "item_biases" not in arrays:
        return items, prototypes, fine, coarse, fusion_weight, fusion_bias

    def attention(weights: tuple[ndarray, ...]) -> tuple[ndarray, ...]:
        *projections, value_bias = (np.pad(each, (0, 1)) for each in weights)
        value_bias[-1] = 1
        return (*projections, value_bias)

    return (
        np.column_stack([items, arrays["item_biases"]]),
        np.pad(prototypes, ((0, 0), (0, 1))),
        attention(fine),
        attention(coarse),
        np.pad(fusion_weight.reshape(2, -1), ((0, 0), (0, 1))).ravel(),
        fusion_bias,
    )


class _Kernels(Protocol):
    def interests(self, ids: ndarray, lengths: ndarray, source: ndarray) -> ndarray:
        """Transferred interests ``[B, K, D]``."""

    def top_k(
        self, interests: ndarray, k: int, exclude: tuple[ndarray, ndarray] | None
    ) -> tuple[ndarray, ndarray]:
        """Scores and indices ``[B, k]``."""


class _Torch:
    """The ops."""

    def __init__(self, weights: Weights, iterations: int, device: str) -> None:
        import torch

        self.tensor = partial(torch.as_tensor, device=device)
        self.weights, self.iterations = weights.map(self.tensor), iterations

    def interests(self, ids: ndarray, lengths: ndarray, source: ndarray) -> ndarray:
        from torch import Tensor
        from torch.nn.functional import embedding

        from mimnet_fast import ops

        routing_weight, w1, b1, w2, b2, *_ = self.weights.parameters
        capsules = ops.dynamic_routing(
            embedding(self.tensor(ids), self.weights.source_items),
            routing_weight,
            self.weights.logits,
            lengths=self.tensor(lengths),
            iterations=self.iterations,
            padding=PADDING,
        )
        assert isinstance(capsules, Tensor)
        found = ops.interest_bridge(capsules, self.tensor(source), w1, b1, w2, b2)
        return found.numpy(force=True)

    def top_k(
        self, interests: ndarray, k: int, exclude: tuple[ndarray, ndarray] | None
    ) -> tuple[ndarray, ndarray]:
        from mimnet_fast import ops

        scores, indices = ops.catalogue_top_k(
            self.tensor(interests),
            *self.weights.catalogue,
            k,
            prototype_ids=self.weights.prototype_ids,
            exclude=None if exclude is None else (self.tensor(exclude[0]), self.tensor(exclude[1])),
        )
        return scores.numpy(force=True), indices.numpy(force=True)


class _Host:
    """The compiled kernels without torch."""

    def __init__(self, weights: Weights, iterations: int) -> None:
        try:
            from mimnet_fast import _host
        except ImportError as error:
            raise UserError(
                f"kernels: host is not installed ({error}): install mimnet_fast where there is a "
                "C++ compiler, or torch"
            ) from error
        self.host, self.weights, self.iterations = _host, weights, iterations

    def interests(self, ids: ndarray, lengths: ndarray, source: ndarray) -> ndarray:
        no_item = np.zeros_like(source)
        _, found = self.host.mimnet_forward(
            ids,
            source,
            no_item,
            no_item,
            self.weights.parameters,
            self.weights.logits,
            lengths=lengths,
            table=self.weights.source_items,
            iterations=self.iterations,
            padding=PADDING,
        )
        return found

    def top_k(
        self, interests: ndarray, k: int, exclude: tuple[ndarray, ndarray] | None
    ) -> tuple[ndarray, ndarray]:
        return self.host.catalogue_top_k(
            interests,
            *self.weights.catalogue,
            k,
            prototype_ids=self.weights.prototype_ids,
            exclude=exclude,
        )

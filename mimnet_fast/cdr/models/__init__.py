"""The models by name: what they are, where they are published, how they are built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from mimnet_fast.cdr import profiles
from mimnet_fast.cdr.biases import SplitBiases
from mimnet_fast.cdr.config import Base, Config
from mimnet_fast.cdr.models import trivial
from mimnet_fast.cdr.models.ablation import Ablation, Part
from mimnet_fast.cdr.models.cmf import JointTables
from mimnet_fast.cdr.models.emcdr import EMCDR
from mimnet_fast.cdr.models.lacdr import LACDR
from mimnet_fast.cdr.models.matrix_factorization import MatrixFactorization
from mimnet_fast.cdr.models.mimnet import MIMNet
from mimnet_fast.cdr.models.mimnet_released import MIMNetReleased
from mimnet_fast.cdr.models.prototypes import item_prototypes
from mimnet_fast.cdr.models.ptupcdr import PTUPCDR
from mimnet_fast.cdr.models.remit import REMIT
from mimnet_fast.cdr.models.sscdr import SSCDR
from mimnet_fast.cdr.models.transfer import FrozenInputs, TransferModel
from mimnet_fast.cdr.protocol import Split

__all__ = [
    "ABLATIONS",
    "EMCDR",
    "LACDR",
    "MODELS",
    "PTUPCDR",
    "REMIT",
    "SSCDR",
    "TRAINABLE",
    "TRIVIAL",
    "Ablation",
    "FrozenInputs",
    "JointTables",
    "MIMNet",
    "MIMNetReleased",
    "MatrixFactorization",
    "ModelSpec",
    "TransferModel",
    "item_prototypes",
]


@dataclass(frozen=True)
class ModelSpec:
    """One row of the registry."""

    title: str
    source: str
    """Where the model is published."""
    build: Callable[..., TransferModel] | None = None
    """Makes the model of stage 2 from a `Config`, and, where it takes metadata, the number of its
    kinds."""
    settings: tuple[str, ...] = ()
    """Fields of `Config` that stage 2 depends on, beside those of the base models."""
    base: Literal["target", "joint"] = "target"
    """Without a stage 2: the target base model itself, or a base model of both domains."""
    takes_metadata: bool = False
    only_on: Base | None = None
    """The one base model that has what an ablation leaves out."""


_SETTINGS = ("epochs", "batch_size", "overlap")
_BRIDGE_SETTINGS = (*_SETTINGS, "history_length", "hidden", "backend")
_MIMNET_SETTINGS = (*_BRIDGE_SETTINGS, "interests", "iterations", "prototypes")


def _width(config: Config, model: type[TransferModel]) -> int:
    """D of the vectors that the model is given."""
    profiled = model.uses_profiles and config.base == "biased-mf"
    return config.features + (profiles.WIDTH if profiled else 0)


def _routed(config: Config, model: type[Any], **options: Any) -> TransferModel:
    """MIMNet or a model of the same settings."""
    built: TransferModel = model(
        _width(config, model),
        config.hidden,
        interests=config.interests,
        iterations=config.iterations,
        history_length=config.history_length,
        backend=config.backend,
        **options,
    )
    return built


def _single_interest(config: Config) -> TransferModel:
    return _routed(replace(config, interests=1), MIMNet)


def _emcdr(config: Config) -> TransferModel:
    return EMCDR(config.features, config.mapping)


def _lacdr(config: Config) -> TransferModel:
    return LACDR(config.features)


def _remit(config: Config, kinds: int = 0) -> TransferModel:
    return REMIT(config.features, config.hidden, kinds, backend=config.backend)


def _sscdr(config: Config) -> TransferModel:
    return SSCDR(config.features, config.mapping)


def _ptupcdr(config: Config) -> TransferModel:
    return PTUPCDR(config.features, config.hidden, backend=config.backend)


MODELS: dict[str, ModelSpec] = {
    "mimnet": ModelSpec(
        "MIMNet",
        "Zhu et al., Neurocomputing 620 (2025), arXiv 2408.00038",
        partial(_routed, model=MIMNet),
        _MIMNET_SETTINGS,
    ),
    "mimnet-released": ModelSpec(
        "MIMNet as released",
        "the public code, marqu22/MIMNet",
        partial(_routed, model=MIMNetReleased),
        _MIMNET_SETTINGS,
    ),
    "ptupcdr": ModelSpec(
        "PTUPCDR", "Zhu et al., WSDM 2022, arXiv 2110.11154", _ptupcdr, _BRIDGE_SETTINGS
    ),
    "remit": ModelSpec(
        "REMIT", "Sun et al., AAAI 2023", _remit, _BRIDGE_SETTINGS, takes_metadata=True
    ),
    "emcdr": ModelSpec("EMCDR", "Man et al., IJCAI 2017", _emcdr, (*_SETTINGS, "mapping")),
    "sscdr": ModelSpec(
        "SSCDR", "Kang et al., CIKM 2019", _sscdr, (*_SETTINGS, "history_length", "mapping")
    ),
    "lacdr": ModelSpec("LACDR", "Wang et al., CIKM 2021", _lacdr, _SETTINGS),
    "cmf": ModelSpec("CMF", "Singh & Gordon, KDD 2008", settings=("overlap",), base="joint"),
    "tgt": ModelSpec("TGT", "the target domain alone; a baseline of PTUPCDR and MIMNet"),
}

_WITHOUT: dict[str, tuple[str, tuple[Part, ...]]] = {
    "no-fine": ("no fine attention", ("fine",)),
    "no-coarse": ("no coarse attention", ("coarse",)),
    "no-fusion": ("no fusion", ("fusion",)),
    "no-guidance": ("no target guidance", ("fine", "coarse")),
    "no-capsules": ("no capsules", ("capsules",)),
    "single-bridge": ("single bridge", ("bridges",)),
}
_WITHOUT_ON_BIASES = {
    "no-profiles": ("no profiles", "uses_profiles"),
    "no-user-weights": ("no user weights", "weighs_users"),
    "no-averaging": ("no averaging", "averages"),
}
_OURS = "a part of MIMNet replaced, see `Ablation`"

_QUIRKS: dict[str, dict[str, Any]] = {
    quirk: {quirk: False}
    for quirk in (
        "first_item_only",
        "leaking_padding",
        "shared_padding_id",
        "fresh_logits",
        "untrained_prototypes",
    )
}

ABLATIONS: dict[str, dict[str, ModelSpec]] = {
    "mimnet": {
        name: ModelSpec(
            title, _OURS, partial(_routed, model=Ablation, without=parts), _MIMNET_SETTINGS
        )
        for name, (title, parts) in _WITHOUT.items()
    }
    | {
        "single-interest": ModelSpec(
            "single interest",
            "MIMNet with one capsule",
            _single_interest,
            tuple(setting for setting in _MIMNET_SETTINGS if setting != "interests"),
        )
    }
    | {
        name: ModelSpec(
            title,
            "MIMNet without an addition of the base biased-mf",
            partial(_routed, model=type("MIMNet", (MIMNet,), {addition: False})),
            _MIMNET_SETTINGS,
            only_on="biased-mf",
        )
        for name, (title, addition) in _WITHOUT_ON_BIASES.items()
    },
    "mimnet-released": {
        f"no-{quirk.replace('_', '-')}": ModelSpec(
            f"no {quirk.replace('_', ' ')}",
            "the public code with one thing corrected, see `MIMNetReleased`",
            partial(_routed, model=MIMNetReleased, **off),
            _MIMNET_SETTINGS,
        )
        for quirk, off in _QUIRKS.items()
    },
}
"""Models without one of their parts, or of their quirks."""

TRAINABLE = MODELS | ABLATIONS["mimnet"] | ABLATIONS["mimnet-released"]
"""All that a run can train."""

TRIVIAL: dict[str, tuple[str, Callable[[Split, SplitBiases], Tensor]]] = {
    "constant": ("middle of scale", lambda split, _: trivial.constant(split)),
    "global_mean": ("global mean", lambda split, _: trivial.global_mean(split)),
    "item_mean": ("item mean", lambda split, _: trivial.item_mean(split)),
    "item_median": ("item median", lambda split, _: trivial.item_median(split)),
    "user_mean": ("source user mean", lambda split, _: trivial.user_mean(split)),
    "item_bias": (
        "mean + item bias",
        lambda split, biases: biases.final.target.without_user(split.final.evaluation),
    ),
    "item_user_bias": (
        "mean + item bias + source user bias",
        lambda split, biases: biases.final.expected(split.final.evaluation),
    ),
    "item_user_bias_median": (
        "biases + median of the rest",
        trivial.biases_and_median,
    ),
    "item_user_bias_rounded": (
        "biases + median of the rest, rounded",
        trivial.biases_rounded,
    ),
}
"""Predictors without training: a title, and what they expect of the test ratings."""

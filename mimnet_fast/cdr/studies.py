"""What to compare in a study of MIMNet: other values of its settings, or a smaller overlap."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.grids import Variant

SWEPT = ("interests", "iterations", "prototypes", "history_length", "overlap")
"""Settings that a sweep varies; the base models and the test users do not depend on them."""


def sweep_variants(
    centre: Mapping[str, float], values: Mapping[str, Sequence[float]], *, full: bool
) -> tuple[Variant, ...]:
    """MIMNet at ``centre``, then at the other values.

    Args:
        centre: The value of each setting in `SWEPT`.
        values: The values of the settings to vary.
        full: All combinations; otherwise one setting at a time, with the others at the centre.

    Raises:
        UserError: nothing to vary, or a value that `Config` refuses.

    >>> variants = sweep_variants({"interests": 7}, {"interests": [1, 7]}, full=False)
    >>> [variant.name for variant in variants]
    ['mimnet', 'interests-1']
    """
    if not values:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in SWEPT)
        raise UserError(f"nothing to sweep: give two values or more to one of {options}")
    if full:
        points = [
            dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())
        ]
    else:
        points = [{name: value} for name, listed in values.items() for value in listed]
    for point in points:
        Config(**point)  # type: ignore[arg-type]
    changed = [{k: v for k, v in point.items() if v != centre[k]} for point in points]
    title = _title({name: centre[name] for name in values})
    variants = [Variant("mimnet", f"MIMNet: {title}", "mimnet")]
    for change in changed:
        if change:
            name = "-".join(f"{key}-{value}" for key, value in change.items())
            variants.append(Variant(name, _title(change), "mimnet", change))
    return tuple(variants)


def _title(settings: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())

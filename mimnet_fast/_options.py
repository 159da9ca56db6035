"""Names of the options and their integer codes, which `csrc/common/options.h` repeats."""

from __future__ import annotations

SQUASH_FORMS = ("sqrt_eps", "norm_plus_eps", "pow_clamp", "no_div", "none_eps", "identity")
SOFTMAX_AXES = ("capsules", "inputs")
PADDINGS = ("zero_after", "fill_before", "ignore")
GRADIENTS = ("last", "full")
UPDATES = ("accumulate", "replace", "coupling")


def code(argument: str, value: str, allowed: tuple[str, ...]) -> int:
    """Position of ``value`` in ``allowed``; a ValueError that lists them when it is none."""
    try:
        return allowed.index(value)
    except ValueError:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"{argument}: got {value!r}, need one of {choices}") from None

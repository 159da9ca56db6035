"""Cross-domain recommendation for cold-start users, from raw files to a table of errors or ranks.

Data flows one way: `download` (public files), `readers`, `cleaning` and `dataset` (raw files to a
prepared folder), `protocol` (who is tested on what), `models`, `training` (one model), `tasks`
(what is learned and measured), `experiment` (all of a run), `results`; `implicit`, `ranking` and
`ranking_experiment` (ranking by implicit feedback instead of rating prediction); `grids` (many
runs), `studies` (what to compare), `significance`, `reports`; `packing` and `serving`
(recommendations of a trained model), the one module that takes no torch; `diagnostics` and
`inspection` (what it does inside).
"""

from importlib.util import find_spec

_SERVING = ("safetensors",)
_TRAINING = (*_SERVING, "polars", "rich", "scipy", "sklearn", "typer")
_NEEDED = _SERVING if find_spec("torch") is None else _TRAINING

if _MISSING := [name for name in _NEEDED if find_spec(name) is None]:
    raise ImportError(
        f"mimnet_fast.cdr needs {', '.join(_MISSING)}: pip install 'mimnet-fast[cdr]'"
    )

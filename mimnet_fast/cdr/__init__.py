"""Cross-domain rating prediction for cold-start users, from raw files to a table of errors.

Data flows one way: `download` (public files), `readers`, `cleaning` and `dataset` (raw files to a
prepared folder), `protocol` (who is tested on what), `models`, `training` (one model), `experiment`
(all of a run), `results`; `grids` (many runs), `significance`, `reports`; `packing`
and `serving` (recommendations of a trained model).
"""

from importlib.util import find_spec

_MISSING = [
    name
    for name in ("polars", "rich", "safetensors", "scipy", "sklearn", "typer")
    if find_spec(name) is None
]
if _MISSING:
    raise ImportError(
        f"mimnet_fast.cdr needs {', '.join(_MISSING)}: pip install 'mimnet-fast[cdr]'"
    )

from typing import Any, TypedDict

from numpy import ndarray

class BuildInfo(TypedDict):
    version: str
    compiler: str
    flags: str
    isa_variants: dict[str, str]

def build_info() -> BuildInfo: ...
def cpu_features() -> dict[str, bool]: ...
def isa_name() -> str: ...

# parameters, fine and coarse nest as in mimnet_fast.ops
def mimnet_forward(
    history: ndarray,
    source: ndarray,
    item: ndarray,
    prototype: ndarray,
    parameters: tuple[Any, ...],
    logits: ndarray,
    *,
    lengths: ndarray | None = None,
    table: ndarray | None = None,
    iterations: int = 3,
    padding: str = "zero_after",
) -> tuple[ndarray, ndarray]: ...
def catalogue_top_k(
    interests: ndarray,
    items: ndarray,
    prototypes: ndarray,
    fine: tuple[ndarray, ...],
    coarse: tuple[ndarray, ...],
    fusion_weight: ndarray,
    fusion_bias: ndarray,
    k: int,
    *,
    prototype_ids: ndarray | None = None,
    exclude: tuple[ndarray, ndarray] | None = None,
) -> tuple[ndarray, ndarray]: ...

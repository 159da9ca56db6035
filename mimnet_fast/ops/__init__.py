"""The ops: autograd functions over tensors, each served by the backend that fits the call."""

from mimnet_fast.ops.catalogue_top_k import catalogue_top_k
from mimnet_fast.ops.dynamic_routing import dynamic_routing
from mimnet_fast.ops.interest_bridge import interest_bridge
from mimnet_fast.ops.matrix_factorization_adam import matrix_factorization_adam_
from mimnet_fast.ops.mimnet_adam import mimnet_adam_
from mimnet_fast.ops.mimnet_forward import mimnet_forward
from mimnet_fast.ops.multi_granularity_attention import multi_granularity_attention
from mimnet_fast.ops.squash import squash
from mimnet_fast.ops.target_attention import target_attention
from mimnet_fast.reference import MIMNetParameters

DIFFERENTIABLE = (
    "squash",
    "dynamic_routing",
    "interest_bridge",
    "target_attention",
    "multi_granularity_attention",
    "mimnet_forward",
)
"""The ops with a gradient."""

FUNCTIONS = (*DIFFERENTIABLE, "catalogue_top_k", "matrix_factorization_adam_", "mimnet_adam_")
"""Every op."""

__all__ = [
    "DIFFERENTIABLE",
    "FUNCTIONS",
    "MIMNetParameters",
    "catalogue_top_k",
    "dynamic_routing",
    "interest_bridge",
    "matrix_factorization_adam_",
    "mimnet_adam_",
    "mimnet_forward",
    "multi_granularity_attention",
    "squash",
    "target_attention",
]

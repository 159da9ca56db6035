"""Every op as readable PyTorch: the oracle of the tests and the baseline of the benchmarks.

Each file holds the textbook form, as a reader of the paper would write it, and, where algebra alone
saves work, the reassociated form that the kernels are derived from.
"""

from mimnet_fast.reference.catalogue_top_k import (
    catalogue_top_k,
    catalogue_top_k_reassociated,
)
from mimnet_fast.reference.dynamic_routing import dynamic_routing, dynamic_routing_reassociated
from mimnet_fast.reference.interest_bridge import interest_bridge, interest_bridge_reassociated
from mimnet_fast.reference.matrix_factorization_adam import matrix_factorization_adam_
from mimnet_fast.reference.mimnet_adam import mimnet_adam_
from mimnet_fast.reference.mimnet_forward import (
    MIMNetParameters,
    mimnet_forward,
    mimnet_forward_reassociated,
)
from mimnet_fast.reference.multi_granularity_attention import (
    multi_granularity_attention,
    multi_granularity_attention_reassociated,
)
from mimnet_fast.reference.squash import squash
from mimnet_fast.reference.target_attention import target_attention, target_attention_reassociated

__all__ = [
    "MIMNetParameters",
    "catalogue_top_k",
    "catalogue_top_k_reassociated",
    "dynamic_routing",
    "dynamic_routing_reassociated",
    "interest_bridge",
    "interest_bridge_reassociated",
    "matrix_factorization_adam_",
    "mimnet_adam_",
    "mimnet_forward",
    "mimnet_forward_reassociated",
    "multi_granularity_attention",
    "multi_granularity_attention_reassociated",
    "squash",
    "target_attention",
    "target_attention_reassociated",
]

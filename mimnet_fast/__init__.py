"""Fused kernels for multi-interest and cross-domain recommendation in PyTorch.

`ops` holds the functions, `nn` the modules made of them, `reference` the same equations in plain
PyTorch; `backends` says which implementation serves a call and why. Without torch there are only
`info` and `cdr.serving`.
"""

from importlib.util import find_spec

if find_spec("torch") is not None:
    from mimnet_fast import backends, nn, ops
    from mimnet_fast.backends import BackendUnavailable, use_backend
    from mimnet_fast.swap import register_adapter, swap
    from mimnet_fast.variants import RoutingVariant
    from mimnet_fast.verify import verify

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "RoutingVariant",
    "__version__",
    "backends",
    "nn",
    "ops",
    "register_adapter",
    "swap",
    "use_backend",
    "verify",
]

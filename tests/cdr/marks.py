import pytest

from mimnet_fast import backends

_MISSING = backends.available("cpu")["native"]

needs_kernels = pytest.mark.skipif(_MISSING is not None, reason=f"no compiled kernels: {_MISSING}")

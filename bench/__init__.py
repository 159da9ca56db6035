"""Benchmarks: `mimnet-fast bench`, or in a checkout `pytest bench --benchmark-only`."""

import os

# torch's pool of compilers is still at work when the first results of theirs are measured: with it,
# baselines at B = 128 seemed half as fast.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

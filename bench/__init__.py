"""Benchmarks: `mimnet-fast bench`, or in a checkout `pytest bench --benchmark-only`."""

import os

# In this process, because nobody says when torch's pool of compilers rests.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

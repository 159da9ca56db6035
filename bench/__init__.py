"""Benchmarks: `mimnet-fast bench`, or in a checkout `pytest bench --benchmark-only`."""
